// What a reader would complain of, as lists of texts; empty where all is well.
// What sticks out: of the window, or of the drawing that it stands in.
function cutOff() {
  const out = [];
  for (const svg of document.querySelectorAll("main svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const own = text.getBoundingClientRect();
      if (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1 || own.top < box.top - 1)
        out.push("text: " + text.textContent);
    }
  }
  for (const node of document.querySelectorAll("main p, main td, main dd, main h1, main h2, main pre, .legend, .missing"))
    if (!node.closest(".scroll, thead") && node.getBoundingClientRect().right > innerWidth + 1) out.push(node.textContent.slice(0, 60));
  if (document.documentElement.scrollWidth > innerWidth) out.push("the page is wider than the window");
  return out;
}
// Labels of one drawing that lie over each other.
function overlaps() {
  const out = [];
  for (const svg of document.querySelectorAll("main svg")) {
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2) out.push(a + " / " + b);
    }));
  }
  return out;
}
// Text with less contrast than the 4.5 of WCAG 2, level AA.
function faint() {
  const light = c => { const v = c.match(/[\d.]+/g).slice(0, 3).map(x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const back = light(getComputedStyle(document.body).backgroundColor), out = [];
  for (const node of document.querySelectorAll("h1, h2, p, dt, td, th, .soft, .missing, figcaption p")) {
    const front = light(getComputedStyle(node).color), ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) out.push(node.className + " " + node.tagName + " " + ratio.toFixed(1));
  }
  return [...new Set(out)];
}
// Options and names of commands that are torn over two lines.
function torn() {
  const out = [], texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (texts.nextNode())
    for (const found of texts.currentNode.data.matchAll(/(?<![-\w])(?:--[a-z][\w-]*|drift-(?:merge|prior))/g)) {
      const range = document.createRange();
      range.setStart(texts.currentNode, found.index); range.setEnd(texts.currentNode, found.index + found[0].length);
      if (range.getClientRects().length > 1) out.push(found[0]);
    }
  return out;
}
