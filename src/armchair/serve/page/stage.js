// The pictures on the desk: candidates side by side, or the table of a prompt with choices.
import {at, count, make, score} from "./dom.js";
import {show} from "./server.js";

let open = () => {};
let entry = null;
export const onOpen = run => { open = run; };
export const shown = () => entry;

function tile(label) {
  const image = make("img", {alt: "", draggable: "false"});
  const button = make("button", {class: "tile", disabled: true, "aria-label": label}, image);
  const caption = make("span", {class: "caption-line"});
  return {image, button, caption, figure: make("div", {class: "figure"}, button, caption)};
}

// How many of the choices name rows; the others name columns, as many as fit.
function split(choices) {
  let columns = choices.at(-1).length, rows = choices.length - 1;
  while (rows > 1 && columns * choices[rows - 1].length <= 6) columns *= choices[--rows].length;
  return rows;
}

const words = word => word || "(nothing)";

function table(choices, tiles) {
  const rows = split(choices), across = choices.slice(rows), down = choices.slice(0, rows);
  const product = lists => lists.reduce((n, list) => n * list.length, 1);
  const width = product(across), height = product(down);
  const head = make("thead");
  across.forEach((list, level) => {
    const span = product(across.slice(level + 1)), line = make("tr");
    if (level === 0 && down.length) line.append(make("td", {colspan: down.length, rowspan: across.length}));
    for (let i = 0; i < width / span; i++) {
      line.append(make("th", {scope: span > 1 ? "colgroup" : "col", colspan: span, text: words(list[i % list.length])}));
    }
    head.append(line);
  });
  const body = make("tbody");
  for (let y = 0; y < height; y++) {
    const line = make("tr");
    down.forEach((list, level) => {
      const span = product(down.slice(level + 1));
      if (y % span === 0) {
        line.append(make("th", {scope: span > 1 ? "rowgroup" : "row", rowspan: span, text: words(list[(y / span) % list.length])}));
      }
    });
    for (let x = 0; x < width; x++) line.append(make("td", {}, tiles[y * width + x].figure));
    body.append(line);
  }
  return make("div", {class: "table"}, make("table", {}, head, body));
}

// Empty places for what is about to be drawn. Gives functions that fill them.
export function begin(prompt, number, choices, prompts) {
  entry = null;
  at("welcome").hidden = true;
  at("stage").hidden = false;
  at("shown-prompt").textContent = prompt;
  at("shown-facts").textContent = "";
  const many = choices.length ? prompts.length : number;
  const tiles = Array.from({length: many}, (_, i) => tile(choices.length ? prompts[i] : `picture ${i + 1}`));
  place(choices, tiles);
  at("pictures").dataset.state = "drawing";
  const grow = (one, url, drawn) => {
    one.image.src = url;
    one.image.style.clipPath = `inset(0 0 ${100 - 100 * drawn}% 0)`;
  };
  return {
    partial({cell, images, drawn}) {
      if (choices.length) grow(tiles[cell], images[0], drawn[0]);
      else images.forEach((url, i) => tiles[i] && grow(tiles[i], url, drawn[i]));
    },
    cell(told) { grow(tiles[told.cell], told.image, 1); },
  };
}

function place(choices, tiles) {
  const space = at("pictures");
  space.className = choices.length ? "as-table" : `candidates n${tiles.length}`;
  space.replaceChildren(...(choices.length ? [table(choices, tiles)] : tiles.map(one => one.figure)));
}

// An entry of the history, or what was just drawn.
export function present(found, index = null) {
  entry = found;
  const choices = found.choices ?? [], pictures = found.pictures;
  at("welcome").hidden = true;
  at("stage").hidden = false;
  at("shown-prompt").textContent = found.prompt;
  const first = pictures[0], ranked = pictures.some(picture => picture.score !== null);
  const told = [count(pictures.length, "picture", "pictures")];
  if (first?.seed !== undefined) told.push(`seed ${first.seed}`);
  if (found.kind === "complete") told.push("a region drawn anew");
  if (choices.length && found.candidates > 1 && ranked) told.push(`each the best of ${found.candidates}`);
  else if (!choices.length && ranked && pictures.length > 1) told.push("best first");
  at("shown-facts").textContent = told.join(" · ");
  const whole = !choices.length || choices.reduce((n, list) => n * list.length, 1) === pictures.length;
  const tiles = pictures.map((picture, i) => {
    const rated = score(picture.score);
    const one = tile(`${picture.prompt}, picture ${i + 1} of ${pictures.length}${rated && `, score ${rated}`}${picture.favourite ? ", favourite" : ""}`);
    one.button.disabled = false;
    one.button.dataset.picture = picture.id;
    one.button.tabIndex = i === (index ?? 0) ? 0 : -1;
    one.button.addEventListener("click", () => open(i));
    one.image.alt = picture.prompt;
    show(one.image, picture.id);
    if (!choices.length) {
      one.caption.append(
        make("span", {text: picture.seed === undefined ? "" : `${picture.seed}·${picture.candidate}`, title: "seed · candidate"}),
        make("span", {class: "score", text: rated, title: "the ranker's score, higher is better"}));
    }
    if (picture.favourite) one.figure.append(make("span", {class: "star", "aria-hidden": "true", text: "★"}));
    return one;
  });
  place(whole ? choices : [], tiles);
  at("pictures").dataset.state = "done";
}

// Arrows go from picture to picture, by where these are on the screen.
export function move(key) {
  const tiles = [...at("pictures").querySelectorAll("button.tile:not(:disabled)")];
  const here = tiles.indexOf(document.activeElement);
  if (here < 0) return false;
  let to = null;
  if (key === "ArrowLeft") to = tiles[here - 1];
  if (key === "ArrowRight") to = tiles[here + 1];
  if (key === "ArrowUp" || key === "ArrowDown") {
    const from = tiles[here].getBoundingClientRect(), side = key === "ArrowUp" ? -1 : 1;
    const way = tiles.map(tile => [tile, tile.getBoundingClientRect()])
      .filter(([, box]) => (box.top - from.top) * side > from.height / 2)
      .sort(([, a], [, b]) => Math.abs(a.top - from.top) - Math.abs(b.top - from.top) || Math.abs(a.left - from.left) - Math.abs(b.left - from.left));
    to = way[0]?.[0];
  }
  if (to) {
    tiles[here].tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
  return true;
}

// From the prompt down to the pictures; false where there are none.
export function enter() {
  const tile = at("pictures").querySelector("button.tile:not(:disabled)[tabindex='0']");
  if (!tile || at("stage").hidden) return false;
  tile.focus();
  return true;
}

export function focusPicture(id) { at("pictures").querySelector(`[data-picture="${id}"]`)?.focus(); }

export function clear() {
  entry = null;
  at("stage").hidden = true;
  at("welcome").hidden = false;
}
