// The page: what is chosen above (runs, modules, layers), and the sections that follow it.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map((run, mark) => ({ ...run, mark }));
const KINDS = [...new Set(DATA.layers.map((layer) => layer.kind))];
const DEPTHS = DATA.layers.map((layer) => layer.depth);
const LAYER = Object.fromEntries(DATA.layers.map((layer) => [layer.name, layer]));
const state = { off: new Set(), kinds: new Set(KINDS), from: Math.min(...DEPTHS, 0), to: Math.max(...DEPTHS, 0), each: false };
const drawings = [];

const runsOn = () => RUNS.filter((run) => !state.off.has(run.name));
const layerOn = (name) => {
  const layer = LAYER[name];
  return state.kinds.has(layer.kind) && layer.depth >= state.from && layer.depth <= state.to;
};
const redraw = () => drawings.forEach((one) => one.draw());
const mean = (values) => {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};
const plain = (label, more = {}) => ({ label, text: shown, ...more });

function section(title, lead, ...parts) {
  const kept = parts.filter((part) => part);
  if (!kept.length) return;
  const id = `part-${title.toLowerCase().replaceAll(" ", "-")}`;
  const figures = el("div", { class: "figures" }, kept.filter((part) => part.node.tagName === "FIGURE").map((part) => part.node));
  document.getElementById("sections").append(el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title),
    el("p", { class: "soft" }, lead), figures, kept.filter((part) => part.node.tagName !== "FIGURE").map((part) => part.node)));
  drawings.push(...kept);
}

function controls() {
  const box = document.getElementById("controls");
  const check = (text, mark, on, change) => el("label", {}, el("input", { type: "checkbox", checked: on, change }), mark === null ? null : sample(mark), text);
  const flip = (set, value, on) => { on ? set.add(value) : set.delete(value); redraw(); };
  box.append(el("fieldset", { id: "runs" }, el("legend", {}, "Runs"),
    RUNS.map((run) => check(run.name, run.mark, true, (event) => flip(state.off, run.name, !event.target.checked)))));
  if (!DATA.layers.length) return;
  box.append(el("fieldset", { id: "kinds" }, el("legend", {}, "Modules"),
    KINDS.map((kind) => check(kind, null, true, (event) => flip(state.kinds, kind, event.target.checked)))));
  const limit = (end, text) => el("label", {}, text, el("input", { type: "number", id: end, min: state.from, max: state.to, value: state[end],
    change: (event) => { state[end] = event.target.value === "" ? state[end] : Number(event.target.value); redraw(); } }));
  box.append(el("fieldset", { id: "depths" }, el("legend", {}, "Layers"), limit("from", "from"), limit("to", "to"),
    check("draw every layer", null, false, (event) => { state.each = event.target.checked; redraw(); })));
  if (matchMedia("(max-width: 40rem)").matches) box.open = false;
}

function result() {
  const box = document.getElementById("result");
  const labels = [...new Set(RUNS.flatMap((run) => Object.keys(run.scores)))].sort((a, b) => b.startsWith("average") - a.startsWith("average"));
  box.append(el("p", { class: "lead" }, DATA.headline));
  const scored = (score) => (score ? `${percent(score.value)}${score.low === null ? "" : `\n(${tenths(score.low)}–${tenths(score.high)})`}` : "–");
  const metric = (score) => (score ? shown(score.value) : "–");
  const columns = [
    { title: "run", value: (run) => run.name, words: true },
    { title: "method", value: (run) => run.title, words: true },
    ...labels.map((label) => {
      const share = label.endsWith(")") || label.includes("pass@");
      return { title: label, value: (run) => run.scores[label]?.value, text: (_, run) => (share ? scored : metric)(run.scores[label]) };
    }),
    { title: "trained parameters", value: (run) => run.summary.trained_parameters },
    { title: "of all", value: (run) => run.summary.share, text: (value) => (value ? `${(100 * value).toPrecision(3)} %` : "–") },
    { title: "mean loss", value: (run) => run.summary.loss },
    { title: "training time, s", value: (run) => run.summary.train_seconds },
  ].filter((column) => RUNS.some((run) => column.value(run) !== null && column.value(run) !== undefined));
  const table = sortable("runs-table", "Runs and their results", columns, runsOn, labels.length ? 2 : 0, labels.length > 0);
  box.append(table.node);
  if (labels.length) box.append(el("p", { class: "soft" }, "Shares in percent with their 95 % intervals in brackets."));
  drawings.push(table);
}

function comparing() {
  const by = [...new Set(DATA.comparisons.map((one) => one.by))];
  section("Comparisons", "Each point is a run, each bar a 95 % interval.", ...by.map((setting) => {
    const found = DATA.comparisons.filter((one) => one.by === setting), first = found[0];
    return figure({
      id: `by-${setting}`, title: first.title, source: first.source,
      choices: { score: { label: "score", options: found.map((one) => [one.score, one.score]) } },
      draw: ({ score }, width) => {
        const one = found.find((each) => each.score === score);
        const points = one.points.filter((point) => !state.off.has(point.run));
        if (!points.length) return null;
        const share = score.endsWith(")") || score.includes("pass@");
        const series = RUNS.filter((run) => points.some((p) => p.run === run.name)).map((run) => ({
          name: run.name, style: run.mark, points: points.filter((p) => p.run === run.name).map((p) => ({ ...p, text: `${run.title}, ${p.label}` })),
        }));
        const xs = Object.fromEntries(points.map((p) => [p.x, p.label]));
        const named = setting !== "parameters";
        return chart({
          label: `${first.title}: ${score} of ${series.length} runs`, joined: false, series,
          x: { label: first.axis, log: !named, text: (value) => (named ? xs[value] : shown(value)), ticks: named ? Object.keys(xs).map(Number).sort((a, b) => a - b) : null, tick: named ? (value) => xs[value] : null },
          y: { label: score, text: share ? percent : shown, tick: share ? (value) => `${+(100 * value).toFixed(1)} %` : null },
        }, width);
      },
    });
  }));
}

function missing() {
  const lacking = RUNS.filter((run) => run.missing.length);
  if (!lacking.length) return;
  document.getElementById("sections").append(el("section", { id: "missing", "aria-labelledby": "missing-title", class: "missing" },
    el("h2", { id: "missing-title" }, "Not here"), el("p", { class: "soft" }, "What these runs have no files for, and what would make them."),
    el("ul", {}, lacking.map((run) => el("li", {}, el("strong", {}, run.name), `: ${run.missing.join("; ")}`)))));
}

/** Follow the theme that is chosen, or the system's; draw anew where colours or the width change. */
function theme() {
  const choose = document.getElementById("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = choose.value || (system.matches ? "dark" : "light");
    redraw();
  };
  let waiting = 0, before = innerWidth;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (innerWidth !== before) { before = innerWidth; redraw(); } }, 150);
  });
  choose.addEventListener("change", apply);
  system.addEventListener("change", apply);
  apply();
}

controls();
result();
comparing();
during();
after();
before();
routed();
missing();
document.getElementById("footer").textContent = DATA.footer;
theme();
