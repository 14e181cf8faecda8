"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const said = document.getElementById("said");
// cividis, made for readers who cannot tell red from green (Nunez, Anderton and Renslow 2018).
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"]
  .map(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)));
// Okabe and Ito's colours, each with a pattern of its own.
const LINES = [["#0072b2", ""], ["#d55e00", "6 3"], ["#009e73", "2 2"], ["#cc79a7", "8 3 2 3"], ["#e69f00", "1 3"], ["#56b4e9", "10 4"], ["#888888", "4 1"]];

function color(share) {
  const at = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const mix = CIVIDIS[low].map((one, i) => Math.round(one + (at - low) * (CIVIDIS[low + 1][i] - one)));
  return `rgb(${mix.join(",")})`;
}
function number(value, isShare, key) {
  if (value === null || value === undefined) return "not known";
  if (isShare) return (100 * value).toPrecision(4).replace(/\.?0+$/, "") + " %";
  if (key === "cosine") return value.toFixed(6);
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(+value.toPrecision(4)) : value.toExponential(3);
}
function tick(value) { return String(+value.toPrecision(3)); }
function make(tag, attributes, ...children) {
  const space = ["svg", "rect", "line", "path", "text", "circle", "g"].includes(tag);
  const node = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function show(title, rows, x, y) {
  const table = make("table", {}, ...rows.map(([k, v]) => make("tr", {}, make("td", {}, k), make("td", {}, v))));
  tip.replaceChildren(make("b", {}, title), table);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
}
function hide() { tip.hidden = true; }
function explain(node, title, rows) {
  node.addEventListener("pointermove", e => show(title, rows(), e.clientX, e.clientY));
  node.addEventListener("pointerleave", hide);
  node.addEventListener("focus", () => { const b = node.getBoundingClientRect(); show(title, rows(), b.right, b.bottom); });
  node.addEventListener("blur", hide);
}
addEventListener("keydown", e => { if (e.key === "Escape") hide(); });

function titleOf(cell) { return cell.count > 1 ? `${cell.count} tensors, the first is ${cell.name}` : cell.name; }
function rowsOf(cell) {
  const rows = [["shape", cell.shape.join(" x ") || "scalar"]];
  if (cell.nonfinite) rows.push(["of unknown size", `${cell.nonfinite} of ${cell.count}`]);
  for (const map of data.maps) if (!map.missing) rows.push([map.label, number(cell.values[map.key], map.share, map.key)]);
  return rows;
}
function cellNode(map, cell, role) {
  const value = cell.values[map.key];
  const node = make("div", { class: "cell", role, tabindex: -1, "data-key": map.key, "data-name": cell.name,
    "aria-label": `${titleOf(cell)}: ${map.label} ${number(value, map.share, map.key)}` });
  if (value === null) node.classList.add("unknown");
  else node.style.background = color(map.high > map.low ? (value - map.low) / (map.high - map.low) : value < map.low ? 0 : value > map.high ? 1 : 0.5);
  explain(node, titleOf(cell), () => rowsOf(cell));
  return node;
}
function shortNames(kinds) {
  const short = kinds.map(k => k.replace(/^(self_attn|attn|attention|mlp|mixer|linear_attn)\./, "").replace(/_proj(?=$|\.)/, "").replace(/_layernorm/, " norm"));
  return short.map((s, i) => short.indexOf(s) === short.lastIndexOf(s) ? s : kinds[i]);
}
function roam(grid, columns) {
  const cells = [...grid.querySelectorAll(".cell:not(.none)")];
  if (cells.length) cells[0].tabIndex = 0;
  grid.addEventListener("keydown", e => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[e.key];
    if (!step || !e.target.classList.contains("cell")) return;
    e.preventDefault();
    let [row, column] = [+e.target.dataset.row, +e.target.dataset.column], next = null;
    for (let i = 0; i < 500 && !next; i++) {
      row += step[0]; column += step[1];
      if (row < 0 || column < 0 || column >= columns) return;
      next = grid.querySelector(`.cell:not(.none)[data-row="${row}"][data-column="${column}"]`);
    }
    if (next) { e.target.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
}
function gridOf(map, part) {
  const at = new Map(part.cells.map(c => [c.layer + "|" + c.kind, c]));
  const height = part.layers.length > 64 ? 8 : part.layers.length > 40 ? 11 : part.layers.length > 8 ? 15 : 22;
  const every = height < 12 ? 5 : 1, names = shortNames(part.kinds);
  const grid = make("div", { class: "grid", role: "grid", "aria-label": `${map.label}, ${part.part}: a row for each layer` });
  grid.style.gridTemplateColumns = `max-content repeat(${part.kinds.length}, minmax(10px, 1fr))`;
  const head = make("div", { role: "row" }, make("div", { class: "layer", role: "columnheader" }, "layer"));
  part.kinds.forEach((kind, i) => head.append(make("div", { class: "column", role: "columnheader", title: kind }, names[i])));
  grid.append(head);
  part.layers.forEach((layer, r) => {
    const row = make("div", { role: "row" });
    const label = make("div", { class: "layer", role: "rowheader", "aria-label": `layer ${layer}` }, r % every ? "" : String(layer));
    row.append(label);
    part.kinds.forEach((kind, c) => {
      const cell = at.get(layer + "|" + kind);
      const node = cell ? cellNode(map, cell, "gridcell") : make("div", { class: "cell none", role: "gridcell", "aria-label": "no such tensor" });
      node.dataset.row = r; node.dataset.column = c; node.style.height = height + "px";
      row.append(node);
    });
    grid.append(row);
  });
  roam(grid, part.kinds.length);
  return make("div", { class: "scroll" }, grid);
}
function legend(map) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  const same = map.low === map.high && !map.clips[0] && !map.clips[1];
  bar.style.background = same ? color(0.5) : `linear-gradient(to right, ${Array.from({ length: 10 }, (_, i) => color(i / 9)).join(",")})`;
  const low = (map.clips[0] ? "\u2264 " : "") + number(map.low, map.share, map.key);
  const high = (map.clips[1] ? "\u2265 " : "") + number(map.high, map.share, map.key);
  const node = make("div", { class: "legend" }, ...(same ? [bar, "everywhere " + number(map.low, map.share, map.key)] : [low, bar, high]));
  const unknown = data.parts.some(p => p.cells.some(c => c.values[map.key] === null));
  if (unknown) node.append(make("span", {}, make("span", { class: "swatch unknown" }), " not known, or not defined"));
  return node;
}
function mapOf(map, part) {
  const figure = make("figure", {}, make("figcaption", {}, make("b", {}, map.label), make("p", {}, map.meaning)));
  if (map.missing) { figure.append(make("div", { class: "missing" }, map.missing)); return figure; }
  figure.append(legend(map));
  if (part.layers.length) figure.append(gridOf(map, part));
  const beside = part.cells.filter(c => c.layer === null);
  if (beside.length) {
    const list = make("ul", { class: "beside", "aria-label": "Beside the layers" });
    for (const cell of beside) {
      const node = cellNode(map, cell, "img");
      node.tabIndex = 0;
      list.append(make("li", {}, node, make("span", {}, cell.kind + ": " + number(cell.values[map.key], map.share, map.key))));
    }
    figure.append(list);
  }
  return figure;
}
function drawMaps(place) {
  for (const part of data.parts) {
    const many = part.kinds.length > 22, name = part.part === "other" ? "other parts" : part.part, count = part.layers.length;
    const known = map => part.cells.some(c => c.values[map.key] !== null);
    // What is not known of any part is said once, beside the first; of this part alone, in a line.
    const shown = data.maps.filter(map => map.missing ? part === data.parts[0] : known(map));
    const others = data.maps.filter(map => !map.missing && !known(map)).map(map => map.label.toLowerCase());
    place.append(make("h3", {}, name[0].toUpperCase() + name.slice(1) + (count ? `, ${count} layer${count > 1 ? "s" : ""}` : "")));
    if (shown.length) place.append(make("div", { class: "maps" + (many ? " wide" : "") }, ...shown.map(map => mapOf(map, part))));
    if (others.length) place.append(make("p", { class: "soft" }, `Not known of the ${name}: ${others.join(", ")}.`));
  }
  if (!data.parts.length) place.append(make("div", { class: "missing" }, "No tensor to show."));
}

function drawScale(place) {
  const verdict = data.verdict, width = Math.max(280, place.clientWidth), left = 8, right = width - 8;
  // Half of the scale for 0.9 to 1, where most pairs are.
  const x = c => left + (right - left) * (c < 0.9 ? Math.max(0, c) / 0.9 * 0.55 : 0.55 + (c - 0.9) / 0.1 * 0.45);
  const lines = verdict.published, top = 34, height = top + lines.length * 34 + 26;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Cosines of published pairs and of this one" });
  lines.forEach((pair, i) => {
    const y = top + i * 34, from = x(pair.low), to = Math.max(x(pair.high), from + 5);
    const change = Object.entries(pair.change).map(([k, v]) => `${k} ${v > 0 ? "+" : ""}${v}`).join(", ");
    const bar = make("rect", { x: Math.min(from, right - 5), y: y + 15, width: Math.min(to, right) - Math.min(from, right - 5), height: 9, rx: 2, fill: color(0.55), tabindex: 0, "aria-label": `${pair.pair}: cosine ${pair.low} to ${pair.high}; merging changed ${change}` });
    explain(bar, pair.pair, () => [["cosine of the layers", `${pair.low} to ${pair.high}`], ["points by naive merging", change]]);
    const label = make("text", { x: left, y: y + 10 }, width > 700 ? `${pair.pair}: ${change}` : pair.pair);
    svg.append(label, bar);
  });
  const bottom = height - 20;
  svg.append(make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  for (const tick of [0, 0.3, 0.6, 0.9, 0.95, 1]) {
    svg.append(make("line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4, class: "axis" }),
      make("text", { x: x(tick), y: bottom + 17, "text-anchor": tick === 0 ? "start" : tick === 1 ? "end" : "middle" }, String(tick)));
  }
  if (verdict.cosine !== null) {
    const at = x(verdict.cosine);
    if (verdict.layers) svg.append(make("rect", { x: x(verdict.layers[0]), y: 20, width: Math.max(2, x(verdict.layers[1]) - x(verdict.layers[0])), height: 6, class: "mark", opacity: 0.45 }));
    svg.append(make("line", { x1: at, x2: at, y1: 18, y2: bottom, stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "4 3" }),
      make("text", { x: Math.min(Math.max(at, 90), width - 90), y: 13, "text-anchor": "middle", class: "strong" }, `this pair: cosine ${verdict.cosine.toFixed(4)}`));
  }
  place.replaceChildren(svg);
}

function drawHistogram(place, name) {
  const all = Object.values(data.histogram.modules), one = name === "all" ? null : data.histogram.modules[name];
  const chosen = one ? [one] : all, counts = new Map();
  let zeros = 0, bad = 0, total = 0;
  for (const part of chosen) { zeros += part.zeros; bad += part.nonfinite; for (const [e, n] of part.bins) counts.set(e, (counts.get(e) || 0) + n); }
  for (const n of counts.values()) total += n;
  total += zeros + bad;
  const exponents = [...counts.keys()].sort((a, b) => a - b);
  // Far below the rest there is little: bins that hold one in 1,000 together are put into the first one shown.
  let first = exponents[0] ?? 0, under = 0;
  const last = exponents[exponents.length - 1] ?? 0;
  while (last - first > 10 && (under + (counts.get(first) || 0)) / total < 1e-3) { under += counts.get(first) || 0; first++; }
  const bars = [["0", zeros, "exactly 0"]];
  for (let e = first; e <= last && exponents.length; e++) {
    const low = e === first && under ? "less than" : `2^${e} = ${(2 ** e).toExponential(1)} to`;
    bars.push([(2 ** e).toExponential(0), (counts.get(e) || 0) + (e === first ? under : 0), `${low} ${(2 ** (e + 1)).toExponential(1)}`]);
  }
  if (bad) bars.push(["NaN", bad, "NaN or Inf"]);
  const width = Math.max(280, place.clientWidth), height = 240, left = 46, bottom = height - 42, top = 14;
  const most = Math.max(...bars.map(b => b[1])) / (total || 1) || 1, step = (width - left - 8) / bars.length;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Histogram of |delta|" });
  for (let i = 0; i <= 4; i++) {
    const y = bottom - (bottom - top) * i / 4;
    svg.append(make("line", { x1: left, x2: width - 8, y1: y, y2: y, class: "axis" }), make("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, tick(100 * most * i / 4) + "%"));
  }
  const every = Math.ceil(46 / step);
  bars.forEach(([label, count, meaning], i) => {
    const share = count / (total || 1), h = (bottom - top) * share / most;
    const text = `${(100 * share).toPrecision(4)} %`;
    const bar = make("rect", { x: left + i * step + 1, y: bottom - Math.max(h, count ? 1 : 0), width: Math.max(1, step - 2), height: Math.max(h, count ? 1 : 0), class: "mark bar", tabindex: 0, "data-count": count, "aria-label": `|delta| ${meaning}: ${text}` });
    explain(bar, `|delta| ${meaning}`, () => [["entries", count.toLocaleString("en")], ["share", text]]);
    svg.append(bar);
    if (i === 0 || (i - 1) % every === 0 && (i > 1 || step > 40)) svg.append(make("text", { x: left + (i + 0.5) * step, y: bottom + 16, "text-anchor": "middle" }, label));
  });
  svg.append(make("text", { x: left + (width - left) / 2, y: height - 6, "text-anchor": "middle" }, "|delta|, in bins of powers of two"));
  place.replaceChildren(svg);
}
function histogram(place) {
  if (data.histogram.missing) { place.append(make("div", { class: "missing" }, data.histogram.missing)); return; }
  const names = Object.keys(data.histogram.modules);
  const select = make("select", { id: "which" }, ...(names.length > 1 ? ["all", ...names] : names).map(n => make("option", { value: n }, n)));
  const chart = make("div", { class: "chart" });
  place.append(make("label", { for: "which" }, "Tensors: "), select, chart);
  const draw = () => drawHistogram(chart, select.value);
  select.addEventListener("change", draw);
  return draw;
}

function drawPanel(place, panel) {
  const width = Math.max(260, place.clientWidth), height = 230, right = width - 14, top = 12, bottom = height - 40;
  const points = panel.series.flatMap(s => s.points), known = points.filter(p => p[1] !== null);
  const xs = [...new Set(points.map(p => p[0]))].sort((a, b) => a - b);
  if (!known.length) { place.replaceChildren(make("div", { class: "missing" }, "Every value is NaN or Inf.")); return; }
  let [y0, y1] = [Math.min(...known.map(p => p[1])), Math.max(...known.map(p => p[1]))];
  // So that what rounding kept of 1.0000 and of 0.9999 does not look like a find.
  if (y1 - y0 < (panel.least || 0)) [y0, y1] = [(y0 + y1 - panel.least) / 2, (y0 + y1 + panel.least) / 2];
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 1; y0 -= pad; y1 += pad; }
  const [x0, x1] = [xs[0], xs[xs.length - 1]];
  const heights = [0, 1, 2, 3, 4].map(i => y0 + (y1 - y0) * i / 4);
  const decimals = Math.min(12, Math.max(0, Math.ceil(-Math.log10(y1 - y0)) + 2)), tick = v => String(+v.toFixed(decimals));
  const left = 14 + 7.5 * Math.max(...heights.map(h => tick(h).length));
  const X = v => x1 > x0 ? left + (right - left) * (v - x0) / (x1 - x0) : (left + right) / 2;
  const Y = v => bottom - (bottom - top) * (v - y0) / (y1 - y0);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": `${panel.label} over ${data.x_label}: ` + panel.series.map(s => `${s.name} from ${number(s.points[0][1])} to ${number(s.points[s.points.length - 1][1])}`).join("; ") + ". Arrow keys move along." });
  for (const value of heights) {
    svg.append(make("line", { x1: left, x2: right, y1: Y(value), y2: Y(value), class: "axis" }), make("text", { x: left - 6, y: Y(value) + 4, "text-anchor": "end" }, tick(value)));
  }
  const ticks = xs.length <= 6 ? xs : [0, 0.25, 0.5, 0.75, 1].map(f => xs[Math.round(f * (xs.length - 1))]);
  ticks.forEach((t, i) => svg.append(make("text", { x: X(t), y: bottom + 16, "text-anchor": ticks.length === 1 ? "middle" : i === 0 ? "start" : i === ticks.length - 1 ? "end" : "middle" }, String(+t.toPrecision(6)))));
  svg.append(make("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, data.x_label));
  panel.series.forEach((series, i) => {
    const [stroke, dash] = LINES[i % LINES.length];
    let path = "", pen = false;
    for (const [x, y] of series.points) { if (y === null) { pen = false; continue; } path += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`; pen = true; }
    svg.append(make("path", { d: path, fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": dash }));
    if (series.points.length < 30) for (const [x, y] of series.points) if (y !== null) svg.append(make("circle", { cx: X(x), cy: Y(y), r: 3, fill: stroke }));
  });
  const cursor = make("line", { y1: top, y2: bottom, stroke: "currentColor", opacity: 0 });
  svg.append(cursor);
  let at = 0;
  const point = (index, px, py) => {
    at = Math.max(0, Math.min(xs.length - 1, index));
    const x = xs[at];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(x));
    cursor.setAttribute("opacity", 0.6);
    const rows = panel.series.map(s => [s.name, number((s.points.find(p => p[0] === x) || [])[1], false, panel.key)]);
    const box = svg.getBoundingClientRect();
    show(`${data.x_label} ${x}: ${panel.label}`, rows, px ?? box.left + X(x), py ?? box.top + 20);
    if (px === undefined) said.textContent = `${data.x_label} ${x}: ` + rows.map(r => r.join(" ")).join(", ");
  };
  const leave = () => { cursor.setAttribute("opacity", 0); hide(); };
  svg.addEventListener("pointermove", e => {
    const wanted = e.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    xs.forEach((x, i) => { if (Math.abs(X(x) - wanted) < Math.abs(X(xs[best]) - wanted)) best = i; });
    point(best, e.clientX, e.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", e => { const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key]; if (step) { e.preventDefault(); point(at + step); } });
  const keys = panel.series.length < 2 ? [] : panel.series.map((s, i) => make("span", {}, make("svg", { viewBox: "0 0 26 10" }, make("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: LINES[i % LINES.length][0], "stroke-width": 2.5, "stroke-dasharray": LINES[i % LINES.length][1] })), s.name));
  place.replaceChildren(svg, make("div", { class: "keys" }, ...keys));
}

const redraw = [];
const byId = (id, act) => { const place = document.getElementById(id); if (place) act(place); };
byId("scale", place => redraw.push(() => drawScale(place)));
byId("maps", drawMaps);
byId("histogram", place => { const draw = histogram(place); if (draw) redraw.push(draw); });
byId("panels", place => {
  for (const panel of data.panels) {
    const chart = make("div", { class: "chart", "data-key": panel.key });
    place.append(make("figure", {}, make("figcaption", {}, make("b", {}, panel.label), make("p", {}, panel.unit)), chart));
    if (panel.missing) chart.append(make("div", { class: "missing" }, panel.missing));
    else redraw.push(() => drawPanel(chart, panel));
  }
});
for (const place of document.querySelectorAll("[data-section]")) {
  for (const chart of data.sections.find(s => s.key === place.dataset.section).charts) {
    const node = make("div", { class: "chart", "data-key": chart.key });
    place.append(make("figure", {}, make("figcaption", {}, make("b", {}, chart.label), make("p", {}, chart.unit)), node));
    redraw.push(() => (chart.form === "rows" ? drawRows : drawPoints)(node, chart)); // of charts.js
  }
}
for (const pre of document.querySelectorAll("pre[data-copy]")) {
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", () => {
    const text = pre.querySelector("code").textContent;
    const done = () => { button.textContent = "Copied"; said.textContent = "Copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => getSelection().selectAllChildren(pre.querySelector("code")));
    else getSelection().selectAllChildren(pre.querySelector("code"));
  });
  pre.append(button);
}
// A browser may break a line after the hyphens of an option, which is then no option to the eye.
const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
while (texts.nextNode()) if (/--[a-z]|drift-/.test(texts.currentNode.data)) found.push(texts.currentNode);
for (const node of found) {
  const parts = node.data.split(/((?<![-\w])(?:--[a-z][\w-]*|drift-(?:merge|prior)))/);
  node.replaceWith(...parts.map((text, i) => i % 2 ? make("span", { class: "option" }, text) : text));
}
const drawAll = () => redraw.forEach(draw => draw());
drawAll();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; hide(); drawAll(); } });
document.documentElement.dataset.ready = "yes";
