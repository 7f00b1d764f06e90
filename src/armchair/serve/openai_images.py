"""The routes under /v1, in the shape of OpenAI's Images API: models, generations, edits, variations, files."""

import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from armchair.errors import RequestError
from armchair.sample.next_token import SETTINGS
from armchair.sample.pipeline import MAX_SEED, Drawing, Rectangle
from armchair.sample.ranker import check_prompt
from armchair.serve.errors import ApiError, Json, error_object
from armchair.serve.images import POSSIBLE, Store, encoded, encoded_image, read_picture, rectangle_of
from armchair.serve.metrics import Metrics
from armchair.serve.service import DrawRequest, Event, Finished, Partial, Service

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_SIDE, MAX_SIDE = 8, 1024  # pixels of a picture that is sent
MAX_TEXT = 32_000  # characters of a prompt, as in OpenAI's API; the model's own bound is lower
MAX_FIELDS, MAX_FILES, MAX_PART = 64, 17, 256 << 10  # of a form; bytes of a field
HEARTBEAT = 15.0  # seconds without an event, after which a comment is sent
GONE = 499  # the status of an answer that nobody is there to read

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Short = Annotated[str, Field(max_length=1000)]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


class Asked(BaseModel):
    """What all three routes take. Fields that are ours come last; null is the same as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: Short | None = Field(None, description="a model or an alias of /v1/models; the default where none is given")
    n: int | None = Field(None, ge=1, le=10, description="how many pictures come back, 1 by default")
    size: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="auto: the model's own square; or another one up to 1024x1024, such as 512x512"
    )
    response_format: Literal["url", "b64_json"] | None = Field(None, description="b64_json by default")
    user: Short | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png by default")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp, 100 by default")

    candidates: int | None = Field(
        None, ge=1, le=4096, description="how many are drawn; the n that the ranker finds best come back. n by default"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the same seed, the same bytes; random by default")
    temperature: float | None = Field(None, description="0 is greedy, 1 the model's own spread")
    top_k: int | None = Field(None, ge=0, description="draw from so many likeliest codes, 0 for all")
    top_p: float | None = Field(None, description="draw from the likeliest codes of this mass, 1 for all")
    min_p: float | None = Field(None, description="leave out codes under so many times the likelihood of the first")
    guidance: float | None = Field(None, description="1 is off; more follows the prompt closer")
    naturalness: float | None = Field(
        None, description="how much it counts in a score how likely a picture is by itself, 0 for not at all"
    )


class Streamed(Asked):
    """What generations and edits take beside. What the model has no use for is accepted and changes nothing."""

    stream: bool | None = Field(None, description="answer with server-sent events")
    partial_images: int | None = Field(None, ge=0, le=3, description="pictures in the making, of a stream")
    quality: Quality | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    safety_identifier: Short | None = None
    frame_count: int | None = Field(None, ge=2, le=16)
    frame_duration_ms: int | None = Field(None, ge=0)


class Generation(Streamed):
    prompt: Text
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None
    svg: dict[str, Any] | None = None


class Edit(Streamed):
    """The rectangle to redraw is the transparent part of `mask`, or of the image itself where there is no mask."""

    prompt: Text
    input_fidelity: Literal["high", "low"] | None = None


class Variation(Asked):
    """The upper part of the picture stays, and the rest is drawn anew."""

    prompt: Text = Field("", description="what the pictures shall show; by default the model goes on untold")
    keep_top: float = Field(0.5, ge=0, lt=1, description="the share of the height that stays")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Text tokens that were read, and codes of a picture that came; codes that were drawn, for all candidates."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class Picture(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str = Field(description="what of the prompt the model reads")
    seed: int
    candidate: int
    score: float | None


class Pictures(BaseModel):
    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    quality: str | None = None
    model: str
    usage: Usage


class ModelLine(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "armchair"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelLine]


ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "the request is wrong, or not allowed, or there is no room (429)"},
    "5XX": {"model": ErrorAnswer, "description": "the server stops, or something failed"},
}


def make_router(service: Service, store: Store, metrics: Metrics) -> APIRouter:
    """The routes. Files are kept in `store` where urls are asked for."""
    router = APIRouter(tags=["images"])
    decoding = asyncio.Semaphore(2)  # large pictures in memory at a time

    @router.get("/v1/models", response_model=ModelList, responses=ANSWERS)
    async def models() -> Any:
        created = service.models.created
        names = [*service.models.names(), *service.models.aliases]
        return ModelList(data=[ModelLine(id=name, created=created) for name in names])

    @router.get("/v1/models/{model:path}", response_model=ModelLine, responses=ANSWERS)
    async def model(model: str) -> Any:
        service.models.resolve(model)
        return ModelLine(id=model, created=service.models.created)

    @router.post("/v1/images/generations", response_model=Pictures, responses=ANSWERS)
    async def generate(body: Generation, request: Request) -> Response:
        _check_text(body.prompt)
        return await draw(request, body, "image_generation", body.prompt)

    @router.post(
        "/v1/images/edits", response_model=Pictures, responses=ANSWERS, openapi_extra=_form(Edit, "image", "mask")
    )
    async def edit(request: Request) -> Response:
        body, files = await _read_form(request, Edit, "image", "mask")
        _check_text(body.prompt)
        side = service.models.resolution(body.model)
        async with decoding:
            image, rectangle = await asyncio.to_thread(_image_and_rectangle, files, side)
        return await draw(request, body, "image_edit", body.prompt, image, rectangle)

    @router.post(
        "/v1/images/variations", response_model=Pictures, responses=ANSWERS, openapi_extra=_form(Variation, "image")
    )
    async def vary(request: Request) -> Response:
        body, files = await _read_form(request, Variation, "image")
        if body.prompt:
            _check_text(body.prompt)
        side = service.models.resolution(body.model)
        async with decoding:
            image = await asyncio.to_thread(read_picture, files["image"], "image")
        rectangle = 0, min(round(body.keep_top * side), side - 1), side, side
        return await draw(request, body, "image_variation", body.prompt, image, rectangle)

    @router.get(
        "/v1/images/files/{name}",
        responses={200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}, **ANSWERS},
        response_class=Response,
    )
    async def file(name: str) -> Response:
        kept = store.find(name)
        if kept is None:
            raise ApiError(404, "there is no such file, or its time is over", code="not_found")
        return Response(kept.data, media_type=kept.media_type, headers={"cache-control": "private, max-age=3600"})

    async def draw(
        request: Request,
        body: Asked,
        kind: str,
        prompt: str,
        image: Image.Image | None = None,
        rectangle: Rectangle | None = None,
    ) -> Response:
        n = body.n or 1
        if body.candidates is not None and body.candidates < n:
            raise RequestError(f"candidates: expected at least n, which is {n}, got {body.candidates}")
        asked = DrawRequest(
            prompt=prompt,
            model=service.models.resolve(body.model),
            candidates=body.candidates or n,
            keep=n,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            **{name: getattr(body, name) for name in SETTINGS},
            image=image,
            rectangle=rectangle,
        )
        answer = _Answer(service, asked, body, kind)
        streamed = isinstance(body, Streamed) and bool(body.stream)
        partials = body.partial_images or 0 if isinstance(body, Streamed) and streamed else 0
        events = service.draw(asked, partials=partials > 0)
        if streamed:
            first = await anext(events)  # what is refused is refused before the answer begins
            return EventStream(answer.stream(first, events, partials, metrics))
        drawing = await _while_there(request, _last(events))
        if drawing is None:
            return Response(status_code=GONE)
        metrics.pictures[answer.model] += len(drawing.images)
        where = None
        if body.response_format == "url":
            where = str(request.url_for("file", name="NAME"))
        return Json((await asyncio.to_thread(answer.whole, drawing, store, where)).model_dump(mode="json"))

    return router


class _Answer:
    """How a drawing goes back to whoever asked."""

    def __init__(self, service: Service, asked: DrawRequest, body: Asked, kind: str):
        self.service, self.asked, self.kind = service, asked, kind
        self.model = service.models.resolve(asked.model)
        self.resolution = service.models.resolution(self.model)
        self.side = side_of(body.size, self.resolution)
        self.form = body.output_format or "png"
        self.quality = 100 if body.output_compression is None else body.output_compression
        asked_quality = body.quality if isinstance(body, Streamed) else None
        self.said_quality = asked_quality if asked_quality in ("low", "medium", "high", "xhigh", "max") else None

    @property
    def size(self) -> str:
        return f"{self.side}x{self.side}"

    def whole(self, drawing: Drawing, store: Store, where: str | None) -> Pictures:
        """All pictures, in the answer itself or with `where` as urls, in which NAME is to be replaced."""
        words, usage = self._read(drawing)
        data = []
        for i, (seed, candidate, score) in enumerate(self._rows(drawing)):
            file = encoded(drawing, i, self.side, self.form, self.quality)
            picture = Picture(revised_prompt=words, seed=seed, candidate=candidate, score=score)
            if where is None:
                picture.b64_json = base64.b64encode(file).decode()
            else:
                picture.url = where.replace("NAME", store.add(file, self.form))
            data.append(picture)
        return Pictures(
            created=int(time.time()),
            data=data,
            output_format=self.form,  # type: ignore[arg-type]
            size=self.size,
            quality=self.said_quality,
            model=self.model,
            usage=usage,
        )

    async def stream(
        self, first: Event, events: AsyncIterator[Event], partials: int, metrics: Metrics
    ) -> AsyncIterator[bytes]:
        """Server-sent events: partial pictures at even distances, of the first candidate, then the best one or ones."""
        sent = passed = 0
        try:
            async for event in _with_heartbeats(first, events):
                if event is None:
                    yield b": waiting\n\n"
                elif isinstance(event, Partial) and passed < partials and event.rows < event.of:
                    due = sum(event.rows >= event.of * (i + 1) // (partials + 1) for i in range(partials))
                    if due > passed:
                        passed = due
                        yield await asyncio.to_thread(self._partial, event, sent)
                        sent += 1
                elif isinstance(event, Finished):
                    metrics.pictures[self.model] += len(event.drawing.images)
                    for message in await asyncio.to_thread(self._completed, event.drawing):
                        yield message
        except Exception as error:
            log.exception("a stream was cut short")
            yield _message("error", {"type": "error", **error_object(500, f"drawing stopped: {type(error).__name__}")})
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _partial(self, event: Partial, index: int) -> bytes:
        file = encoded_image(event.images[0], self.side, self.form, self.quality)
        return self._event("partial_image", file, {"partial_image_index": index})

    def _completed(self, drawing: Drawing) -> list[bytes]:
        words, usage = self._read(drawing)
        messages = []
        for i, (seed, candidate, score) in enumerate(self._rows(drawing)):
            file = encoded(drawing, i, self.side, self.form, self.quality)
            own = {"usage": usage.model_dump(), "revised_prompt": words, "seed": seed}
            messages.append(self._event("completed", file, {**own, "candidate": candidate, "score": score}))
        return messages

    def _event(self, name: str, file: bytes, own: dict[str, Any]) -> bytes:
        kind = f"{self.kind}.{name}"
        data = {
            "type": kind,
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "background": "opaque",
            "output_format": self.form,
            "quality": self.said_quality or "auto",
            "size": self.size,
            **own,
        }
        return _message(kind, data)

    def _rows(self, drawing: Drawing) -> list[tuple[int, int, float | None]]:
        return list(zip(drawing.seeds, drawing.candidates, drawing.scores, strict=True))

    def _read(self, drawing: Drawing) -> tuple[str, Usage]:
        artist = self.service.models.artist(self.model)
        words, text = artist.reads(self.asked.prompt)
        image, codes = artist.shape.image_length, artist.shape.image_length
        drawn = self.asked.candidates if artist.ranker is not None else len(drawing.images)
        if drawing.forced is not None:
            codes = int((drawing.forced < 0).sum())
        given = 0 if self.asked.image is None else image
        return words, Usage(
            input_tokens=text + given,
            input_tokens_details=TokenDetails(text_tokens=text, image_tokens=given),
            output_tokens=drawn * codes,
            output_tokens_details=TokenDetails(text_tokens=0, image_tokens=drawn * codes),
            total_tokens=text + given + drawn * codes,
        )


def side_of(size: str | None, resolution: int) -> int:
    """The side that a picture is sent with, in pixels. Raises RequestError for a size that is not possible."""
    if size is None or size == "auto":
        return resolution
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size, re.ASCII)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if width != height or not (MIN_SIDE <= width <= MAX_SIDE or width == resolution):
        raise RequestError(
            f"size: this model draws squares of {resolution}x{resolution}, which are sent as they are or resized, from "
            f"{MIN_SIDE}x{MIN_SIDE} to {MAX_SIDE}x{MAX_SIDE}; expected auto or such a size, got {size!r}"
        )
    return width


class EventStream(Response):
    """Server-sent events; when whoever reads them goes away, their source is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncIterator[bytes]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self.source) as messages:  # type: ignore[type-var]
                async for message in messages:
                    await send({"type": "http.response.body", "body": message, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await _first_of(send_all(), _gone(receive))


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives, or None where whoever asked goes away before; then it is cancelled."""
    return await _first_of(work, _gone(request.receive))


async def _first_of(work: Coroutine[Any, Any, T], end: Coroutine[Any, Any, None]) -> T | None:
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _last(events: AsyncIterator[Event]) -> Drawing:
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Finished):
                return event.drawing
    raise RuntimeError("drawing ended without a picture")


async def _with_heartbeats(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event | None]:
    """The events, and None where there was none for a while."""
    yield first
    upcoming: asyncio.Future[Event] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({upcoming}, timeout=HEARTBEAT)
            if not done:
                yield None
                continue
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)


def _message(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


def _check_text(prompt: str) -> None:
    """As `check_prompt`; and surrogates, of which half a character was sent, are refused."""
    check_prompt(prompt)
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise RequestError("prompt: expected whole Unicode characters, got half of a surrogate pair")


def _image_and_rectangle(files: Mapping[str, bytes], resolution: int) -> tuple[Image.Image, Rectangle]:
    image = read_picture(files["image"], "image")
    if "mask" not in files:
        if image.mode != "RGBA":
            raise RequestError(
                f"mask: {POSSIBLE}, of `mask` or of `image` itself; neither was given"
            )
        return image, rectangle_of(image, resolution)
    mask = read_picture(files["mask"], "mask")
    if mask.size != image.size:
        raise RequestError(
            f"mask: expected the size of the image, {image.width} x {image.height}, got {mask.width} x {mask.height}"
        )
    return image, rectangle_of(mask, resolution)


B = TypeVar("B", bound=Asked)


async def _read_form(request: Request, form: type[B], *names: str) -> tuple[B, dict[str, bytes]]:
    """A multipart form: its fields, checked, and its files by name, of which the first is needed."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, "expected multipart/form-data", code="invalid_content_type")
    known = {*names, *form.model_fields}
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_PART) as data:
            for name, value in data.multi_items():
                name = name.removesuffix("[]")
                if name in fields or name in files:
                    raise RequestError(f"{name if name in known else 'a field'}: expected it once")
                if isinstance(value, UploadFile):
                    if name not in names:
                        raise RequestError(f"expected files called {' and '.join(names)}, got another one")
                    files[name] = await value.read()
                elif name in names:
                    raise RequestError(f"{name}: expected a file")
                elif not name.startswith("svg["):
                    fields[name] = value
    except (HTTPException, RequestError):
        raise
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    except Exception as error:  # the parser raises several kinds on damaged forms
        raise ApiError(400, f"the form could not be read: {type(error).__name__}") from None
    if names[0] not in files:
        raise ApiError(400, f"{names[0]}: expected a PNG, JPEG or WEBP file", param=names[0])
    try:
        return form.model_validate(fields, strict=False), files
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _form(form: type[Asked], *names: str) -> dict[str, Any]:
    """What OpenAPI says of a multipart form with these files, of which the first is needed."""
    schema = form.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in names}
    schema["properties"] = {**files, **schema["properties"]}
    schema["required"] = [names[0], *schema.get("required", ())]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
