// Charts of trials: points over an axis, and rows of dots, bars and intervals. `page.js` draws them.
// The best is a star, the front diamonds: shapes tell them apart where colours do not.
function markNode(mark, x, y) {
  const big = { best: 8, front: 6 }[mark] || 4.5, at = (dx, dy) => `${(x + dx * big).toFixed(1)} ${(y + dy * big).toFixed(1)}`;
  const path = {
    best: "M" + Array.from({ length: 10 }, (_, i) => { const a = Math.PI * (i / 5 - 0.5), r = i % 2 ? 0.45 : 1; return at(r * Math.cos(a), r * Math.sin(a)); }).join("L") + "Z",
    front: `M${at(0, -1)}L${at(1, 0)}L${at(0, 1)}L${at(-1, 0)}Z`,
    failed: `M${at(-1, -1)}L${at(1, 1)}M${at(-1, 1)}L${at(1, -1)}`,
    mllm: `M${at(-1, -1)}L${at(1, -1)}L${at(1, 1)}L${at(-1, 1)}Z`,
    default: `M${at(0, -1.2)}L${at(1.1, 0.9)}L${at(-1.1, 0.9)}Z`,
  }[mark];
  return path ? make("path", { d: path, class: "trial " + mark }) : make("circle", { cx: x, cy: y, r: big, class: "trial " + mark });
}
function markName(mark) {
  const front = data.trials.some(t => t.mark === "front");
  return { best: front ? "best, on the knee of the front" : "best", front: "Pareto front", complete: "trial", pruned: "stopped early, by its last score", failed: "failed" }[mark];
}
function trialOf(number) { return data.trials.find(t => t.number === number); }
function trialRows(trial) {
  const rows = Object.entries(trial.parameters).concat(Object.entries(trial.values)).map(([k, v]) => [k, typeof v === "number" ? number(v) : String(v)]);
  if (trial.mark === "pruned") rows.push(["stopped after", trial.limit]);
  if (trial.error) rows.push(["error", trial.error.slice(0, 200)]);
  return rows.concat([["seconds", number(trial.seconds)]]);
}
function trialTitle(trial) { return `Trial ${trial.number}` + ({ best: ", the best", front: ", on the front", failed: ", failed", pruned: ", stopped early" }[trial.mark] || ""); }

// Round numbers that divide an axis: 1, 2 or 5 times a power of ten apart.
function roundTicks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough)), step = power * ([1, 2, 5].find(n => n * power >= rough) || 10);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(10));
  return found;
}
function logTicks(low, high, most) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const n of [1, 2, 5]) { const value = +(n * 10 ** power).toPrecision(3); if (value >= low * 0.999 && value <= high * 1.001) found.push(value); }
  if (found.length < 2) return roundTicks(low, high, 4);
  const every = Math.ceil(found.length / most);
  return found.filter((_, i) => i % every === 0);
}
function widened(values, share) {
  const [low, high] = [Math.min(...values), Math.max(...values)], pad = high > low ? (high - low) * share : Math.abs(low) * 0.1 || 1;
  return [low - pad, high + pad];
}
function axisX(svg, chart, ticks, X, left, right, bottom, height) {
  let free = -Infinity;
  for (const t of ticks) {
    const label = chart.share ? number(t, true) : String(t), half = label.length * 3.6, x = Math.min(Math.max(X(t), left + (left < 20 ? half : 0)), right - half + 6);
    if (x - half < free + 6) continue;
    free = x + half;
    svg.append(make("line", { x1: X(t), x2: X(t), y1: bottom, y2: bottom + 4, class: "axis" }), make("text", { x, y: bottom + 17, "text-anchor": "middle" }, label));
  }
  if (chart.x_label) svg.append(make("text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, cut(chart.x_label, right - left)));
}
// A label as far as there is room for it, by the width that it will have.
function cut(text, width) {
  const pen = make("canvas").getContext("2d");
  pen.font = "12px " + getComputedStyle(document.body).fontFamily;
  let end = text.length;
  const short = () => end < text.length ? text.slice(0, end) + "\u2026" : text;
  while (end > 1 && pen.measureText(short()).width > width) end--;
  return short();
}

// What the pointer or the arrow keys are at: targets are {x, y, title, rows, trial}, in their order.
function walkable(svg, targets) {
  const ring = make("circle", { r: 10, class: "ring", opacity: 0 });
  svg.append(ring);
  let at = -1;
  const go = (index, px, py) => {
    at = Math.max(0, Math.min(targets.length - 1, index));
    const target = targets[at], box = svg.getBoundingClientRect();
    ring.setAttribute("cx", target.x); ring.setAttribute("cy", target.y); ring.setAttribute("opacity", 1);
    show(target.title, target.rows, px ?? box.left + target.x, py ?? box.top + target.y);
    if (px === undefined) said.textContent = `${target.title}: ` + target.rows.map(r => r.join(" ")).join(", ");
  };
  const leave = () => { ring.setAttribute("opacity", 0); hide(); };
  svg.addEventListener("pointermove", e => {
    const box = svg.getBoundingClientRect(), [x, y] = [e.clientX - box.left, e.clientY - box.top];
    let best = -1, near = 40 ** 2;
    targets.forEach((t, i) => { const d = (t.x - x) ** 2 + (t.y - y) ** 2; if (d < near) { near = d; best = i; } });
    if (best < 0) leave(); else go(best, e.clientX, e.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", e => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (step && targets.length) { e.preventDefault(); go(at + step); }
  });
}
// What the marks and lines of a chart mean: lines are names and either a class or a mark.
function keysOf(marks, lines) {
  const sign = node => make("svg", { viewBox: "0 0 26 16", "aria-hidden": "true" }, node);
  return make("div", { class: "keys" }, ...marks.map(m => make("span", {}, sign(markNode(m, 13, 8)), markName(m))),
    ...lines.map(([name, type]) => make("span", {}, sign(["mllm", "default"].includes(type) ? markNode(type, 13, 8) : make("line", { x1: 0, x2: 26, y1: 8, y2: 8, class: "level " + type })), name)));
}
function presentMarks(numbers) {
  const present = new Set(numbers.map(n => trialOf(n).mark));
  return ["best", "front", "complete", "pruned", "failed"].filter(m => present.has(m));
}

function drawPoints(place, chart) {
  const width = Math.max(260, place.clientWidth), height = 270, right = width - 14, top = 12, bottom = height - 42;
  const levels = chart.levels || [], others = chart.others || [], failed = chart.failed || [];
  if (!chart.points.length && !failed.length) { place.replaceChildren(make("div", { class: "missing" }, "No trial to show.")); return; }
  const ys = chart.points.map(p => p[1]).concat(levels.map(l => l.value), others.map(o => o[1]));
  const xs = chart.points.map(p => p[0]).concat(others.map(o => o[0]));
  const [y0, y1] = ys.length ? widened(ys, 0.08) : [0, 1];
  const ticksY = ys.length ? roundTicks(y0, y1, 5) : [], left = 14 + 7.4 * Math.max(1, ...ticksY.map(t => String(t).length));
  const scale = chart.log ? Math.log10 : v => v, ends = widened((chart.ends || xs).map(scale), 0.04);
  const X = v => left + (right - left) * (scale(v) - ends[0]) / (ends[1] - ends[0]), Y = v => bottom - (bottom - top) * (v - y0) / (y1 - y0);
  const best = chart.points.map(p => trialOf(p[2])).find(t => t.mark === "best");
  const summary = `${chart.label}: ${chart.points.length} trials` + (best ? `, the best is trial ${best.number}` : "") + ". Arrow keys move from trial to trial.";
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": summary });
  for (const t of ticksY) svg.append(make("line", { x1: left, x2: right, y1: Y(t), y2: Y(t), class: "axis" }), make("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, String(t)));
  const low = chart.log ? 10 ** ends[0] : ends[0], high = chart.log ? 10 ** ends[1] : ends[1];
  let ticks = chart.log ? logTicks(low, high, width > 500 ? 9 : 5) : roundTicks(low, high, width > 500 ? 8 : 5);
  if (chart.whole) ticks = ticks.filter(t => Number.isInteger(t) && t >= chart.ends[0] && t <= chart.ends[1]);
  axisX(svg, chart, ticks, X, left, right, bottom, height);
  svg.append(make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  const lines = levels.map((level, i) => {
    svg.append(make("line", { x1: left, x2: right, y1: Y(level.value), y2: Y(level.value), class: "level of" + i }));
    return [`${level.name}: ${number(level.value)}`, "of" + i];
  });
  if (chart.steps && chart.steps.length > 1) {
    const path = chart.steps.map(([x, y], i) => i ? `H${X(x).toFixed(1)}V${Y(y).toFixed(1)}` : `M${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    svg.append(make("path", { d: path + `H${right}`, class: "level so-far", fill: "none" }));
    lines.push(["best so far", "so-far"]);
  }
  const targets = chart.points.map(([x, y, n]) => ({ x: X(x), y: Y(y), value: x, title: trialTitle(trialOf(n)), rows: trialRows(trialOf(n)), mark: trialOf(n).mark }))
    .concat(failed.map(n => ({ x: X(n), y: bottom, value: n, title: trialTitle(trialOf(n)), rows: trialRows(trialOf(n)), mark: "failed" })))
    .concat(others.map(([x, y, name, mark]) => ({ x: X(x), y: Y(y), value: x, title: name, rows: [[chart.x_label.split(",")[0], number(x)], [chart.label.split(" against ")[0], number(y)]], mark })));
  const order = { failed: 0, pruned: 1, complete: 2, mllm: 3, default: 3, front: 4, best: 5 };
  for (const t of [...targets].sort((a, b) => order[a.mark] - order[b.mark])) svg.append(markNode(t.mark, t.x, t.y));
  for (const [, , name, mark] of others) lines.push([name, mark]);
  walkable(svg, targets.sort((a, b) => a.value - b.value));
  place.replaceChildren(svg, keysOf(presentMarks(chart.points.map(p => p[2]).concat(failed)), lines));
}

function drawRows(place, chart) {
  const width = Math.max(260, place.clientWidth), left = 10, right = width - 14, step = 38, top = 4;
  const height = top + chart.rows.length * step + (chart.x_label ? 40 : 24), bottom = top + chart.rows.length * step;
  const has = chart.rows.some(r => r.bar !== undefined || r.value !== undefined);
  const values = chart.rows.flatMap(r => (r.dots || []).map(d => d[0]).concat(r.bar ?? [], r.value ?? [], r.low ?? [], r.high ?? []));
  let ends = widened(has ? values.concat(0) : values, 0.05);
  if (chart.share) ends = [0, 1];
  const X = v => left + (right - left) * (v - ends[0]) / (ends[1] - ends[0]);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": `${chart.label}. Arrow keys move from entry to entry.` });
  axisX(svg, chart, roundTicks(ends[0], ends[1], width > 500 ? 8 : 4), X, left, right, bottom, height);
  svg.append(make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  if (ends[0] < 0 && ends[1] > 0) svg.append(make("line", { x1: X(0), x2: X(0), y1: top, y2: bottom, class: "zero" }));
  const targets = [], signed = v => (chart.share || v <= 0 ? "" : "+") + number(v, chart.share);
  chart.rows.forEach((row, i) => {
    const y = top + i * step + 26, own = row.bar ?? row.value, text = own === undefined ? row.name : `${row.name}: ${signed(own)}${row.verdict ? ", " + row.verdict : ""}`;
    svg.append(make("text", { x: left, y: y - 12, class: "row" }, cut(text, right - left)));
    if (row.bar !== undefined) svg.append(make("rect", { x: X(0), y: y - 6, width: Math.max(1, X(row.bar) - X(0)), height: 12, rx: 2, class: "mark", "data-name": row.name }));
    if (row.low !== undefined && row.low !== null) svg.append(make("line", { x1: X(row.low), x2: X(row.high), y1: y, y2: y, class: "interval" }));
    if (row.value !== undefined) svg.append(markNode("complete", X(row.value), y));
    for (const [value, n] of [...(row.dots || [])].sort((a, b) => (trialOf(a[1]).mark === "best") - (trialOf(b[1]).mark === "best"))) svg.append(markNode(trialOf(n).mark, X(value), y));
    for (const [value, n] of row.dots || []) targets.push({ x: X(value), y, title: trialTitle(trialOf(n)), rows: trialRows(trialOf(n)) });
    if (row.dots && !row.dots.length) svg.append(make("text", { x: left + 12, y: y + 4 }, "no complete trial"));
    if (own !== undefined) {
      const rows = [[row.bar === undefined ? "difference" : "share", signed(own)]];
      if (row.low !== undefined) rows.push(["95 % interval", row.low === null ? "not known: no items" : `${signed(row.low)} to ${signed(row.high)}`]);
      if (row.p !== undefined && row.p !== null) rows.push(["p", number(row.p)]);
      targets.push({ x: X(own), y, title: row.name, rows });
    }
  });
  walkable(svg, targets);
  place.replaceChildren(svg, keysOf(presentMarks(chart.rows.flatMap(r => (r.dots || []).map(d => d[1]))), []));
}
