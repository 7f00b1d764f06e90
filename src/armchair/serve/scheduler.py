"""Drawing for many at once: one thread a model, and in it continuous batching.

Every turn of the thread puts the next codes of all that is being drawn through the weights together. What was asked for
meanwhile joins at the next turn, what is finished or not wanted any more leaves. Candidates of several requests make up
one micro-batch where they begin together and are drawn with the same settings.

Who shares the batch changes nothing in what comes out: rows of the engine are independent, bit for bit, and what has no
such rows is stepped in micro-batches of one size, one after the other; pictures are decoded and scored in micro-batches
of one size anyway (`armchair.sample`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from armchair.errors import RequestError
from armchair.prior.transformer import PromptCache
from armchair.sample.generate import (
    AHEAD,
    AT_ONCE,
    FREE,
    MICRO_BATCH,
    Decoder,
    MicroBatch,
    candidate_uniforms,
    joined_prompts,
    several_threads,
)
from armchair.sample.native import sharing
from armchair.sample.next_token import Settings
from armchair.sample.pipeline import UNDRAWN, Artist, Drawing, Plan

GROUPS = 4  # micro-batches that are drawn at a time; more bring no more pictures a second, but each costs
SECONDS = 0.3  # a picture, as long as none was drawn

log = logging.getLogger(__name__)


class Queued(NamedTuple):
    """Where a request stands: 0 is being drawn, 1 is next. It is told again when it changes."""

    position: int


class Partial(NamedTuple):
    """Pictures as far as they are drawn, one a candidate; what is not drawn is grey.

    `rows` of the `of` rows of a picture are drawn, on average over the candidates.
    """

    rows: int
    of: int
    images: list[Image.Image]


class Finished(NamedTuple):
    drawing: Drawing


Event = Queued | Partial | Finished
Tell = Callable[[Event | BaseException], None]  # called in the drawing thread; must not wait


class Busy(Exception):
    """There is no room; it is worth asking again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Exception):
    """The server is shutting down."""


@dataclass(eq=False)
class Job:
    """A request on its way. All but `gone` is the drawing thread's own."""

    make_plan: Callable[[Artist], Plan]
    tell: Tell
    size: int  # candidates that were asked for
    partials: bool = False
    gone: bool = False  # whoever asked does not want it any more
    plan: Plan | None = None
    prompt: PromptCache | None = None
    begun: int = 0  # candidates
    ended: int = 0
    position: int | None = None  # that was told
    rows_drawn: dict[int, int] = field(default_factory=dict)  # a candidate
    shown: list[Image.Image] = field(default_factory=list)  # partial pictures
    best: list["Picture"] = field(default_factory=list)


class Picture(NamedTuple):
    """A finished candidate; `place` is its number within the request."""

    place: int
    image: Image.Image
    score: float | None
    codes: np.ndarray  # (S, S)


class Row(NamedTuple):
    """A candidate that is being drawn."""

    job: Job
    place: int


@dataclass(eq=False)
class Group:
    """A micro-batch, and whose its rows are; copies that fill it up are nobody's."""

    batch: MicroBatch
    rows: list[Row]
    shown: int = 0  # rows of the grid


class Look(NamedTuple):
    """A candidate's codes (S, S) that are to become a picture; `rows` of them are drawn."""

    row: Row
    codes: Tensor
    rows: int


class Drawer:
    """The drawing thread of one model.

    `queue` requests may wait at most until something of them is drawn, `pictures` candidates be asked for and not
    finished.
    """

    def __init__(self, artist: Artist, *, queue: int, pictures: int):
        self.artist, self.queue, self.pictures = artist, queue, pictures
        self.decoder: Decoder = artist.decoder()
        self.at_once = AT_ONCE if self.decoder.independent_rows else MICRO_BATCH
        self.jobs: list[Job] = []  # all, in the order they came
        self.seconds = SECONDS  # a picture, lately, of what is drawn together
        self._changed = threading.Condition()  # guards what follows, and `jobs`
        self._arrived: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[Artist], Any], Future]] = deque()
        self._closing = self._stopped = False
        self._ring: deque[Job] = deque()  # jobs of which something is not begun; the first is next
        self._groups: list[Group] = []
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    # What other threads call.

    def submit(self, job: Job) -> None:
        """Take a request in. Raises Busy where the queue is full, Stopping once `close` was called."""
        with self._changed:
            if self._closing:
                raise Stopping("the server is shutting down")
            wanted = self._wanted()
            waiting = sum(not other.begun for other in wanted)
            ahead = _pending(wanted)
            if waiting >= self.queue or wanted and ahead + job.size > self.pictures:
                seconds = max(1.0, ahead * self.seconds)
                raise Busy(f"the queue is full: {waiting} requests wait, {ahead} pictures are to be drawn", seconds)
            self.jobs.append(job)
            self._arrived.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nothing more is told of the job, and its places are free at the next turn."""
        job.gone = True
        with self._changed:
            self._changed.notify()

    def call(self, function: Callable[[Artist], Any]) -> Future:
        """Have the thread call a function between two turns; its result or its error as a future."""
        future: Future = Future()
        with self._changed:
            if self._closing:
                raise Stopping("the server is shutting down")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._wanted() and not self._calls

    def load(self) -> dict[str, int]:
        """Requests that wait and that are drawn, and pictures that are asked for and not finished."""
        with self._changed:
            wanted = self._wanted()
            begun = sum(job.begun > 0 for job in wanted)
            return {"waiting": len(wanted) - begun, "drawing": begun, "pictures": _pending(wanted)}

    def stop_taking(self) -> None:
        """Refuse what comes from now on; what is there is drawn."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Take nothing more in, draw on for so many seconds at most, and tell the rest that the server stops."""
        self.stop_taking()
        self._thread.join(seconds)
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """End at the next turn, and tell all that is there that the server stops."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify()

    def _wanted(self) -> list[Job]:
        return [job for job in self.jobs if not job.gone]

    # The drawing thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._arrived or self._calls or self.jobs or self._closing):
                    self._changed.wait()
                if self._stopped or (self._closing and not (self.jobs or self._calls)):
                    break
                arrived, calls = list(self._arrived), list(self._calls)
                self._arrived.clear()
                self._calls.clear()
            try:
                with torch.inference_mode():
                    self._turn(arrived, calls)
            except Exception as error:  # e.g. no memory: whoever is concerned is told, and the thread goes on
                log.exception("drawing failed")
                self._groups.clear()
                self._end(list(self.jobs), error)
                for _, future in calls:
                    if not future.done():
                        future.set_exception(error)
        self._end(list(self.jobs), Stopping("the server is shutting down"))
        for _, future in self._calls:
            future.set_exception(Stopping("the server is shutting down"))

    def _turn(self, arrived: Iterable[Job], calls: Iterable[tuple[Callable[[Artist], Any], Future]]) -> None:
        self._leave()
        for function, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.artist))
                except Exception as error:
                    future.set_exception(error)
        for job in arrived:
            self._arrive(job)
        began = time.perf_counter()
        self._fill()
        self._tell_positions()
        before = self._codes_known()
        self._step()
        codes = self._codes_known() - before
        self._show()
        if codes > 0:
            share = (time.perf_counter() - began) / codes * self.decoder.shape.image_length
            self.seconds += 0.02 * (share - self.seconds)

    def _arrive(self, job: Job) -> None:
        if job.gone:
            return self._end([job])
        try:
            job.plan = job.make_plan(self.artist)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("a request could not be begun")
            return self._end([job], error)
        with self._changed:
            job.size = len(job.plan.candidates)
        if job.partials:
            blank = Image.new("RGB", (self.artist.resolution, self.artist.resolution), UNDRAWN)
            job.shown = [blank] * job.size
        self._ring.append(job)

    def _leave(self) -> None:
        """Drop what is not wanted any more. Rows of fixed micro-batches are drawn on until no other is wanted."""
        gone = [job for job in self.jobs if job.gone]
        if not gone:
            return
        for group in self._groups:
            wanted = [i for i, row in enumerate(group.rows) if not row.job.gone]
            if self.decoder.independent_rows and 0 < len(wanted) < len(group.rows):
                group.batch.keep(wanted)
                group.rows = [group.rows[i] for i in wanted]
            elif not wanted:
                group.rows = []
        self._groups = [group for group in self._groups if group.rows]
        self._end(gone)

    def _end(self, jobs: list[Job], told: Event | BaseException | None = None) -> None:
        with self._changed:
            self.jobs = [job for job in self.jobs if job not in jobs]
        self._ring = deque(job for job in self._ring if job not in jobs)
        for job in jobs:
            if told is not None and not job.gone:
                job.tell(told)

    def _fill(self) -> None:
        """Begin micro-batches as there is room, requests by turns.

        A request has rows in one at a time: more would not bring it more pictures a second, and one that asks for few
        finds room beside those that ask for many.
        """
        while len(self._groups) < GROUPS and (waiting := [job for job in self._ring if job.begun == job.ended]):
            self._begin(waiting)

    def _begin(self, waiting: list[Job]) -> None:
        """One micro-batch, of the first request that waits and of those after it that go together with it."""
        rows: list[Row] = []
        for job in waiting:
            if not _together(waiting[0], job):
                continue
            assert job.plan is not None
            count = min(self.at_once - len(rows), len(job.plan.candidates) - job.begun)
            rows += [Row(job, job.begun + i) for i in range(count)]
            with self._changed:
                job.begun += count
            self._ring.remove(job)
            if job.begun < len(job.plan.candidates):
                self._ring.append(job)
            if len(rows) == self.at_once:
                break
        self._groups.append(Group(self._micro_batch(rows), rows))

    def _micro_batch(self, rows: list[Row]) -> MicroBatch:
        decoder, device = self.decoder, self.decoder.device
        fill = 0 if decoder.independent_rows else MICRO_BATCH - len(rows)
        uniforms, forced, prompts = [], [], []
        for job, place in rows + rows[-1:] * fill:
            assert job.plan is not None
            job.prompt = job.prompt or self.artist.read_prompt(job.plan.prompt)
            stream = candidate_uniforms(job.plan.seed, [job.plan.candidates[place]], decoder.shape.image_length)
            uniforms.append(stream)
            given = None if job.plan.forced is None else torch.from_numpy(job.plan.forced).view(1, -1)
            forced.append(torch.full_like(stream, FREE, dtype=torch.int64) if given is None else given)
            prompts.append(job.prompt)
        return MicroBatch(
            decoder,
            joined_prompts(prompts),
            self.artist.empty_prompt,
            torch.cat(uniforms).to(device),
            _settings(rows[0].job),
            torch.cat(forced).to(device),
            AHEAD if len(uniforms) == 1 and decoder.independent_rows else 1,
        )

    def _tell_positions(self) -> None:
        waiting = [job for job in self._ring if not job.begun]
        drawing = {id(row.job): row.job for group in self._groups for row in group.rows}.values()
        for position, jobs in ((0, drawing), *((i, [job]) for i, job in enumerate(waiting, start=1))):
            for job in jobs:
                if job.position is None or job.position > position:
                    job.position = position
                    job.tell(Queued(position))

    def _step(self) -> None:
        """Every micro-batch goes on by a pass."""
        groups = [group for group in self._groups if not group.batch.done]
        if not groups:
            return
        total = sum(len(group.rows) for group in groups)
        for group in groups:
            if group.batch.ahead > 1 or len(group.rows) == 1 and group.batch.several:
                group.batch.ahead = max(1, AHEAD // total)  # guesses are for what would be drawn alone
        with sharing(several_threads(self.decoder)):
            every = self.decoder.decode_together([group.batch.step() for group in groups])
            for group, logits in zip(groups, every, strict=True):
                group.batch.take(logits)

    def _codes_known(self) -> int:
        return sum(len(group.rows) * group.batch.known for group in self._groups)

    def _show(self) -> None:
        """Pictures of what is finished, and of finished rows where somebody looks on."""
        looks: list[Look] = []
        grid = self.decoder.shape.grid
        for group in self._groups:
            drawn = group.batch.known // grid
            if drawn == group.shown:
                continue
            group.shown = drawn
            codes = group.batch.shown(drawn).unflatten(1, (grid, grid)).cpu()
            for row, own in zip(group.rows, codes, strict=False):
                if not row.job.gone and (group.batch.done or row.job.partials):
                    looks.append(Look(row, own, drawn))
        self._groups = [group for group in self._groups if not group.batch.done]
        plans = [_plan(look.row.job) for look in looks]
        codes = torch.stack([look.codes for look in looks]).numpy() if looks else np.empty((0, grid, grid), np.int64)
        images = self.artist.pictures(plans, codes, [look.rows for look in looks])
        whole = [i for i, look in enumerate(looks) if look.rows == grid]
        found = self.artist.scores([plans[i] for i in whole], [images[i] for i in whole], codes[whole])
        scores = dict(zip(whole, found, strict=True))
        seen: dict[int, Job] = {}
        for i, (look, image) in enumerate(zip(looks, images, strict=True)):
            job, place = look.row
            seen[id(job)] = job
            job.rows_drawn[place] = look.rows
            if job.partials:
                job.shown[place] = image
            if i in scores:
                self._keep(job, Picture(place, image, scores[i], look.codes.numpy()))
        for job in seen.values():
            if job.partials:
                rows = sum(job.rows_drawn.values()) // len(job.shown)
                job.tell(Partial(rows, grid, list(job.shown)))
            if job.ended == len(_plan(job).candidates):
                self._finish(job)

    def _keep(self, job: Job, picture: Picture) -> None:
        """Of what a request has drawn only the best are held, as many as it wants."""
        with self._changed:
            job.ended += 1
        job.best.append(picture)
        job.best.sort(key=lambda p: (-(p.score or 0.0), p.place))
        del job.best[_plan(job).keep :]

    def _finish(self, job: Job) -> None:
        plan, best = _plan(job), sorted(job.best)
        drawing = self.artist.drawing(
            plan,
            np.stack([picture.codes for picture in best]),
            [picture.image for picture in best],
            [picture.score for picture in best],
            [plan.candidates[picture.place] for picture in best],
        )
        self._end([job], Finished(drawing))


def _pending(jobs: Iterable[Job]) -> int:
    """Pictures that are asked for and not finished."""
    return sum(job.size - job.ended for job in jobs)


def _plan(job: Job) -> Plan:
    assert job.plan is not None
    return job.plan


def _settings(job: Job) -> Settings:
    return _plan(job).settings


def _together(one: Job, other: Job) -> bool:
    """Whether candidates of both can be rows of one micro-batch; what has codes given goes through in fewer passes."""
    return one is other or (
        _settings(one) == _settings(other) and _plan(one).forced is None and _plan(other).forced is None
    )
