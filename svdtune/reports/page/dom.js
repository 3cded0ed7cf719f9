// Small helpers: elements, numbers as text, and saving what is seen as a file.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `attributes` as they are, functions as listeners, `children` as nodes or text (never as markup). */
function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number as a person reads it: four significant digits, thousands set apart, powers of ten only where they must be. */
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-4 || size >= 1e12)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 4 });
}

/** A share in percent, to a tenth; a half goes to the even one, as in the page's sentences. */
function tenths(share) {
  const near = Math.round(1000 * share);
  const half = near - 1000 * share === 0.5;
  return ((half && near % 2 ? near - 1 : near) / 10).toFixed(1);
}

const percent = (value) => (value === null || value === undefined ? "–" : `${tenths(value)} %`);

/** A number for an axis: short. */
function tickText(value) {
  const size = Math.abs(value);
  if (value !== 0 && size < 1e-3) return value.toExponential(0);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(4));
}

/** Hand a text to the reader as a file. */
function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Rows of cells as CSV; a text that a spreadsheet would run as a formula is quoted with an apostrophe. */
function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",") + "\n").join("");
}

/** An SVG of the page as a file of its own: the page's style sheet is not there, so colours and fonts are written out. */
function standalone(svg) {
  const copy = svg.cloneNode(true);
  const originals = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((node, i) => {
    const style = getComputedStyle(originals[i]);
    for (const name of ["fill", "stroke", "font-size", "font-family"]) node.style.setProperty(name, style.getPropertyValue(name));
  });
  copy.setAttribute("xmlns", SVG);
  copy.querySelectorAll(".picked").forEach((node) => node.remove());
  copy.prepend(el("svg:rect", { width: "100%", height: "100%", style: `fill: ${colour("--paper")}` }));
  return new XMLSerializer().serializeToString(copy);
}

/** The value of a colour of the theme. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A colour between the heat scale's ends, for a share in [0, 1]. */
function heat(share) {
  const parts = (name) => colour(name).match(/[\da-f]{2}/gi).map((part) => parseInt(part, 16));
  const [low, high] = [parts("--heat-low"), parts("--heat-high")];
  return low.map((part, i) => Math.round(part + (high[i] - part) * share));
}

/** Black or white, whichever reads better on a colour [r, g, b]. */
function inkOn(rgb) {
  const [r, g, b] = rgb.map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

const tip = {
  show(text, x, y) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
    box.style.top = `${y - height - 12 < 4 ? y + 16 : y - height - 12}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
  say(text) { document.getElementById("said").textContent = text; },
};
