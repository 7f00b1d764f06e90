// Small helpers. Everything that is shown goes in as text: a prompt may hold HTML, and stays words.

export const at = id => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

export function facts(list, pairs) {
  list.replaceChildren(...pairs.filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
    make("div", {}, make("dt", {text: name}), make("dd", {text: value}))));
}

// A line that goes by itself; with an action it stays longer.
export function toast(words, action = null, run = null) {
  const line = make("div", {class: "toast"}, make("span", {text: words}));
  const close = () => line.remove();
  if (action) line.append(make("button", {class: "quiet", text: action, onclick: () => { close(); run(); }}));
  at("toasts").append(line);
  while (at("toasts").children.length > 3) at("toasts").firstChild.remove();
  setTimeout(close, action ? 8000 : 3500);
}

export function ago(seconds) {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(seconds * 1000).toLocaleDateString(undefined, {day: "numeric", month: "short", year: "numeric"});
}

export const typing = target => target instanceof Element && target.matches("input:not([type=radio]), textarea, select");
export const score = value => value === null || value === undefined ? "" : value.toFixed(3);
export const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
