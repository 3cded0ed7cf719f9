// What stands around a drawing: the frame with its key, numbers and files; and tables that sort.

/**
 * A figure that draws itself anew. spec: {id, title, source, note, wide, choices: {name: {label, options: [[value, text]]}},
 * draw(chosen, width) → {svg, rows, keys, note} or null where there is nothing to show, empty: what is said then}
 */
function figure(spec) {
  const chosen = {};
  const choices = el("div", { class: "choices" });
  for (const [name, { label, options }] of Object.entries(spec.choices || {})) {
    chosen[name] = options[0][0];
    if (options.length < 2) continue;
    choices.append(el("label", {}, label, el("select", { name, change: (event) => { chosen[name] = event.target.value; draw(); } },
      options.map(([value, text]) => el("option", { value }, text)))));
  }
  const body = el("div"), note = el("p", { class: "note" }, spec.note || ""), keys = el("ul", { class: "keys" });
  const numbers = el("details", { toggle: () => fill() }, el("summary", {}, "Numbers"));
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Numbers of ${spec.title}` });
  numbers.append(table);
  const tools = el("div", { class: "tools" },
    el("button", { type: "button", click: () => drawn && save(`${spec.id}.svg`, standalone(drawn.svg), "image/svg+xml") }, "Save SVG"),
    el("button", { type: "button", click: () => drawn && save(`${spec.id}.csv`, csv(drawn.rows), "text/csv") }, "Save CSV"), numbers);
  const node = el("figure", { id: spec.id, class: spec.wide ? "wide" : null },
    el("figcaption", {}, el("strong", {}, spec.title), spec.source ? el("small", {}, `the paper's: ${spec.source}`) : null),
    choices.childElementCount ? choices : null, body, keys, note, tools);
  let drawn = null;
  const fill = () => {
    if (numbers.open && drawn) table.replaceChildren(plainTable(drawn.rows));
  };
  const draw = () => {
    drawn = spec.draw(chosen, Math.max(280, Math.round(body.clientWidth || 520)));
    body.replaceChildren(drawn ? drawn.svg : el("p", { class: "empty" }, spec.empty || "Nothing is chosen above."));
    keys.replaceChildren(...(drawn ? drawn.keys : []).map((one) => el("li", {}, sample(one.style), one.name)));
    note.textContent = (drawn && drawn.note) || spec.note || "";
    tools.hidden = !drawn;
    fill();
  };
  return { node, draw };
}

/** A short piece of a line, as the key of a series. */
function sample(style) {
  const paint = paintOf(style);
  return el("svg:svg", { class: "key", viewBox: "0 0 28 12", "aria-hidden": "true" },
    el("svg:path", { d: "M0,6H28", "stroke-dasharray": paint.dash, style: `stroke: ${paint.colour}; stroke-width: 2.5` }),
    el("svg:path", { d: paint.mark(14, 6, 4), style: `fill: ${paint.colour}` }));
}

function plainTable(rows) {
  const some = rows.slice(0, 2001);
  const kept = some[0].map((_, i) => some.slice(1).some((row) => row[i] !== null && row[i] !== undefined && row[i] !== ""));
  const cells = (row, tag) => row.map((value, i) => (kept[i] ? el(tag, tag === "th" ? { scope: "col" } : {}, shown(value)) : null));
  const table = el("table", {}, el("thead", {}, el("tr", {}, cells(some[0], "th"))), el("tbody", {}, some.slice(1).map((row) => el("tr", {}, cells(row, "td")))));
  return rows.length > some.length ? [table, el("p", {}, `${rows.length - some.length} more rows are in the CSV.`)].reduce((box, part) => (box.append(part), box), el("div")) : table;
}

/**
 * A table whose columns sort. columns: [{title, value(row), text(value), words}]; rows() gives the rows now.
 * A row may bring `mark`, the style whose key stands in its first cell.
 */
function sortable(id, caption, columns, rows, by = 0, down = false) {
  const body = el("tbody");
  const heads = columns.map((column, i) => {
    const button = el("button", { type: "button", click: () => { down = by === i ? !down : !column.words; by = i; draw(); } });
    return { button, cell: el("th", { scope: "col", class: column.words ? "words" : null }, button) };
  });
  const table = el("table", { id }, el("caption", { class: "unseen" }, caption), el("thead", {}, el("tr", {}, heads.map((head) => head.cell))), body);
  const draw = () => {
    heads.forEach(({ button, cell }, i) => {
      button.textContent = columns[i].title + (by === i ? (down ? " ▾" : " ▴") : "");
      if (by === i) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const missing = (value) => value === null || value === undefined;
    const order = rows().map((row) => [columns[by].value(row), row]).sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true })) * (down ? -1 : 1);
    });
    body.replaceChildren(...order.map(([, row]) => el("tr", {}, columns.map((column, i) => {
      const text = (column.text || shown)(column.value(row), row);
      return el("td", { class: column.words ? "words" : null }, i === 0 && row.mark !== undefined ? [sample(row.mark), " "] : null, text);
    }))));
  };
  return { node: el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table), draw };
}
