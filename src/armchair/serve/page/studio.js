// The desk: what is asked for, how it comes along, and what is to be read and pressed meanwhile.
import {at, count, make, toast, typing} from "./dom.js";
import * as history from "./history.js";
import {get, post, Refused, stream} from "./server.js";
import * as stage from "./stage.js";
import * as viewer from "./viewer.js";

const SETTINGS = ["guidance", "temperature", "top_k", "top_p", "min_p", "naturalness"];
let about = null, running = null, choices = {choices: [], prompts: []}, retry = null;

const model = () => about.models.find(line => line.name === at("model").value) ?? about.models[0];
const number = () => Number(document.querySelector("[name=count]:checked").value);

const say = words => { at("status").textContent = words; };

function problem(words, again = null, seconds = null) {
  clearInterval(retry);
  const box = at("problem"), button = at("again");
  box.hidden = !words;
  box.querySelector("p").textContent = words ?? "";
  if (words) box.scrollIntoView({block: "nearest"});
  button.hidden = !again;
  button.onclick = () => { problem(null); again(); };
  let left = Math.ceil(seconds ?? 0);
  const tell = () => { button.textContent = left > 0 ? `Try again in ${left} s` : "Try again"; button.disabled = left > 0; };
  tell();
  if (again && left > 0) retry = setInterval(() => { left -= 1; tell(); if (left <= 0) clearInterval(retry); }, 1000);
}

function settings() {
  const told = {};
  for (const name of SETTINGS) if (at(name).value !== "") told[name] = Number(at(name).value);
  if (about.models.length > 1) told.model = model().name;
  return told;
}

const anySeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0] % 1000000);

function grow() {
  const prompt = at("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

// The table that a prompt with braces stands for; the rule is the server's.
let reading = 0;
async function readChoices() {
  const prompt = at("prompt").value, mine = ++reading;
  let found = {choices: [], prompts: [prompt]}, wrong = null;
  if (/[{}]/.test(prompt)) {
    try { found = await post("/studio/choices", {prompt}); } catch (error) { wrong = error.message; }
    if (mine !== reading) return choices;
  }
  choices = found;
  const sizes = found.choices.map(list => list.length);
  at("choices").hidden = !wrong && !sizes.length;
  at("choices").classList.toggle("wrong", Boolean(wrong));
  at("choices").textContent = wrong ?? (sizes.length > 1
    ? `${sizes.join(" × ")} = ${found.prompts.length} pictures, as a table` : `${found.prompts.length} pictures in a row`);
  at("count-legend").textContent = sizes.length ? "Best of" : "Pictures";
  at("draw").textContent = sizes.length ? "Draw table" : "Draw";
  return wrong ? null : found;
}

function busy(on) {
  const [pressed, other] = on ? [at("draw"), at("stop")] : [at("stop"), at("draw")];
  const focused = document.activeElement === pressed;
  other.hidden = false;
  pressed.hidden = true;
  if (focused) other.focus();
  at("bar").hidden = !on;
  at("bar").firstElementChild.style.width = "0";
}

async function draw() {
  const prompt = at("prompt").value;
  if (running) return;
  if (!prompt.trim()) { at("prompt").focus(); return say("Write what it shall draw first."); }
  problem(null);
  const grid = await readChoices();
  if (!grid) return at("prompt").focus();
  const candidates = number(), seed = at("seed").value.trim() || anySeed();
  if (!/^[0-9]+$/.test(seed)) { at("seed").focus(); return say("The seed is a whole number."); }
  document.body.dataset.view = "draw";
  views();
  running = new AbortController();
  busy(true);
  say("Asking …");
  const before = stage.shown();
  let places = null, done = 0;
  const progress = share => { at("bar").firstElementChild.style.width = `${100 * share}%`; };
  try {
    places = stage.begin(prompt, candidates, grid.choices, grid.prompts);
    await stream("/studio/draw", {prompt, candidates, seed, ...settings()}, running.signal, (name, told) => {
      if (name === "queued") { if (!done) say(told.position ? `Waiting: ${told.words}` : "Drawing"); }
      if (name === "partial") {
        places.partial(told);
        if (!grid.choices.length) { say(`Drawing, row ${told.rows} of ${told.of}`); progress(told.rows / told.of); }
      }
      if (name === "cell") {
        places.cell(told);
        done += 1;
        say(`${done} of ${grid.prompts.length} drawn`);
        progress(done / grid.prompts.length);
      }
      if (name === "done") {
        stage.present(told.entry);
        const best = told.entry.pictures[0]?.score;
        say(`Done: ${count(told.entry.pictures.length, "picture", "pictures")}${!grid.choices.length && best != null && candidates > 1 ? ", the best first" : ""}`);
      }
    });
    history.load();
  } catch (error) {
    before ? stage.present(before) : stage.clear();
    if (error.name === "AbortError") say("Stopped");
    else {
      say("");
      const again = error instanceof Refused && [0, 429, 500, 503].includes(error.status) ? draw : null;
      problem(error.status === 429 ? `Too much is being drawn right now. ${error.message}` : error.message, again, error.retryAfter);
      if (!(error instanceof Refused)) console.error(error);
    }
  } finally {
    running = null;
    busy(false);
  }
}

function fill(entry, picture) {
  at("prompt").value = entry.kind === "grid" ? entry.prompt : picture.prompt;
  at("seed").value = picture.seed ?? "";
  for (const name of SETTINGS) at(name).value = picture.own?.[name] ?? "";
  if (picture.model && about.models.length > 1) at("model").value = picture.model;
  const counts = [...document.querySelectorAll("[name=count]")];
  const wanted = entry.kind === "dropped" ? picture.candidate + 1 : entry.candidates;
  (counts.find(radio => Number(radio.value) >= wanted) ?? counts.at(-1)).checked = true;
  if (Object.keys(picture.own ?? {}).length) openSettings(true);
  own();
  grow();
  readChoices();
}

function openSettings(open) {
  at("settings").hidden = !open;
  at("more").setAttribute("aria-expanded", open);
}

function own() {
  for (const name of SETTINGS) at(name).placeholder = model().settings[name] ?? {top_k: 0, min_p: 0, naturalness: 0}[name] ?? 1;
}

async function dropped(file) {
  if (file.size > about.limits.dropped) return problem(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; a picture of armchair has less than ${about.limits.dropped / 2 ** 20}.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  try {
    const entry = await post("/studio/dropped", {png: btoa(text)});
    problem(null);
    stage.present(entry);
    fill(entry, entry.pictures[0]);
    at("shown-facts").textContent = `${file.name} · seed ${entry.pictures[0].seed}, candidate ${entry.pictures[0].candidate}`;
    say("Its words and settings are in the form; Draw makes it again.");
    history.load();
  } catch (error) { problem(`${file.name}: ${error.message.replace(/^this picture: /, "")}`); }
}

function views() {
  for (const name of ["draw", "history"]) at(`show-${name}`).setAttribute("aria-pressed", document.body.dataset.view === name);
}

function examples(list, prompts) {
  at(list).replaceChildren(...prompts.map(prompt => make("li", {}, make("button", {text: prompt, onclick: () => {
    at("prompt").value = prompt;
    grow();
    readChoices().then(draw);
  }}))));
}

function listen() {
  at("composer").addEventListener("submit", event => { event.preventDefault(); draw(); });
  at("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); draw(); }
    const end = at("prompt").selectionStart === at("prompt").value.length;
    if (event.key === "ArrowDown" && end && stage.enter()) event.preventDefault();
  });
  let waiting = null;
  at("prompt").addEventListener("input", () => { grow(); clearTimeout(waiting); waiting = setTimeout(readChoices, 150); });
  at("stop").addEventListener("click", () => running?.abort());
  at("more").addEventListener("click", () => openSettings(at("settings").hidden));
  at("own").addEventListener("click", () => { for (const name of SETTINGS) at(name).value = ""; });
  at("model").addEventListener("change", own);
  at("help").addEventListener("click", () => at("shortcuts").showModal());
  for (const name of ["draw", "history"]) at(`show-${name}`).addEventListener("click", () => { document.body.dataset.view = name; views(); });
  at("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("armchair-theme", root.dataset.theme); } catch { /* until the page is left, then */ }
  });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (at("viewer").open || at("shortcuts").open || at("key").open) return;
    if (event.key === "Escape" && running) { running.abort(); return; }
    if (typing(event.target)) return;
    if (event.key.startsWith("Arrow") && stage.move(event.key)) event.preventDefault();
    if (event.key === "/") { event.preventDefault(); at("prompt").focus(); }
    if (event.key === "?") { event.preventDefault(); at("shortcuts").showModal(); }
  });
  let within = 0;
  const files = event => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", event => { if (files(event)) { within += 1; at("drop").hidden = false; } });
  addEventListener("dragleave", event => { if (files(event) && --within <= 0) { within = 0; at("drop").hidden = true; } });
  addEventListener("dragover", event => { if (files(event)) event.preventDefault(); });
  addEventListener("drop", event => {
    if (!files(event)) return;
    event.preventDefault();
    within = 0;
    at("drop").hidden = true;
    if (event.dataTransfer.files[0]) dropped(event.dataTransfer.files[0]);
  });
}

async function start() {
  listen();
  try {
    about = await get("/studio/about");
  } catch (error) { return problem(error.message, start); }
  at("model").replaceChildren(...about.models.map(line => make("option", {value: line.name, text: line.name, selected: line.default})));
  at("model-field").hidden = about.models.length < 2;
  at("model-name").textContent = about.models.length > 1 ? `${about.models.length} models` : `${model().name} · ${model().resolution} × ${model().resolution} pixels`;
  at("ballot").hidden = !about.ballot;
  own();
  examples("examples", model().prompts.slice(0, 8));
  examples("tables", ["{red|green|blue} {heart|apple}, {twemoji|noto emoji}", "{dog|cat|panda} face, {noto emoji|twemoji|fluent color emoji}"]);
  stage.onOpen(index => viewer.open(stage.shown(), index));
  viewer.start({settings, fill, changed: entry => { if (stage.shown()?.id === entry.id) stage.present(entry); history.load(); }});
  await history.start(about.limits.history, entry => {
    if (running) return toast("Stop the drawing first, or wait until it is done");
    document.body.dataset.view = "draw";
    views();
    problem(null);
    stage.present(entry);
    say("");
  }, entry => { if (stage.shown()?.id === entry.id) stage.clear(); });
  if (matchMedia("(pointer: fine)").matches) at("prompt").focus();
  document.body.dataset.ready = "true";
}

start();
