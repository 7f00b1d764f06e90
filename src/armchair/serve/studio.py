"""The studio: the page that people draw with, and the routes behind it. What it shows lies in `page/`."""

import asyncio
import base64
import contextlib
import importlib.resources
import io
import json
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from armchair import __version__
from armchair.bundle import bundled_names, find_bundle
from armchair.config import from_dict, to_dict
from armchair.errors import ArmchairError, RequestError
from armchair.eval.ballot import Ballot
from armchair.sample.next_token import SETTINGS, Settings
from armchair.sample.pipeline import MAX_SEED, UNDRAWN, Artist, Drawing, Record
from armchair.sample.png import png_bytes, record_in, slug
from armchair.serve.command import command_of
from armchair.serve.history import PAGE, Entry, History, Kept
from armchair.serve.look import Look, look_inside
from armchair.serve.prompt_grid import MAX_COMBINATIONS, PromptGrid, parse_prompt
from armchair.serve.service import Busy, DrawRequest, Event, Finished, Partial, Queued, Service

MAX_BODY = 256 << 10  # bytes of a request
MAX_DROPPED = 8 << 20  # bytes of a PNG that is dropped on the page
MAX_SIDE = 2048  # pixels of one
MAX_CANDIDATES = 16  # of a prompt on the page
CELLS_AT_ONCE = 4  # pictures of a table that are asked for at a time, so that others have their turn

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "cache-control": "no-cache"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the page asks to be drawn. The seed is a string of digits, as JavaScript has no whole numbers past 2**53.

    `prompt` may have choices. With `picture`, one of the history, its `rectangle` is drawn anew.
    """

    prompt: str
    seed: str = "0"
    model: str | None = None
    candidates: int = 4
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance: float | None = None
    naturalness: float | None = None
    picture: int | None = None
    rectangle: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (self.seed.isascii() and self.seed.isdigit() and len(self.seed) < 20 and int(self.seed) <= MAX_SEED):
            raise RequestError(f"seed: expected a whole number from 0 to {MAX_SEED}, got {self.seed[:40]!r}")
        if not 1 <= self.candidates <= MAX_CANDIDATES:
            raise RequestError(f"candidates: expected 1 to {MAX_CANDIDATES}, got {self.candidates}")
        if (self.picture is None) != (self.rectangle is None):
            raise RequestError("to draw a region anew, give both the picture and the rectangle")
        if self.rectangle is not None and len(self.rectangle) != 4:
            raise RequestError("rectangle: expected x, y, x2, y2 in pixels")


def make_router(service: Service, history: History, ballot: Ballot | None = None) -> Any:
    """The page and its routes, a fastapi.APIRouter; with a ballot, that is under /ballot/.

    Routes that change something take JSON, and from the page itself only. Raises RequestError without FastAPI.
    """
    try:
        from fastapi import APIRouter, Depends, HTTPException, Request
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import Response, StreamingResponse
    except ImportError:
        raise RequestError("serving needs more packages: pip install 'armchair[serve]'") from None

    files = {
        place.name: (place.read_bytes(), TYPES[place.name[place.name.rindex(".") :]])
        for place in importlib.resources.files("armchair.serve").joinpath("page").iterdir()
        if place.name.endswith(tuple(TYPES))
    }

    def own_page_only(request):  # type: ignore[no-untyped-def]
        """Browsers say where a request comes from; programs, which say nothing, are as good as their key."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
        if foreign or site not in ("same-origin", "none"):
            raise HTTPException(403, "this may be asked from the studio's own page only")

    async def body(request, limit: int = MAX_BODY) -> Any:  # type: ignore[no-untyped-def]
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "expected application/json")
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > limit:
                raise HTTPException(413, f"expected at most {limit >> 10} KiB")
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
            raise HTTPException(400, "expected JSON") from None

    def static(name: str) -> Any:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        data, kind = files[name]
        return Response(data, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    def page():  # type: ignore[no-untyped-def]
        return static("index.html")

    def about():  # type: ignore[no-untyped-def]
        return {
            "version": __version__,
            "models": service.models.describe(),
            "ballot": ballot is not None,
            "limits": {
                "candidates": MAX_CANDIDATES,
                "combinations": MAX_COMBINATIONS,
                "history": history.limit,
                "page": PAGE,
                "dropped": MAX_DROPPED,
            },
        }

    async def choices(request):  # type: ignore[no-untyped-def]
        data = await body(request)
        prompt = data.get("prompt") if isinstance(data, dict) else None
        if not isinstance(prompt, str):
            raise RequestError("prompt: expected words")
        grid = parse_prompt(prompt)
        return {"choices": grid.choices, "prompts": grid.prompts()}

    async def draw(request):  # type: ignore[no-untyped-def]
        wish = from_dict(Wish, await body(request))
        grid = parse_prompt(wish.prompt)
        parent = None if wish.picture is None else await run_in_threadpool(history.png, wish.picture)
        requests = _requests(wish, grid, parent)
        events = _draw_all(service, requests)
        first = await anext(events)  # a wrong request, or no room: an answer that says so, not a stream

        async def told() -> AsyncIterator[str]:
            async with contextlib.aclosing(events):
                try:
                    drawings: dict[int, Drawing] = {}
                    event: tuple[int, Event] | None = first
                    while event is not None:
                        cell, what = event
                        if isinstance(what, Finished):
                            drawings[cell] = what.drawing
                        if not isinstance(what, Finished) or len(requests) > 1:
                            yield await run_in_threadpool(_message, cell, what, requests[cell])
                        event = await anext(events, None)
                    entry = await run_in_threadpool(_keep, history, wish, grid, drawings)
                    yield _sent("done", {"entry": _entry_json(entry, history, service, _is_local(request))})
                except Exception as error:
                    if not isinstance(error, (ArmchairError, Busy)):
                        yield _sent("error", {"message": "something went wrong in the server; its log says what"})
                        raise
                    yield _sent("error", {"message": str(error), "retry_after": getattr(error, "retry_after", None)})

        return StreamingResponse(told(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    def entries(request, search: str = "", favourites: bool = False, before: int | None = None):  # type: ignore[no-untyped-def]
        found = history.entries(search[:1000], favourites=favourites, before=before)
        told = [_entry_json(entry, history, service, _is_local(request)) for entry in found]
        return {"entries": told, "more": len(found) == PAGE}

    def entry(request, id: int):  # type: ignore[no-untyped-def]
        return _entry_json(history.entry(id), history, service, _is_local(request))

    def picture(id: int):  # type: ignore[no-untyped-def]
        data = history.png(id)
        headers = {**HEADERS, "cache-control": "private, max-age=31536000, immutable"}  # a picture never changes
        return Response(data, media_type="image/png", headers=headers)

    async def delete(request, id: int):  # type: ignore[no-untyped-def]
        await body(request)
        await run_in_threadpool(history.delete, id)
        return {"deleted": id}

    async def restore(request, id: int):  # type: ignore[no-untyped-def]
        await body(request)
        await run_in_threadpool(history.restore, id)
        return {"restored": id}

    async def favourite(request, id: int):  # type: ignore[no-untyped-def]
        data = await body(request)
        wanted = data.get("favourite") if isinstance(data, dict) else None
        if not isinstance(wanted, bool):
            raise RequestError("favourite: expected true or false")
        await run_in_threadpool(history.set_favourite, id, wanted)
        return {"favourite": wanted}

    async def look(request):  # type: ignore[no-untyped-def]
        data = await body(request)
        if not isinstance(data, dict) or type(data.get("picture")) is not int:
            raise RequestError("picture: expected its number in the history")
        kept = await run_in_threadpool(history.picture, data["picture"])
        record = _record(kept)
        if record is None:
            raise RequestError("this picture does not say what it was drawn with, so there is no looking inside")
        name = _served(service, record)
        if name is None:
            raise RequestError(
                f"this picture was drawn with {record.bundle.name} ({record.bundle.fingerprint[:12]}), which is not "
                "among the models here"
            )
        found = await service.run(name, lambda artist: _look(artist, record))
        return await run_in_threadpool(_look_json, found)

    async def dropped(request):  # type: ignore[no-untyped-def]
        data = await body(request, MAX_DROPPED * 4 // 3 + 1024)
        if not isinstance(data, dict) or not isinstance(data.get("png"), str):
            raise RequestError("png: expected the file's bytes in base64")
        kept = await run_in_threadpool(_take_in, history, data["png"])
        return _entry_json(kept, history, service, _is_local(request))

    for function in (own_page_only, choices, draw, entries, entry, delete, restore, favourite, look, dropped):
        function.__annotations__["request"] = Request  # which is known only here

    router = APIRouter()
    router.get("/", include_in_schema=False)(page)
    router.get("/studio/static/{name}")(static)
    guarded: dict[str, Any] = {"dependencies": [Depends(own_page_only)]}
    router.get("/studio/about", **guarded)(about)
    router.post("/studio/choices", **guarded)(choices)
    router.post("/studio/draw", **guarded)(draw)
    router.get("/studio/history", **guarded)(entries)
    router.get("/studio/history/{id}", **guarded)(entry)
    router.post("/studio/history/{id}/delete", **guarded)(delete)
    router.post("/studio/history/{id}/restore", **guarded)(restore)
    router.get("/studio/pictures/{id}", **guarded)(picture)
    router.post("/studio/pictures/{id}/favourite", **guarded)(favourite)
    router.post("/studio/look", **guarded)(look)
    router.post("/studio/dropped", **guarded)(dropped)
    if ballot is not None:
        from armchair.eval.ballot_page import ballot_app

        router.mount("/ballot", ballot_app(ballot))
    return router


def _requests(wish: Wish, grid: PromptGrid, parent: bytes | None) -> list[DrawRequest]:
    """One for each combination. All have the same seed, so that only the words differ."""
    told: dict[str, Any] = {name: getattr(wish, name) for name in ("model", "candidates", *SETTINGS)}
    told |= {"seed": int(wish.seed), "keep": 1 if grid.choices else 0}
    if parent is not None:
        told |= {"image": Image.open(io.BytesIO(parent)).convert("RGB"), "rectangle": wish.rectangle}
    return [DrawRequest(prompt=prompt, **told) for prompt in grid.prompts()]


async def _draw_all(service: Service, requests: Sequence[DrawRequest]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests, each with its number, a few requests at a time.

    Where there is no room a later one waits for it; the first raises Busy. When it is closed, all are given up.
    """
    told: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue()
    free = asyncio.Semaphore(CELLS_AT_ONCE)
    begun = False

    async def one(cell: int, request: DrawRequest) -> None:
        nonlocal begun
        async with free:
            while True:
                try:
                    async with contextlib.aclosing(service.draw(request, partials=True)) as events:  # type: ignore[type-var]
                        async for event in events:
                            begun = True
                            await told.put((cell, event))
                    return
                except Busy as busy:
                    if not begun:
                        raise
                    await asyncio.sleep(min(busy.retry_after, 5.0))

    async def every() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for cell, request in enumerate(requests):
                    tasks.create_task(one(cell, request))
            await told.put(None)
        except BaseExceptionGroup as errors:
            await told.put(errors.exceptions[0])

    running = asyncio.create_task(every())
    try:
        while (event := await told.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _message(cell: int, event: Event, request: DrawRequest) -> str:
    if isinstance(event, Queued):
        return _sent("queued", {"cell": cell, "position": event.position, "words": _place_in_words(event.position)})
    if isinstance(event, Partial):
        images = [_url(_kept_around(image, request)) for image in event.images]
        drawn = [_drawn(image) for image in event.images] if request.image is None else [1.0] * len(images)
        return _sent("partial", {"cell": cell, "rows": event.rows, "of": event.of, "images": images, "drawn": drawn})
    drawing = event.drawing
    return _sent("cell", {"cell": cell, "image": _url(drawing.images[0]), "score": drawing.scores[0]})


def _drawn(image: Image.Image) -> float:
    """The share of a partial picture's height that is drawn."""
    drawn = (np.asarray(image) != UNDRAWN).any((1, 2)).nonzero()[0]
    return float(drawn[-1] + 1) / image.height if len(drawn) else 0.0


def _place_in_words(position: int) -> str:
    if position == 0:
        return "Drawing"
    return "Yours is next" if position == 1 else f"{position - 1} before yours"


def _kept_around(image: Image.Image, request: DrawRequest) -> Image.Image:
    """A partial picture of a completion: outside of the rectangle it is the original at every moment."""
    if request.image is None or request.rectangle is None or request.image.size != image.size:
        return image
    whole = request.image.copy()
    whole.paste(image.crop(request.rectangle), request.rectangle[:2])
    return whole


def _url(image: Image.Image) -> str:
    """The picture as a data URL; larger ones as JPEG, as they are sent once a row."""
    out = io.BytesIO()
    if image.width <= 128:
        image.save(out, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _sent(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _keep(history: History, wish: Wish, grid: PromptGrid, drawings: dict[int, Drawing]) -> Entry:
    kind = "grid" if grid.choices else "draw" if wish.picture is None else "complete"
    records = [
        (to_dict(drawing.record(i)), image)
        for _, drawing in sorted(drawings.items())
        for i, image in enumerate(drawing.images)
    ]
    pictures = [(record, png_bytes(image, record)) for record, image in records]
    return history.add(kind, wish.prompt, wish.candidates, pictures, parent=wish.picture)


def _take_in(history: History, png: str) -> Entry:
    """Keep a PNG that was dropped on the page. Raises RequestError for one that does not say what it is."""
    try:
        data = base64.b64decode(png, validate=True)
    except ValueError:
        raise RequestError("png: expected base64") from None
    if len(data) > MAX_DROPPED:
        raise RequestError(f"a file of {len(data) >> 20} MiB; expected a PNG of at most {MAX_DROPPED >> 20} MiB")
    name = "this picture"
    found = record_in(io.BytesIO(data), name)
    try:
        if found.get("kind") == "grid":
            raise RequestError("this is a contact sheet; drop one of its pictures instead")
        record = from_dict(Record, found)
    except RequestError as error:
        raise RequestError(f"{name}: its armchair metadata is not what this version reads: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(data), formats=["PNG"])
            if max(file.size) > MAX_SIDE:
                raise RequestError(f"{name}: {file.width} x {file.height} pixels; at most {MAX_SIDE} are read")
            image = file.convert("RGB")
    except RequestError:
        raise
    except Exception:  # Pillow raises a dozen kinds for broken files
        raise RequestError(f"{name}: a PNG that cannot be read") from None
    return history.add("dropped", record.prompt, 1, [(found, png_bytes(image, found))])


def _record(picture: Kept) -> Record | None:
    try:
        return from_dict(Record, picture.record)
    except RequestError:
        return None


def _served(service: Service, record: Record) -> str | None:
    """The name of the served model that drew a picture."""
    for line in service.models.describe():
        if line["fingerprint"] == record.bundle.fingerprint:
            return str(line["name"])
    return None


def _is_local(request: Any) -> bool:
    return request.client is not None and request.client.host in ("127.0.0.1", "::1", "testclient")


def _entry_json(entry: Entry, history: History, service: Service, local: bool) -> dict[str, Any]:
    """An entry for the page; `local`: whether who asks is at this machine."""
    grid = parse_prompt(entry.prompt) if entry.kind == "grid" else None
    source = None
    if entry.parent is not None:
        with contextlib.suppress(RequestError):  # what was completed may be deleted since
            source = history.picture(entry.parent).prompt
    return {
        "id": entry.id,
        "at": entry.at,
        "kind": entry.kind,
        "prompt": entry.prompt,
        "candidates": entry.candidates,
        "parent": entry.parent,
        "choices": None if grid is None else grid.choices,
        "pictures": [_picture_json(picture, entry, source, service, local) for picture in entry.pictures],
    }


def _picture_json(picture: Kept, entry: Entry, source: str | None, service: Service, local: bool) -> dict[str, Any]:
    told: dict[str, Any] = {name: getattr(picture, name) for name in ("id", "prompt", "score", "favourite")}
    told["file"] = f"{slug(picture.prompt)}.png"
    record = _record(picture)
    if record is None:
        return told
    name = _served(service, record)
    defaults, model = Settings(), record.model
    if name is not None:
        line = next(line for line in service.models.describe() if line["name"] == name)
        defaults, model = from_dict(Settings, line["settings"]), _model_flag(service, name, local)
    candidates = entry.candidates
    if entry.kind == "dropped":
        candidates = record.candidate + 1  # as few as bring it
    keep = 1 if entry.kind == "grid" else 0
    command = command_of(record, candidates, keep, defaults=defaults, model=model, source=source)
    return {
        **told,
        "seed": str(record.seed),
        "candidate": record.candidate,
        "settings": to_dict(record.settings),
        "own": {key: value for key, value in vars(record.settings).items() if getattr(defaults, key) != value},
        "model": name,
        "bundle": record.bundle.name,
        "rectangle": record.rectangle,
        "grid": len(record.codes),
        "command": command,
    }


def _model_flag(service: Service, name: str, local: bool) -> str | None:
    """What --model is to be: nothing for the bundled default, and a path only for who is at this machine."""
    path = service.models.sources[name].bundle.path
    if path == find_bundle(None):
        return None
    return str(path.resolve()) if local and name not in bundled_names() else name


def _look(artist: Artist, record: Record) -> Look:
    try:
        codes = np.array(record.codes)
    except ValueError:
        raise RequestError("the codes of this picture are damaged") from None
    return look_inside(artist, codes, record.prompt)


def _look_json(look: Look) -> dict[str, Any]:
    return {
        "codes": look.codes.tolist(),
        "bits": look.bits.round(3).tolist(),
        "words": look.words,
        "attention": look.attention.round(4).tolist(),
        "alone": None if look.alone is None else _url(look.alone),
    }
