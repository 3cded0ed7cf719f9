// The figures of one run after the other: while training, after it, before it, and routing.

const MOVEMENT = [
  ["relative_change", "relative change ‖ΔW‖/‖W‖", "How far the weight is from where it started, in Frobenius norms."],
  ["delta_d", "ΔD", "Mean turn of singular vectors paired by index (SORSA, Eq. 8–10). It jumps where close singular values change places."],
  ["delta_sigma", "ΔΣ", "Mean change of singular values (SORSA, Eq. 7)."],
  ["angle", "subspace angle, degrees", "Largest principal angle between the leading subspaces then and now; unlike ΔD it has no jumps."],
  ["condition", "condition number of W_p", "σ_max / σ_min of the trained product (SORSA, Theorem 5.5)."],
  ["orthonormality", "‖MᵀM − I‖ of U and V", "Mean over both factors of SORSA: what its regularizer keeps small."],
];

/** Columns that say of which run, layer and module a row is. */
const PLACE = [
  { title: "run", value: (row) => row.run, words: true },
  { title: "layer", value: (row) => LAYER[row.name].depth },
  { title: "module", value: (row) => LAYER[row.name].kind, words: true },
];

/** The names of a run's layers in a part of its files that are chosen above. */
const names = (layers) => layers.filter((name) => layerOn(name));
const having = (part) => runsOn().filter((run) => run[part]);
const anyHas = (part) => RUNS.some((run) => run[part]);
/** Choices of a run among those with a part; the one chosen may be switched off above, then nothing is drawn. */
const runChoice = (part) => ({ label: "run", options: RUNS.filter((run) => run[part]).map((run) => [run.name, run.name]) });
const chosenRun = (name) => runsOn().find((run) => run.name === name);

function during() {
  const logged = (key, title, label) => RUNS.some((run) => run.log[key]) && figure({
    id: key.replace("_", "-"), title, source: "SORSA, Figure 3",
    draw: (_, width) => {
      const series = runsOn().filter((run) => run.log[key]).map((run) => ({ name: run.name, style: run.mark,
        points: run.log.step.map((step, i) => ({ x: step, y: run.log[key][i] })).filter((point) => point.y !== null) }));
      return series.length ? chart({ label: `${title} by step of ${series.length} runs`, series, x: plain("step"), y: plain(label, { log: key === "grad_norm" }) }, width) : null;
    },
  });
  const measures = MOVEMENT.filter(([key]) => RUNS.some((run) => run.during?.values[key].some((row) => row.some((value) => value !== null))));
  section("While training", "Loss and gradient norm from the log; movement of the weights at the sampled steps, the mean over the modules and layers chosen above.",
    logged("loss", "Training loss", "loss"), logged("grad_norm", "Gradient norm", "gradient norm"),
    anyHas("during") && figure({
      id: "movement", title: "How far the weights moved",
      choices: { measure: { label: "measure", options: measures.map(([key, label]) => [key, label]) } },
      draw: ({ measure }, width) => {
        const [, label, note] = MOVEMENT.find(([key]) => key === measure);
        const series = lines((run, at) => run.during.steps.map((step, t) => ({ x: step, y: run.during.values[measure][t][at] })));
        return series.length ? { ...chart({ label: `${label} by step`, series, x: plain("step"), y: plain(label, { log: measure === "condition" }) }, width), note } : null;
      },
    }),
    anyHas("during") && figure({
      id: "delta", title: "ΔD against ΔΣ", source: "SORSA, Figure 2",
      note: "Each dot is a sampled step, on a path from the start.",
      draw: (_, width) => {
        const series = lines((run, at) => run.during.steps.map((step, t) => ({ x: run.during.values.delta_sigma[t][at], y: run.during.values.delta_d[t][at], text: `step ${step}` })));
        return series.length ? chart({ label: "ΔD against ΔΣ by step", series, x: plain("ΔΣ"), y: plain("ΔD") }, width) : null;
      },
    }));
}

/** A line a run, the mean over the chosen layers; with "draw every layer" also a thin line for each of them. */
function lines(points) {
  return having("during").flatMap((run) => {
    const chosen = names(run.during.layers).map((name) => [name, points(run, run.during.layers.indexOf(name))]);
    if (!chosen.length) return [];
    const middle = chosen[0][1].map((first, t) => ({ ...first, x: mean(chosen.map(([, path]) => path[t].x)), y: mean(chosen.map(([, path]) => path[t].y)) }));
    const thin = state.each ? chosen.map(([name, path]) => ({ name: `${run.name} ${name}`, style: run.mark, thin: true, points: path })) : [];
    return middle.some((point) => point.y !== null) ? [...thin, { name: run.name, style: run.mark, points: middle }] : [];
  });
}

function after() {
  if (!anyHas("after")) return;
  const measures = [...MOVEMENT.slice(0, 4), ["stable_rank", "stable rank of ΔW"], ["effective_rank", "effective rank of ΔW"]];
  const read = (layer, key) => (key in layer ? layer[key] : layer.delta[key]);
  const overLayers = (run, value) => mean(names(Object.keys(run.after.layers)).map((name) => value(run.after.layers[name])));
  const longest = (pick) => Math.max(0, ...having("after").flatMap((run) => Object.values(run.after.layers).map((layer) => pick(layer))));
  const table = sortable("layers-table", "Every layer and how it changed",
    [...PLACE, ...[...measures, ["condition", "κ of W_p"]].map(([key, title]) => ({ title: title.replace(" ‖ΔW‖/‖W‖", "").replace("subspace angle, degrees", "angle°").replace(" of ΔW", ""), value: (row) => read(row.layer, key) }))],
    () => having("after").flatMap((run) => names(Object.keys(run.after.layers)).map((name) => ({ name, run: run.name, mark: run.mark, layer: run.after.layers[name] }))), 3, true);
  section("After training", "The change ΔW of each layer, against the base model's own weight.",
    figure({
      id: "moved", title: "Which layers moved", wide: true,
      choices: { run: runChoice("after"), measure: { label: "measure", options: measures.map(([key, label]) => [key, label]) } },
      draw: ({ run: name, measure }, width) => {
        const run = chosenRun(name), chosen = run ? names(Object.keys(run.after.layers)) : [];
        if (!chosen.length) return null;
        const title = measures.find(([key]) => key === measure)[1];
        return byDepth(chosen, title, `${title} of ${name} by layer and module`, (layer) => read(run.after.layers[layer], measure), width);
      },
    }),
    figure({
      id: "energy", title: "Where the change lies in the base weight",
      note: "Share of ‖ΔW‖² in the span of the base's leading singular directions, the mean over left and right; dotted: a change without preference.",
      draw: (_, width) => {
        const series = having("after").flatMap((run) => {
          const layers = names(Object.keys(run.after.layers)).map((name) => run.after.layers[name]).filter((layer) => layer.energy);
          const counts = [...new Set(layers.flatMap((layer) => layer.energy.count))].sort((a, b) => a - b);
          // Beyond its last direction a small layer keeps the share it has there.
          const at = (count, value) => mean(layers.map((layer) => value(layer, layer.energy.count.findLastIndex((known) => known <= count))));
          return counts.length ? [
            { name: run.name, style: run.mark, points: counts.map((count) => ({ x: count, y: at(count, (layer, i) => (layer.energy.left[i] + layer.energy.right[i]) / 2) })) },
            { name: `${run.name}, no preference`, thin: true, style: { colour: `var(--c${run.mark % 8})`, dash: "1 3" },
              points: counts.map((count) => ({ x: count, y: at(count, (layer, i) => layer.energy.count[i] * (1 / layer.out + 1 / layer.in) / 2) })) },
          ] : [];
        });
        return series.length ? chart({ label: "Share of the change's energy by leading directions of the base", series, x: plain("leading singular directions of the base", { log: true }), y: { label: "share of ‖ΔW‖²", text: percent, tick: (value) => `${Math.round(100 * value)} %` } }, width) : null;
      },
    }),
    figure({
      id: "change-spectrum", title: "Spectrum of the change", note: "Singular values of ΔW over their sum, the mean over the layers chosen above.",
      draw: (_, width) => {
        const count = longest((layer) => layer.delta.values.length);
        const series = having("after").map((run) => ({ name: run.name, style: run.mark,
          points: Array.from({ length: count }, (_, i) => ({ x: i + 1, y: overLayers(run, (layer) => (layer.delta.sum ? (layer.delta.values[i] ?? 0) / layer.delta.sum : null)) })).filter((p) => p.y) }));
        return series.some((one) => one.points.length) ? chart({ label: "Singular values of the change", series, x: plain("index"), y: plain("σ_i / Σσ", { log: true }) }, width) : null;
      },
    }),
    table);
}

/** A heat map with a row for each kind of module and a column for each layer of the model. */
function byDepth(chosen, measure, label, value, width, text = shown) {
  const kinds = KINDS.filter((kind) => chosen.some((name) => LAYER[name].kind === kind));
  const depths = [...new Set(chosen.map((name) => LAYER[name].depth))].sort((a, b) => a - b);
  const at = Object.fromEntries(chosen.map((name) => [`${LAYER[name].kind} ${LAYER[name].depth}`, name]));
  return heatmap({ label, measure, rows: kinds, columns: depths.map(String), rowLabel: "module", columnLabel: "layer", text, least: 0,
    value: (i, j) => { const name = at[`${kinds[i]} ${depths[j]}`]; return name ? value(name) : null; } }, width);
}

function before() {
  if (!anyHas("before")) return;
  const run = () => having("before")[0];
  const thresholds = RUNS.find((one) => one.before).before.thresholds;
  const kindChoice = { label: "module", options: [...KINDS.map((kind) => [kind, kind]), ["", "mean of those chosen above"]] };
  const shade = (i, count) => ({ colour: `rgb(${heat(0.25 + (0.75 * i) / Math.max(1, count - 1))})` });
  const byLayer = (one, value) => {
    const chosen = names(Object.keys(one.before.layers));
    return [...new Set(chosen.map((name) => LAYER[name].depth))].sort((a, b) => a - b).map((depth) => ({ x: depth, y: value(chosen.filter((name) => LAYER[name].depth === depth)) }));
  };
  section("Before training", "What the base weights' singular values alone say; the same for all runs on one base, so the first run switched on above is shown.",
    figure({
      id: "ranks", title: "Rank k by layer at thresholds", source: "SARA, Figures 2 and 8", choices: { kind: kindChoice },
      note: "The least k whose leading singular values hold the threshold's share of their sum.",
      draw: ({ kind }, width) => {
        const one = run();
        const series = one ? thresholds.map((threshold, t) => ({ name: `θ = ${threshold}`, style: shade(t, thresholds.length),
          points: byLayer(one, (layers) => mean(layers.filter((name) => !kind || LAYER[name].kind === kind).map((name) => one.before.layers[name].k[t]))).filter((p) => p.y !== null) })).reverse() : [];
        return series.some((each) => each.points.length) ? chart({ label: "Rank at thresholds by layer", series, x: plain("layer"), y: plain("rank k", { zero: true }) }, width) : null;
      },
    }),
    figure({
      id: "spectra", title: "Singular values", choices: { kind: { label: "module", options: KINDS.map((kind) => [kind, kind]) } },
      note: "One line a layer, darker (in the dark theme lighter) the deeper.",
      draw: ({ kind }, width) => {
        const one = run();
        const chosen = one ? names(Object.keys(one.before.layers)).filter((name) => LAYER[name].kind === kind) : [];
        const series = chosen.map((name, i) => ({ name: `layer ${LAYER[name].depth}`, style: shade(i, chosen.length), thin: chosen.length > 12,
          points: one.before.layers[name].values.map(([x, y]) => ({ x, y })) }));
        return series.length ? chart({ label: `Singular values of ${kind}`, series, x: plain("index", { log: true }), y: plain("σ", { log: true }) }, width) : null;
      },
    }),
    figure({
      id: "budget", title: "How a threshold spends SARA's parameters", wide: true,
      choices: { threshold: { label: "threshold θ", options: [...thresholds.keys()].map((t) => [String(t), String(thresholds[t])]) } },
      note: "k (in + out + 1) of each module, as a share of all modules chosen above.",
      draw: ({ threshold }, width) => {
        const one = run(), chosen = one ? names(Object.keys(one.before.layers)) : [];
        if (!chosen.length) return null;
        const cost = (name) => { const layer = one.before.layers[name]; return layer.k[threshold] * (layer.in + layer.out + 1); };
        const total = chosen.reduce((sum, name) => sum + cost(name), 0);
        const drawn = byDepth(chosen, "share of all", "Share of SARA's parameters by layer and module", (name) => cost(name) / total, width, (value) => `${(100 * value).toPrecision(3)} %`);
        return { ...drawn, note: `k (in + out + 1) of each module, as a share of the ${shown(total)} parameters of those chosen above.` };
      },
    }));
}

function routed() {
  if (!anyHas("routing")) return;
  const tasks = [...new Set(RUNS.flatMap((run) => (run.routing ? Object.keys(run.routing.tasks) : [])))];
  const kinds = KINDS.filter((kind) => RUNS.some((run) => run.routing && Object.values(run.routing.tasks).some((task) => Object.keys(task.layers).some((name) => LAYER[name].kind === kind))));
  const rows = () => having("routing").flatMap((run) => Object.entries(run.routing.tasks).flatMap(([task, found]) =>
    names(Object.keys(found.layers)).map((name) => ({ run: run.name, mark: run.mark, task, name, ...found.layers[name] }))));
  const table = sortable("routing-table", "Entropy and dominating head of every router", [...PLACE, { title: "task", value: (row) => row.task, words: true },
    { title: "dominating head", value: (row) => row.dominant + 1 }, { title: "its mean gate", value: (row) => row.gate[row.dominant], text: percent },
    { title: "tokens it leads", value: (row) => row.share, text: percent }, { title: "entropy (1: even)", value: (row) => row.entropy }], rows, 7);
  section("Routing", "How Mo-SARA's router mixes its heads: the gate of each head, averaged over the tokens of some prompts of each task.",
    figure({
      id: "routing", title: "Mean gate by layer and head", source: "SARA, Figure 7 and Appendix D", wide: true,
      choices: { run: runChoice("routing"), task: { label: "task", options: tasks.map((task) => [task, task]) }, kind: { label: "module", options: kinds.map((kind) => [kind, kind]) } },
      draw: ({ run: name, task, kind }, width) => {
        const run = chosenRun(name), found = run && run.routing.tasks[task];
        const chosen = found ? names(Object.keys(found.layers)).filter((each) => LAYER[each].kind === kind) : [];
        if (!chosen.length) return null;
        const drawn = heatmap({ label: `Mean gate of ${name} on ${task}, ${kind}`, measure: "mean gate", rowLabel: "layer", columnLabel: "head", least: 0,
          rows: chosen.map((each) => String(LAYER[each].depth)), columns: Array.from({ length: run.routing.heads }, (_, i) => String(i + 1)), text: (value) => value.toFixed(3),
          value: (i, j) => found.layers[chosen[i]].gate[j], more: (i) => `entropy ${shown(found.layers[chosen[i]].entropy)} of 1` }, width);
        return { ...drawn, note: `${found.items} prompts, ${shown(found.tokens)} tokens. Layers from top to bottom, heads from left to right.` };
      },
    }), table);
}
