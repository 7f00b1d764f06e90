"""The ballot as a local page: FastAPI behind, one page of HTML in front, nothing from elsewhere."""

import secrets
from typing import Any

from armchair.errors import RequestError
from armchair.eval.ballot import QUESTIONS, Ballot

COOKIE = "armchair_voter"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which picture?</title>
<style>
:root { color-scheme: light dark; }
body { font: 18px/1.4 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 1rem; text-align: center; }
[hidden] { display: none !important; }
h1 { font-size: 1.3rem; min-height: 2.8em; display: grid; place-items: center; margin: .5rem 0; }
h1 { overflow-wrap: anywhere; }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#pair img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; background: #8883; border-radius: .4rem; }
#choices { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .6rem; margin-top: 1rem; }
button { font: inherit; padding: .7rem .3rem; border-radius: .4rem; border: 1px solid #888; cursor: pointer; }
button { background: transparent; color: inherit; }
button:hover, button:focus-visible { background: #8883; outline: 2px solid #3b6fb6; }
kbd { border: 1px solid #888; border-radius: .2rem; padding: 0 .3rem; font-size: .75em; }
#question { font-weight: 600; margin: 1rem 0 .2rem; } #progress { color: #888; font-size: .85rem; }
</style>
</head>
<body>
<main>
<p id="progress" role="status">…</p>
<h1 id="caption"></h1>
<div id="pair" hidden><img id="left" alt="left picture"><img id="right" alt="right picture"></div>
<p id="question" aria-live="polite"></p>
<div id="choices" hidden>
<button data-choice="left">left <kbd>←</kbd></button>
<button data-choice="tie">no difference <kbd>space</kbd></button>
<button data-choice="right">right <kbd>→</kbd></button>
</div>
</main>
<script>
const at = id => document.getElementById(id);
let ask = null, question = 0, busy = false;
async function call(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error((await answer.json()).detail || answer.statusText);
  return answer.json();
}
function show() {
  const over = !ask.pair;
  at("pair").hidden = at("choices").hidden = over;
  at("progress").textContent = over ? "" : `${ask.done} judged, ${ask.open} to go`;
  at("caption").textContent = over ? "That was the last one. Thank you!" : "“" + ask.caption + "”";
  at("question").textContent = over ? "" : ask.questions[question][1];
}
async function next() {
  ask = await call("ballot/next");
  question = 0;
  if (ask.pair) for (const side of ["left", "right"]) at(side).src = `ballot/picture/${ask.pair}/${side}`;
  show();
}
async function choose(choice) {
  if (busy || !ask || !ask.pair) return;
  busy = true;
  try {
    await call("ballot/vote", {method: "POST", headers: {"content-type": "application/json"},
      body: JSON.stringify({pair: ask.pair, question: ask.questions[question][0], choice})});
    question += 1;
    if (question < ask.questions.length) show(); else await next();
  } catch (error) { at("progress").textContent = "Not counted: " + error.message; }
  busy = false;
}
// Large pixels stay sharp; a picture that is larger than its place is made smaller smoothly.
for (const side of ["left", "right"]) at(side).onload = event => {
  const image = event.target;
  image.style.imageRendering = image.naturalWidth > image.clientWidth ? "auto" : "pixelated";
};
// Space presses the button that somebody has gone to with the Tab key, as everywhere; no button stays so after a click
// or another key, where space means that there is no difference.
const leave = () => document.activeElement.blur();
for (const button of document.querySelectorAll("button")) button.onclick = event => {
  if (event.detail) leave();
  choose(button.dataset.choice);
};
document.addEventListener("keydown", event => {
  if (event.key === " " && event.target.tagName === "BUTTON") return;
  const choice = {ArrowLeft: "left", ArrowRight: "right", " ": "tie", 1: "left", 2: "tie", 3: "right"}[event.key];
  if (!choice || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  leave();
  choose(choice);
});
next().catch(error => { at("progress").textContent = error.message; });
</script>
</body>
</html>
"""


def ballot_app(ballot: Ballot) -> Any:
    """An ASGI application. A voter is known by a random cookie and by nothing else; no answer names a system."""
    try:
        from fastapi import Body, FastAPI, HTTPException, Request
        from fastapi.responses import HTMLResponse, JSONResponse, Response
    except ImportError:
        raise RequestError("the ballot's page needs more packages: pip install 'armchair[evaluate,serve]'") from None

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def voter_of(request: Any) -> str:
        voter = request.cookies.get(COOKIE, "")
        if not (voter.isalnum() and len(voter) == 32):
            raise HTTPException(403, "open the page first")
        return voter

    def page(request):  # type: ignore[no-untyped-def]
        answer = HTMLResponse(PAGE)
        if COOKIE not in request.cookies:
            answer.set_cookie(COOKIE, secrets.token_hex(16), max_age=365 * 86400, httponly=True, samesite="strict")
        return answer

    def next_pair(request):  # type: ignore[no-untyped-def]
        ask = ballot.next(voter_of(request))
        questions = list(QUESTIONS.items())
        return {"pair": None} if ask is None else {**vars(ask), "questions": questions}

    def picture(pair: int, side: str, request):  # type: ignore[no-untyped-def]
        data = ballot.picture(pair, side, voter_of(request))
        return Response(data, media_type="image/png", headers={"cache-control": "no-store"})

    def vote(request, pair: int = Body(), question: str = Body(), choice: str = Body()):  # type: ignore[no-untyped-def]
        ballot.vote(pair, voter_of(request), question, choice)
        return {"counted": True}

    for function in (page, next_pair, picture, vote):  # `request` is told by its type, which is known only here
        function.__annotations__["request"] = Request
    app.get("/")(page)
    app.get("/ballot/next")(next_pair)
    app.get("/ballot/picture/{pair}/{side}")(picture)
    app.post("/ballot/vote")(vote)

    @app.exception_handler(RequestError)
    def refused(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    return app
