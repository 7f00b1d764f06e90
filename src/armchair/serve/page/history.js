// What was drawn before: a list beside the desk, with search, favourites, and delete with undo.
import {ago, at, count, make, toast} from "./dom.js";
import {get, post, show} from "./server.js";

let chosen = () => {}, removed = () => {};
let favourites = false, oldest = null, limit = 0, asked = 0;

export function start(most, onChosen, onRemoved) {
  [limit, chosen, removed] = [most, onChosen, onRemoved];
  let waiting = null;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(load, 200);
  });
  at("favourites").addEventListener("click", () => {
    favourites = !favourites;
    at("favourites").setAttribute("aria-pressed", favourites);
    at("favourites").textContent = favourites ? "★" : "☆";
    load();
  });
  at("older").addEventListener("click", () => load(oldest));
  return load();
}

function line(entry) {
  const thumbs = make("span", {class: "thumbs"}, ...entry.pictures.slice(0, 4).map(picture =>
    show(make("img", {alt: "", loading: "lazy"}), picture.id)));
  const starred = entry.pictures.some(picture => picture.favourite);
  const what = {grid: "table of ", complete: "redrawn, ", dropped: "opened, "}[entry.kind] ?? "";
  const item = make("li", {"data-entry": entry.id},
    make("button", {class: "entry", onclick: () => chosen(entry)}, thumbs,
      make("span", {class: "entry-prompt", text: entry.prompt}),
      make("span", {class: "entry-facts", text: `${starred ? "★ " : ""}${what}${count(entry.pictures.length, "picture", "pictures")} · ${ago(entry.at)}`})),
    make("button", {class: "quiet icon delete", "aria-label": `Delete ${entry.prompt} from the history`, title: "Delete", text: "✕", onclick: () => remove(entry)}));
  return item;
}

export async function load(before = null) {
  const mine = ++asked, search = at("search").value.trim();
  const query = new URLSearchParams({search, favourites});
  if (typeof before === "number") query.set("before", before);
  let found;
  try {
    found = await get(`/studio/history?${query}`);
  } catch (error) {
    at("history-note").textContent = error.message;
    return;
  }
  if (mine !== asked) return;
  const lines = found.entries.map(line);
  if (typeof before === "number") at("entries").append(...lines);
  else at("entries").replaceChildren(...lines);
  oldest = found.entries.at(-1)?.id ?? oldest;
  at("older").hidden = !found.more;
  const empty = !at("entries").children.length;
  at("history-note").textContent = !empty ? `The newest ${limit.toLocaleString("en")} are kept, and every favourite.`
    : search || favourites ? "Nothing here like that." : "What you draw is kept here, on this computer.";
}

async function remove(entry) {
  try {
    await post(`/studio/history/${entry.id}/delete`);
  } catch (error) { return toast(error.message); }
  const item = at("entries").querySelector(`[data-entry="${entry.id}"]`);
  const next = item?.nextElementSibling ?? item?.previousElementSibling;
  item?.remove();
  (next?.querySelector(".entry") ?? at("search")).focus();
  removed(entry);
  toast("Deleted", "Undo", async () => {
    try {
      await post(`/studio/history/${entry.id}/restore`);
      await load();
      chosen(entry);
    } catch (error) { toast(error.message); }
  });
}
