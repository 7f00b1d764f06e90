// One picture, large: save it, draw a region of it anew, look inside it.
import {at, facts, make, score, toast, typing} from "./dom.js";
import * as look from "./look.js";
import {picture as urlOf, post, show, stream} from "./server.js";
import {focusPicture} from "./stage.js";

const TABS = ["picture", "redraw", "look"];
let entry = null, index = 0, tab = "picture", studio = null, running = null;
let region = null;  // in cells: x, y, x2, y2
const picture = () => entry.pictures[index];

export function start(given) {
  studio = given;
  for (const name of TABS) at(`tab-${name}`).addEventListener("click", () => choose(name));
  at("close").addEventListener("click", () => at("viewer").close());
  at("viewer").addEventListener("close", () => { running?.abort(); if (entry) focusPicture(picture().id); });
  at("viewer").addEventListener("click", event => { if (event.target === at("viewer")) at("viewer").close(); });
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  at("pixels").addEventListener("click", () => {
    const on = at("frame").classList.toggle("pixelated");
    at("pixels").setAttribute("aria-pressed", on);
  });
  at("save").addEventListener("click", save);
  at("star").addEventListener("click", star);
  at("reuse").addEventListener("click", reuse);
  at("copy").addEventListener("click", copy);
  at("redraw").addEventListener("click", redraw);
  at("redraw-stop").addEventListener("click", () => running?.abort());
  at("words").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); redraw(); }
  });
  at("viewer").addEventListener("keydown", keys);
  dragging();
  look.start();
}

export function open(found, at_) {
  entry = found;
  index = at_;
  region = null;
  at("alternatives").replaceChildren();
  at("redraw-status").textContent = "";
  choose("picture", false);
  fillIn();
  if (!at("viewer").open) at("viewer").showModal();
  at("save").focus();
}

function fillIn() {
  const one = picture();
  show(at("large"), one.id);
  at("large").alt = one.prompt;
  at("viewer-title").textContent = one.prompt;
  at("place").textContent = entry.pictures.length > 1 ? `${index + 1} of ${entry.pictures.length}` : "";
  at("previous").disabled = index === 0;
  at("next").disabled = index === entry.pictures.length - 1;
  const known = one.seed !== undefined;
  facts(at("facts"), known ? [
    ["Score", score(one.score)], ["Seed", one.seed], ["Candidate", String(one.candidate)], ["Model", one.bundle],
    ["Settings", Object.entries(one.settings).map(([name, value]) => `${name.replace("_", " ")} ${value}`).join(", ")],
    ["Region", one.rectangle ? `${one.rectangle.join(", ")} pixels` : ""],
  ] : []);
  starred();
  at("reuse").disabled = !known;
  at("command").textContent = one.command ?? "";
  at("copy").disabled = !one.command;
  at("command-note").textContent = !one.command ? "" : one.rectangle
    ? "Save the picture it was drawn from, and run this beside it." : entry.pictures.length > 1 && entry.kind === "draw"
      ? `Draws all ${entry.pictures.length}; this is the ${["first", "second", "third"][index] ?? `${index + 1}th`} of them.` : "";
  at("words").value = one.prompt;
  showRegion();
  if (tab === "look") look.show(one);
}

function choose(name, focus = true) {
  tab = name;
  for (const other of TABS) {
    const on = other === name;
    at(`tab-${other}`).setAttribute("aria-selected", on);
    at(`tab-${other}`).tabIndex = on ? 0 : -1;
    at(`panel-${other}`).hidden = !on;
  }
  if (focus) at(`tab-${name}`).focus();
  at("cells").hidden = true;
  showRegion();
  if (name === "look") look.show(picture());
  else look.leave();
}

function step(by) {
  if (running || !entry.pictures[index + by]) return;
  index += by;
  fillIn();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  const inside = at("cells").contains(event.target) || event.target === at("region") || event.target.matches?.("[type=radio]");
  const onTab = event.target.getAttribute?.("role") === "tab";
  if (onTab && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    event.preventDefault();
    return choose(TABS[(TABS.indexOf(tab) + (event.key === "ArrowRight" ? 1 : TABS.length - 1)) % TABS.length]);
  }
  const run = {
    ArrowLeft: inside ? null : () => step(-1), ArrowRight: inside ? null : () => step(1),
    s: save, c: copy, f: star, u: reuse, p: () => { choose("picture", false); at("save").focus(); },
    r: () => { choose("redraw", false); at("region").focus(); }, i: () => { choose("look", false); at("tab-look").focus(); },
    "?": () => at("shortcuts").showModal(),
  }[event.key];
  if (run) { event.preventDefault(); run(); }
}

async function save() {
  const link = make("a", {download: picture().file, href: await urlOf(picture().id)});
  link.click();
}

async function copy() {
  if (!picture().command) return;
  try {
    await navigator.clipboard.writeText(picture().command);
    toast("Copied");
  } catch {
    getSelection().selectAllChildren(at("command"));
    toast("Selected; copy it with Ctrl+C");
  }
}

function starred() {
  const on = picture().favourite;
  at("star").setAttribute("aria-pressed", on);
  at("star").firstChild.textContent = on ? "★ Favourite " : "☆ Favourite ";
}

async function star() {
  const one = picture();
  try {
    await post(`/studio/pictures/${one.id}/favourite`, {favourite: !one.favourite});
    one.favourite = !one.favourite;
    starred();
    studio.changed(entry);
  } catch (error) { toast(error.message); }
}

function reuse() {
  if (picture().seed === undefined) return;
  studio.fill(entry, picture());
  at("viewer").close();
  at("prompt").focus();
}

// The region: in whole cells, as a code is all or nothing.

function showRegion() {
  const on = tab === "redraw" && picture()?.grid;
  const box = at("region"), mark = box.firstElementChild;
  box.hidden = !on;
  if (!on) return;
  mark.hidden = !region;
  box.classList.toggle("chosen", at("alternatives").querySelector("button") !== null);
  at("redraw").disabled = !region || Boolean(running);
  if (!region) {
    box.setAttribute("aria-label", "Region to draw anew: none yet. Press an arrow key to make one, or drag.");
    return;
  }
  const [x, y, x2, y2] = region, side = 100 / picture().grid;
  Object.assign(mark.style, {left: `${x * side}%`, top: `${y * side}%`, width: `${(x2 - x) * side}%`, height: `${(y2 - y) * side}%`});
  box.setAttribute("aria-label", `Region to draw anew: rows ${y + 1} to ${y2}, columns ${x + 1} to ${x2} of ${picture().grid}. Arrows move it, Shift and arrows change its size.`);
}

function dragging() {
  const box = at("region");
  let from = null;
  const cell = event => {
    const edge = box.getBoundingClientRect(), n = picture().grid;
    const within = value => Math.max(0, Math.min(n - 1, Math.floor(value * n)));
    return [within((event.clientX - edge.left) / edge.width), within((event.clientY - edge.top) / edge.height)];
  };
  const span = to => {
    region = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]) + 1, Math.max(from[1], to[1]) + 1];
    showRegion();
  };
  box.addEventListener("pointerdown", event => {
    if (running) return;
    event.preventDefault();
    box.focus();
    box.setPointerCapture(event.pointerId);
    from = cell(event);
    at("alternatives").replaceChildren();
    at("redraw-status").textContent = "";
    span(from);
  });
  box.addEventListener("pointermove", event => { if (from) span(cell(event)); });
  for (const name of ["pointerup", "pointercancel"]) box.addEventListener(name, () => { from = null; });
  box.addEventListener("keydown", event => {
    const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!by || running) return;
    event.preventDefault();
    const n = picture().grid;
    if (!region) region = [Math.floor(n / 4), Math.floor(n / 4), Math.ceil(3 * n / 4), Math.ceil(3 * n / 4)];
    else if (event.shiftKey) {
      region[2] = Math.max(region[0] + 1, Math.min(n, region[2] + by[0]));
      region[3] = Math.max(region[1] + 1, Math.min(n, region[3] + by[1]));
    } else if (region[0] + by[0] >= 0 && region[2] + by[0] <= n && region[1] + by[1] >= 0 && region[3] + by[1] <= n) {
      region = [region[0] + by[0], region[1] + by[1], region[2] + by[0], region[3] + by[1]];
    }
    showRegion();
  });
}

async function redraw() {
  if (running) return;
  const one = picture(), prompt = at("words").value;
  const tell = words => { at("redraw-status").textContent = words; };
  if (!region) return tell("Drag over a part of the picture first.");
  if (!prompt.trim()) return tell("Write what the picture shall show.");
  const side = at("large").naturalWidth / one.grid;
  running = new AbortController();
  at("redraw").hidden = true;
  at("redraw-stop").hidden = false;
  at("redraw-stop").focus();
  const places = Array.from({length: 4}, () => make("img", {alt: ""}));
  at("alternatives").replaceChildren(...places.map(image => make("span", {class: "tile"}, image)));
  const asked = {...studio.settings(), prompt, candidates: 4, seed: String(crypto.getRandomValues(new Uint32Array(1))[0] % 1000000),
    picture: one.id, rectangle: region.map(value => value * side)};
  if (one.model && asked.model) asked.model = one.model;
  tell("Asking …");
  try {
    await stream("/studio/draw", asked, running.signal, (name, told) => {
      if (name === "queued") tell(told.position ? `Waiting: ${told.words}` : "Drawing");
      if (name === "partial") {
        told.images.forEach((url, i) => { if (places[i]) places[i].src = url; });
        tell(`Drawing, row ${told.rows} of ${told.of}`);
      }
      if (name === "done") alternatives(entry, index, told.entry);
    });
    tell("Choose one; the first is what was there.");
    studio.changed(entry);
  } catch (error) {
    at("alternatives").replaceChildren();
    tell(error.name === "AbortError" ? "Stopped" : error.status === 429 && error.retryAfter
      ? `Too much is being drawn right now. ${error.message}; try again in ${Math.ceil(error.retryAfter)} s.` : error.message);
  } finally {
    running = null;
    at("redraw").hidden = false;
    at("redraw-stop").hidden = true;
    showRegion();
  }
}

function alternatives(before, was, after) {
  const option = (from, i, label) => {
    const one = from.pictures[i];
    const button = make("button", {class: "tile", "aria-label": label, "aria-pressed": from === before, onclick: () => {
      entry = from;
      index = i;
      for (const other of at("alternatives").children) other.setAttribute("aria-pressed", other === button);
      const kept = region, words = at("words").value;
      fillIn();
      region = kept;
      at("words").value = words;
      showRegion();
    }}, show(make("img", {alt: ""}), one.id), make("span", {class: "score", text: from === before ? "before" : score(one.score)}));
    return button;
  };
  at("alternatives").replaceChildren(option(before, was, "As it was"),
    ...after.pictures.map((one, i) => option(after, i, `Alternative ${i + 1}${one.score === null ? "" : `, score ${score(one.score)}`}`)));
}
