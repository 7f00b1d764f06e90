// Inside a picture: its codes, how much each surprised the model, and which words each attended to.
import {at, facts, make} from "./dom.js";
import {post} from "./server.js";

const known = new Map();
let look = null, asked = 0, cell = null, word = null;
const mode = () => document.querySelector("[name=lay]:checked").value;

export function start() {
  for (const radio of document.querySelectorAll("[name=lay]")) radio.addEventListener("change", paint);
  at("layer").addEventListener("change", paint);
  at("cells").addEventListener("keydown", event => {
    if (!look) return;
    const n = look.codes.length, here = cell ?? 0;
    const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -n, ArrowDown: n}[event.key];
    const to = here + (by ?? 0);
    if (!by || to < 0 || to >= n * n) return;
    event.preventDefault();
    event.stopPropagation();
    choose(to, true);
  });
}

export function leave() {
  asked += 1;
  look = null;
  at("frame").classList.remove("dimmed");
  at("cells").hidden = true;
  at("cells").replaceChildren();
}

export async function show(picture) {
  leave();
  const mine = asked;
  cell = word = null;
  at("look-note").textContent = "Looking …";
  at("caption").replaceChildren();
  at("cell-words").textContent = "";
  at("look-facts").replaceChildren();
  let found = known.get(picture.id);
  try {
    found ??= await post("/studio/look", {picture: picture.id});
  } catch (error) {
    if (mine === asked) at("look-note").textContent = error.message;
    return;
  }
  known.set(picture.id, found);
  if (mine !== asked) return;
  look = found;
  const n = look.codes.length, bits = look.bits.flat();
  at("layer").replaceChildren(make("option", {value: "all", text: "all"}), ...look.attention.map((_, i) => make("option", {value: i, text: String(i + 1)})));
  at("cells").style.setProperty("--n", n);
  at("cells").setAttribute("role", "grid");
  at("cells").setAttribute("aria-label", `Codes, ${n} rows of ${n}`);
  at("cells").replaceChildren(...Array.from({length: n}, (_, row) => make("div", {role: "row"},
    ...Array.from({length: n}, (_, column) => {
      const i = row * n + column;
      return make("div", {role: "gridcell", tabindex: i ? -1 : 0, "data-cell": i, onclick: () => choose(i, true), onpointerenter: () => hover(i), onfocus: () => { if (cell !== i) choose(i, false); }});
    }))));
  at("cells").onpointerleave = () => hover(null);
  at("cells").hidden = false;
  const total = bits.reduce((a, b) => a + b, 0);
  facts(at("look-facts"), [["Codes", `${n} × ${n}, ${new Set(look.codes.flat()).size} different ones`],
    ["Bits", `${(total / bits.length).toFixed(2)} a code, ${total.toFixed(0)} in all`]]);
  paint();
}

// What the code takes of each word, over the chosen layers.
function shares(i) {
  const layers = at("layer").value === "all" ? look.attention : [look.attention[Number(at("layer").value)]];
  return layers[0][i].map((_, w) => layers.reduce((sum, layer) => sum + layer[i][w], 0) / layers.length);
}

const all = () => look.codes.flat().map((_, i) => shares(i));

function choose(i, focus) {
  cell = i;
  word = null;
  for (const place of at("cells").querySelectorAll("[data-cell]")) place.tabIndex = Number(place.dataset.cell) === i ? 0 : -1;
  if (focus) at("cells").querySelector(`[data-cell="${i}"]`).focus();
  paint();
}

function hover(i) {
  if (!look) return;
  describe(i ?? cell);
  if (mode() === "words" && word === null) chips(i ?? cell);
}

function describe(i) {
  if (i === null) { at("cell-words").textContent = ""; return; }
  const n = look.codes.length, bits = look.bits.flat()[i];
  const p = 2 ** -bits, share = p >= 0.001 ? `${(100 * p).toFixed(1)} %` : `1 in ${Math.round(1 / p).toLocaleString("en")}`;
  at("cell-words").textContent = `Row ${Math.floor(i / n) + 1}, column ${i % n + 1}: code ${look.codes.flat()[i]}, probability ${share} (${bits.toFixed(1)} bits)`;
}

function chips(i) {
  const rows = all(), words = look.words.length;
  // Beside each other's usual share: some words draw much attention from everywhere.
  const mean = Array.from({length: words}, (_, w) => rows.reduce((sum, row) => sum + row[w], 0) / rows.length);
  const values = i === null ? mean : rows[i].slice(0, words), top = Math.max(...values, 1e-9);
  at("caption").replaceChildren(...look.words.map((text, w) => {
    const chip = make("button", {class: "word", "aria-pressed": word === w, title: `${(100 * values[w]).toFixed(1)} % of the attention`, text, onclick: () => { word = word === w ? null : w; paint(); at("caption").children[w].focus(); }});
    chip.style.setProperty("--share", (values[w] / top).toFixed(3));
    return chip;
  }));
  if (i !== null && word === null) {
    const [rest, before] = rows[i].slice(-2), caption = 1 - rest - before, percent = value => `${(100 * value).toFixed(0)} %`;
    at("look-note").textContent = `This code: ${percent(caption)} of its attention on the words, ${percent(rest)} on the caption's start and padding, ${percent(before)} on codes before it.`;
  }
}

function paint() {
  if (!look) return;
  const kind = mode(), cells = [...at("cells").querySelectorAll("[data-cell]")], n = look.codes.length;
  const bits = look.bits.flat(), codes = look.codes.flat();
  at("cells").dataset.kind = kind;
  at("layer-field").hidden = at("caption").hidden = kind !== "words";
  at("scale").hidden = kind === "codes" || (kind === "words" && word === null);
  let heat = () => 0;
  if (kind === "bits") {
    const top = Math.max(...bits);
    heat = i => bits[i] / top;
    at("look-note").textContent = "How much each code surprised the model, given the words and the codes before it. Bright is surprising.";
    [at("scale-low").textContent, at("scale-high").textContent] = ["0 bits", `${top.toFixed(1)} bits`];
  } else if (kind === "words" && word !== null) {
    const values = all().map(row => row[word]), top = Math.max(...values), low = Math.min(...values);
    heat = i => (values[i] - low) / Math.max(top - low, 1e-9);
    at("look-note").textContent = `How much each code attended to “${look.words[word]}” as it was drawn.`;
    [at("scale-low").textContent, at("scale-high").textContent] = [low, top].map(value => `${(100 * value).toFixed(1)} %`);
  } else if (kind === "words") {
    at("look-note").textContent = "Choose a code to see which words it attended to, or a word to see where it was attended to.";
  } else {
    at("look-note").textContent = look.alone ? "Each code as it looks alone, without its neighbours." : "A colour for each code; the same colour is the same code.";
  }
  const plain = kind === "words" && word === null;
  at("frame").classList.toggle("dimmed", kind !== "codes" && !plain);
  cells.forEach((place, i) => {
    place.style.background = kind === "codes"
      ? look.alone ? "" : `hsl(${codes[i] * 137.5 % 360} 60% ${35 + codes[i] * 7 % 40}%)`
      : plain ? "" : `color-mix(in srgb, var(--hot) ${Math.round(94 * heat(i))}%, transparent)`;
    place.classList.toggle("chosen", i === cell);
    place.setAttribute("aria-label", `row ${Math.floor(i / n) + 1}, column ${i % n + 1}, code ${codes[i]}, ${bits[i].toFixed(1)} bits`);
  });
  at("cells").style.backgroundImage = kind === "codes" && look.alone ? `url(${look.alone})` : "";
  if (kind === "words") chips(cell);
  describe(cell);
}
