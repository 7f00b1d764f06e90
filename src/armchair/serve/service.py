"""Drawing as a service, for asyncio: a request in, events out. It knows nothing of HTTP."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from PIL import Image

from armchair.errors import RequestError
from armchair.sample.next_token import SETTINGS
from armchair.sample.pipeline import Artist, Plan, Rectangle
from armchair.sample.ranker import check_prompt, square_of
from armchair.serve.models import Models, UnknownModel
from armchair.serve.scheduler import Busy, Drawer, Event, Finished, Job, Partial, Queued, Stopping

__all__ = ["Busy", "DrawRequest", "Event", "Finished", "Partial", "Queued", "Service", "Stopping", "UnknownModel"]

MAX_CANDIDATES = 512  # of a request, by default

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What `Artist.draw` is asked for, or with an image `Artist.complete`. None: the model's own.

    `image` is to be completed: what lies outside `rectangle` (x, y, x2, y2 in pixels of the model's resolution, the
    ends exclusive) stays. It is cut square and resized.
    """

    prompt: str
    model: str | None = None
    candidates: int = 4
    keep: int = 0  # 0: all, best first
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance: float | None = None
    naturalness: float | None = None
    image: Image.Image | None = None
    rectangle: Rectangle | None = None


class Service:
    """The models, and what may be asked of them. `candidates` is the most that a request may have."""

    def __init__(self, models: Models, *, candidates: int = MAX_CANDIDATES):
        self.models, self.candidates = models, candidates
        self._closing = False

    async def draw(self, request: DrawRequest, *, partials: bool = False) -> AsyncIterator[Event]:
        """Where the request stands, with `partials` how its pictures grow, and at last the drawing.

        Raises RequestError for a wrong request, UnknownModel, Busy where there is no room, and Stopping where the
        server ends: what is known at once, before the first event. When the iterator is closed the request is given up,
        and its places are free at the next step. The same request gives the same bytes, whoever shares the batch.
        """
        if request.prompt or request.image is None:
            check_prompt(request.prompt)
        if request.candidates > self.candidates:
            raise RequestError(f"candidates: expected at most {self.candidates} here, got {request.candidates}")
        if request.image is not None:  # off the drawing thread, as it may be large
            side = self.models.resolution(request.model)
            square = await asyncio.to_thread(square_of, request.image, side)
            make_plan = partial(_plan, request, Image.fromarray(square))
        else:
            make_plan = partial(_plan, request, None)
        mailbox = _Mailbox()
        job = Job(make_plan, mailbox.tell, size=max(1, request.candidates), partials=partials)

        def submit(drawer: Drawer) -> Drawer:
            drawer.submit(job)
            return drawer

        drawer = await self._taken(request.model, submit)
        try:
            while True:
                event = await mailbox.next()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            drawer.cancel(job)

    async def run(self, model: str | None, function: Callable[[Artist], T]) -> T:
        """What a function makes of the model's artist, in the drawing thread, between two steps of drawing.

        Raises UnknownModel, Busy, Stopping, and what the function raises.
        """
        return await asyncio.wrap_future(await self._taken(model, lambda drawer: drawer.call(function)))

    async def close(self, seconds: float = 0.0) -> None:
        """Refuse what comes from now on, and finish what is there, for so many seconds at most."""
        self._closing = True
        await asyncio.to_thread(self.models.close, seconds)

    def stop(self) -> None:
        """End what is being drawn at the next step."""
        self._closing = True
        for drawer in self.models.opened().values():
            drawer.stop()

    async def _drawer(self, model: str | None) -> Drawer:
        name = self.models.resolve(model)
        if (drawer := self.models.open_drawer(name)) is not None:
            return drawer
        return await asyncio.to_thread(self.models.drawer, name)

    async def _taken(self, model: str | None, take: Callable[[Drawer], T]) -> T:
        """What `take` gives for the model's drawing thread; asked again where that was closed for another model."""
        for _ in range(3):
            drawer = await self._drawer(model)
            with contextlib.suppress(Stopping):
                return take(drawer)
            if self._closing:
                break
        raise Stopping("the server is shutting down")


def _plan(request: DrawRequest, image: Image.Image | None, artist: Artist) -> Plan:
    return artist.plan(
        request.prompt,
        image=image,
        redraw=request.rectangle,
        candidates=request.candidates,
        keep=request.keep,
        seed=request.seed,
        **{name: getattr(request, name) for name in SETTINGS},
    )


class _Mailbox:
    """Events from the drawing thread. Of partial pictures that nobody took only the last is held, so that a slow reader
    costs no memory."""

    def __init__(self) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[Event | BaseException] = deque()

    def tell(self, event: Event | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | BaseException) -> None:
        if self._events and isinstance(event, (Queued, Partial)) and type(self._events[-1]) is type(event):
            self._events.pop()
        self._events.append(event)
        self._ready.set()

    async def next(self) -> Event | BaseException:
        while not self._events:
            self._ready.clear()
            await self._ready.wait()
        return self._events.popleft()
