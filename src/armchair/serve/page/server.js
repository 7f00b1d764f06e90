// What the page asks its server, and nobody else.
import {at} from "./dom.js";

export class Refused extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let key = null;
try { key = sessionStorage.getItem("armchair-key"); } catch { /* asked for again then */ }

async function askForKey(wrong) {
  const dialog = at("key");
  at("key-note").textContent = wrong ? "That key is not known here." : "Whoever runs it can tell you. It is kept until this tab is closed.";
  if (!dialog.open) dialog.showModal();
  await new Promise(resolve => dialog.addEventListener("close", resolve, {once: true}));
  key = at("key-value").value.trim();
  try { sessionStorage.setItem("armchair-key", key); } catch { /* kept in this page alone */ }
}

async function ask(path, options = {}) {
  for (;;) {
    const headers = {...options.headers, ...(key ? {authorization: `Bearer ${key}`} : {})};
    let answer;
    try {
      answer = await fetch(path, {...options, headers});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer. Is armchair serve still running?", 0);
    }
    if (answer.status === 401) { await askForKey(Boolean(key)); continue; }
    if (answer.ok) return answer;
    const after = Number(answer.headers.get("retry-after"));
    let words = answer.statusText;
    try {
      const told = await answer.json();
      words = typeof told.detail === "string" ? told.detail : told.detail?.[0]?.msg ?? told.error?.message ?? words;
    } catch { /* no JSON: the status has to do */ }
    throw new Refused(words, answer.status, after || null);
  }
}

export const get = async path => (await ask(path)).json();

const posted = (data, signal) => ({
  method: "POST", signal, headers: {"content-type": "application/json"}, body: JSON.stringify(data),
});

export const post = async (path, data = {}) => (await ask(path, posted(data))).json();

// Calls `tell` with each event, (name, data), until the stream ends; aborting the signal frees the place in the queue.
export async function stream(path, data, signal, tell) {
  const answer = await ask(path, posted(data, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", over = false;
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const name = lines.find(line => line.startsWith("event: "))?.slice(7);
      const body = lines.find(line => line.startsWith("data: "))?.slice(6);
      if (!name || !body) continue;
      const told = JSON.parse(body);
      over ||= name === "done";
      if (name === "error") throw new Refused(told.message, 500, told.retry_after);
      tell(name, told);
    }
  }
  if (!over) throw new Refused("The server stopped before the pictures were done.", 0);
}

const urls = new Map();

// A picture's URL. With a key it is fetched, as an <img> cannot bring one.
export function picture(id) {
  if (!key) return Promise.resolve(`/studio/pictures/${id}`);
  if (!urls.has(id)) {
    urls.set(id, ask(`/studio/pictures/${id}`).then(answer => answer.blob()).then(blob => URL.createObjectURL(blob)));
  }
  return urls.get(id);
}

export function show(image, id) {
  picture(id).then(url => { image.src = url; }, () => { image.alt = "this picture could not be fetched"; });
  return image;
}
