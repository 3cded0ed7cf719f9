// Lines and points, and heat maps, as SVG: hover or arrow keys for values, a table of the numbers, files to save.

const HEIGHT = 300, EDGE = { left: 58, right: 14, top: 12, bottom: 44 };
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 3", "6 2 1 2"];

/** Round numbers from `low` to `high`, about `count`, whole ones for what is counted; powers of ten (or 1, 2, 5 of them) on a
 * logarithmic axis. */
function ticksOf(low, high, log, whole, count = 6) {
  const found = [];
  if (log) {
    const steps = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(Math.log10(high / low) / 8));
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every)
      for (const step of steps) if (step * 10 ** power >= low * 0.999 && step * 10 ** power <= high * 1.001) found.push(step * 10 ** power);
    return found;
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(whole ? 1 : 0, unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough));
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(+at.toPrecision(12));
  return found;
}

/** A scale from values to pixels; a logarithmic one leaves values that are not positive out. */
function scaleOf(values, from, to, axis) {
  const log = axis.log && values.some((value) => value > 0);
  const usable = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  let low = Math.min(...usable), high = Math.max(...usable);
  if (axis.zero && !log) low = Math.min(0, low);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  else if (log && axis.loose) [low, high] = [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
  else if (!log && !axis.tight) {
    const room = (high - low) / 20;
    [low, high] = [low === 0 && !axis.loose ? 0 : low - room, high + room];
  }
  const forward = log ? Math.log10 : (value) => value;
  const place = (value) => from + ((forward(value) - forward(low)) / (forward(high) - forward(low))) * (to - from);
  return { place, ticks: axis.ticks || ticksOf(low, high, log, usable.every(Number.isInteger)), drawable: (value) => Number.isFinite(value) && (!log || value > 0) };
}

const MARKS = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x},${y - r * 1.3}L${x + r * 1.2},${y + r}H${x - r * 1.2}Z`,
  (x, y, r) => `M${x},${y - r * 1.4}L${x + r * 1.4},${y}L${x},${y + r * 1.4}L${x - r * 1.4},${y}Z`,
];

/**
 * Lines or points, `width` pixels wide.
 * spec: {x: axis, y: axis, series: [{name, style, thin, points: [{x, y, low, high, text}]}], joined}
 * axis: {label, log, zero, text}; style: a number that chooses colour, dash and mark, or {colour}.
 */
function chart(spec, width) {
  const series = spec.series.map((one) => ({ ...one, points: one.points.filter((p) => p.y !== null && p.y !== undefined) }));
  const all = series.flatMap((one) => one.points);
  const ends = all.flatMap((p) => [p.y, p.low, p.high]).filter((value) => value !== null && value !== undefined);
  const ys = scaleOf(ends, HEIGHT - EDGE.bottom, EDGE.top, spec.y);
  // the label beside the axis keeps clear of the widest number
  const left = Math.max(EDGE.left, 30 + 7 * Math.max(...ys.ticks.map((tick) => (spec.y.tick || tickText)(tick).length)));
  const xs = scaleOf(all.map((p) => p.x), left, width - EDGE.right, { tight: spec.joined !== false, loose: spec.joined === false, ...spec.x });
  const svg = el("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": spec.label });
  axes(svg, spec, xs, ys, left, width - EDGE.right);
  const spots = [];
  for (const one of series) {
    const points = one.points.filter((p) => xs.drawable(p.x) && ys.drawable(p.y));
    const paint = paintOf(one.style), at = points.map((p) => [xs.place(p.x), ys.place(p.y)]);
    if (spec.joined !== false && at.length)
      svg.append(el("svg:path", { d: "M" + at.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L"), "stroke-dasharray": paint.dash,
        style: `fill: none; stroke: ${paint.colour}; stroke-width: ${one.thin ? 0.8 : 2}; opacity: ${one.thin ? 0.55 : 1}` }));
    points.forEach((p, i) => {
      const [x, y] = at[i];
      if (p.low !== null && p.low !== undefined)
        svg.append(el("svg:path", { d: `M${x},${ys.place(p.low)}V${ys.place(p.high)}`, style: `stroke: ${paint.colour}; stroke-width: 1.5` }));
      if (!one.thin && points.length <= 60) svg.append(el("svg:path", { d: paint.mark(x, y, spec.joined === false ? 5 : 2.6), style: `fill: ${paint.colour}` }));
      const spread = p.low === null || p.low === undefined ? "" : `, 95 % ${spec.y.text(p.low)} to ${spec.y.text(p.high)}`;
      spots.push({ x, y, text: `${one.name}${p.text ? ` · ${p.text}` : ""}\n${spec.x.label}: ${spec.x.text(p.x)}\n${spec.y.label}: ${spec.y.text(p.y)}${spread}` });
    });
  }
  explore(svg, spots);
  const rows = [["series", spec.x.label, spec.y.label, "low", "high", "note"]];
  for (const one of series) for (const p of one.points) rows.push([one.name, p.x, p.y, p.low, p.high, p.text]);
  return { svg, rows, keys: series.filter((one) => !one.thin) };
}

function paintOf(style) {
  if (typeof style === "object") return { colour: style.colour, dash: style.dash || "", mark: MARKS[0] };
  return { colour: `var(--c${style % 8})`, dash: DASHES[style % 8], mark: MARKS[style % 4] };
}

function axes(svg, spec, xs, ys, left, right) {
  const bottom = HEIGHT - EDGE.bottom;
  for (const tick of ys.ticks) {
    const y = ys.place(tick);
    if (y > bottom + 1 || y < EDGE.top - 1) continue;
    svg.append(el("svg:line", { class: "grid", x1: left, x2: right, y1: y, y2: y }));
    svg.append(el("svg:text", { x: left - 6, y: y + 4, "text-anchor": "end" }, (spec.y.tick || tickText)(tick)));
  }
  let last = -1e9;
  for (const tick of xs.ticks) {
    const x = xs.place(tick), text = (spec.x.tick || tickText)(tick);
    if (x > right + 1 || x < left - 1) continue;
    svg.append(el("svg:line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
    if (x - last < text.length * 7 + 6) continue;
    last = x;
    svg.append(el("svg:text", { x, y: bottom + 17, "text-anchor": "middle" }, text));
  }
  svg.append(el("svg:line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(el("svg:text", { x: (left + right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, spec.x.label));
  svg.append(el("svg:text", { transform: `translate(13 ${(EDGE.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, spec.y.label));
}

/** A heat map, `width` pixels wide. spec: {rows, columns (names), value(row, column) → number or null, text, rowLabel, columnLabel, least} */
function heatmap(spec, width) {
  const side = 8 + 7 * Math.max(...spec.rows.map((row) => row.length), 4), top = 6;
  const cell = (width - side - 6) / spec.columns.length;
  const tall = Math.min(26, Math.max(17, 340 / spec.rows.length)), height = top + tall * spec.rows.length + 40;
  const values = spec.rows.flatMap((row, i) => spec.columns.map((_, j) => spec.value(i, j)));
  const known = values.filter((value) => value !== null && value !== undefined);
  const low = spec.least ?? Math.min(...known), high = Math.max(...known);
  const svg = el("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": spec.label });
  const spots = [], rows = [[spec.rowLabel, spec.columnLabel, spec.measure]];
  spec.rows.forEach((row, i) => {
    svg.append(el("svg:text", { x: side - 5, y: top + tall * (i + 0.5) + 4, "text-anchor": "end" }, row));
    spec.columns.forEach((column, j) => {
      const value = spec.value(i, j);
      if (value === null || value === undefined) return;
      const x = side + cell * j, y = top + tall * i, rgb = heat(high > low ? (value - low) / (high - low) : 0);
      svg.append(el("svg:rect", { x: x + 0.5, y: y + 0.5, width: Math.max(1, cell - 1), height: tall - 1, style: `fill: rgb(${rgb})` }));
      if (cell > 7 * spec.text(value).length + 4) svg.append(el("svg:text", { x: x + cell / 2, y: y + tall / 2 + 4, "text-anchor": "middle", style: `fill: ${inkOn(rgb)}` }, spec.text(value)));
      spots.push({ x: x + cell / 2, y: y + tall / 2, text: `${spec.rowLabel} ${row}, ${spec.columnLabel} ${column}\n${spec.measure}: ${spec.text(value)}${spec.more ? `\n${spec.more(i, j)}` : ""}` });
      rows.push([row, column, value]);
    });
  });
  const every = Math.ceil(22 / cell);
  spec.columns.forEach((column, j) => {
    if (j % every === 0) svg.append(el("svg:text", { x: side + cell * (j + 0.5), y: top + tall * spec.rows.length + 15, "text-anchor": "middle" }, column));
  });
  svg.append(el("svg:text", { x: (side + width) / 2, y: height - 6, "text-anchor": "middle" }, spec.columnLabel));
  explore(svg, spots);
  return { svg, rows, keys: [] };
}

/** Show the value of the spot nearest to the pointer, or of the one that arrow keys reach. */
function explore(svg, spots) {
  const ring = el("svg:circle", { class: "picked", r: 6, visibility: "hidden" });
  svg.append(ring);
  let at = -1;
  const pick = (i, speak) => {
    if (!spots.length) return;
    at = (i + spots.length) % spots.length;
    const spot = spots[at], box = svg.getBoundingClientRect(), factor = box.width / svg.viewBox.baseVal.width;
    ring.setAttribute("cx", spot.x);
    ring.setAttribute("cy", spot.y);
    ring.setAttribute("visibility", "visible");
    tip.show(spot.text, box.left + spot.x * factor, box.top + spot.y * factor);
    if (speak) tip.say(spot.text.replaceAll("\n", ", "));
  };
  const leave = () => { ring.setAttribute("visibility", "hidden"); tip.hide(); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), factor = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * factor, y = (event.clientY - box.top) * factor;
    let best = -1, least = 60 ** 2;
    spots.forEach((spot, i) => {
      const distance = (spot.x - x) ** 2 + (spot.y - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    if (best >= 0) pick(best, false);
    else leave();
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (event.key === "Home") { event.preventDefault(); pick(0, true); }
    if (event.key === "End") { event.preventDefault(); pick(spots.length - 1, true); }
    if (step) { event.preventDefault(); pick(at < 0 ? (step > 0 ? 0 : -1) : at + step, true); }
  });
}
