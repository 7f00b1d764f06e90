"""From a source to training batches: visiting order, crops and captions, all pure functions of the seed."""

import functools
import itertools
import logging
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from armchair.config import nearest
from armchair.data.sources import DataConfig, Sample, Source, digest, expand_template
from armchair.errors import DataError, RequestError
from armchair.image.pixels import BrokenSample, random_crop, square, stack
from armchair.runtime import stream_seed

logger = logging.getLogger(__name__)

MAX_BROKEN = 0.01
GOLDEN = (5**0.5 - 1) / 2


class Skips:
    """Counts the broken samples of a source by cause, logs each once, and stops when they are many.

    The rule: with n samples in the source and v visited so far, at most 1 % of min(n, max(v, 1000)) distinct
    samples may be broken. So a source under 100 samples may have none, a small one is judged by its own size,
    and a large one by what was visited once that is 1000 or more. Counting starts anew when a run is resumed.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.visited = 0
        self.causes: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    def visit(self) -> None:
        """Count a sample that is about to be read."""
        with self._lock:
            self.visited += 1

    def add(self, key: str, cause: str) -> None:
        """Count a broken sample. Raises DataError with the counts when there are too many."""
        with self._lock:
            if key not in self._keys:
                self._keys.add(key)
                self.causes[cause] += 1
                logger.warning("skipped %r: %s", key, cause)
            broken = len(self._keys)
            if broken > MAX_BROKEN * min(self.total, max(self.visited, 1000)):
                counts = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
                raise DataError(
                    f"{broken} broken samples among the first {min(self.visited, self.total)} visited of "
                    f"{self.total}, more than {MAX_BROKEN:.0%} ({counts}); the log names each"
                )


class Order:
    """The endless order in which samples are visited: a pure function of (n or weights, seed, position).

    An epoch is n positions. Without weights each epoch is a permutation of the n samples. With weights each
    is a systematic resample, shuffled: in every epoch sample i occurs n w_i / sum(w) times, rounded up or
    down so that over the epochs visits are in proportion to w_i. Raises RequestError for weights that cannot
    be sampled from.
    """

    def __init__(self, n_or_weights: int | np.ndarray, seed: int) -> None:
        self.seed = seed
        self.weights: np.ndarray | None = None
        if isinstance(n_or_weights, np.ndarray):
            weights = self.weights = n_or_weights.astype(np.float64)
            if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
                raise RequestError(
                    "sampling weights: expected finite numbers, none below 0, not all of them 0"
                )
        self.n = len(n_or_weights) if isinstance(n_or_weights, np.ndarray) else int(n_or_weights)
        if self.n < 1:
            raise RequestError("no samples to visit")
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def indices(self, start: int, count: int) -> np.ndarray:
        """The samples at positions start .. start + count - 1, int64 (count,)."""
        positions = np.arange(start, start + count)
        out = np.empty(count, dtype=np.int64)
        epochs = positions // self.n
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._epoch(int(epoch))[positions[here] % self.n]
        return out

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(stream_seed(self.seed, "order", epoch)))
        if self.weights is None:
            return rng.permutation(self.n)
        ends = np.cumsum(self.weights)
        ends *= self.n / ends[-1]
        # Golden-ratio steps spread the offset evenly over the epochs, so that rare samples get their share.
        offset = (stream_seed(self.seed, "offset") / 2**63 + epoch * GOLDEN) % 1
        chosen = np.searchsorted(ends, np.arange(self.n) + offset, side="right")
        return rng.permutation(np.minimum(chosen, np.flatnonzero(self.weights)[-1]))


class Subset:
    """A view of some samples of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        return self.source[self._at(i)]

    def key(self, i: int) -> str:
        return self.source.key(self._at(i))

    def fields(self, i: int) -> dict[str, Any]:
        return self.source.fields(self._at(i))

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), self.indices.astype("<i8").tobytes()])

    def _at(self, i: int) -> int:
        if i < 0:
            raise IndexError(i)
        return int(self.indices[i])


def split(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Training and validation views; a sample's side is by the hash of its key and stays when data is added.

    About `fraction` of the samples are validation. With a fraction above 0 and two samples or more, neither
    side is empty.
    """
    hashes = np.array([int(digest([source.key(i)])[:8], 16) / 2**32 for i in range(len(source))])
    val = hashes < fraction
    if fraction > 0 and len(source):
        val[hashes.argmin()] = True
        val[hashes.argmax()] = False  # of a single sample too: it is trained on
    return Subset(source, np.flatnonzero(~val)), Subset(source, np.flatnonzero(val))


def sample_weights(source: Source, config: DataConfig) -> np.ndarray | None:
    """How often each sample is visited, float64 (N,) with mean 1, or None where all are equal.

    A sample's factor is the product over the patterns of `config.weights` found in its captions. With
    `config.balance` a group's share of the visits is the square root of the sum of its factors; samples
    without the field are a group of their own. Raises RequestError for a balance field that no sample has,
    and for factors that leave nothing to visit.
    """
    if not config.weights and config.balance is None:
        return None
    patterns = [(re.compile(pattern), factor) for pattern, factor in config.weights.items()]
    weights = np.ones(len(source))
    usable = np.zeros(len(source), dtype=bool)
    groups: dict[str, int] = {}
    group_of = np.full(len(source), -1)
    names: set[str] = set()
    for i in range(len(source)):
        try:
            fields = source.fields(i)
        except BrokenSample:
            continue
        usable[i] = True
        names.update(fields)
        text = "\n".join(fields["caption"])
        for pattern, factor in patterns:
            if pattern.search(text):
                weights[i] *= factor
        if config.balance is not None:
            group_of[i] = groups.setdefault(repr(fields.get(config.balance)), len(groups))
    if config.balance is not None:
        if names and config.balance not in names:
            hint = nearest(config.balance, names)
            raise RequestError(f"balance: no sample has the field {config.balance!r}: {hint}")
        for group in range(len(groups)):
            members = group_of == group
            size = weights[members].sum()
            weights[members] /= np.sqrt(size) if size > 0 else 1
    if usable.any():
        mean = weights[usable].mean()
        if mean == 0:
            raise RequestError("weights: every sample has the factor 0, so there is nothing to visit")
        weights /= mean
        weights[~usable] = (
            1  # the broken are met as often as the others, so that their share is judged rightly
        )
    return weights


def load_item(
    source: Source, i: int, position: int, config: DataConfig, seed: int, skips: Skips | None = None
) -> tuple[np.ndarray, str]:
    """Sample i as visited at `position`: uint8 (R, R, 3) and one caption.

    Crop and caption are drawn from a generator that is a pure function of (seed, position). A broken sample
    is counted in `skips` and another one, drawn from the same generator, takes its place. Raises DataError
    when there are too many broken samples.
    """
    rng = np.random.Generator(np.random.PCG64(stream_seed(seed, "item", position)))
    for _ in range(100):
        if skips is not None:
            skips.visit()
        try:
            sample = source[i]
            caption = draw_caption(caption_choices(source, i, sample, config), rng)
        except BrokenSample as broken:
            if skips is not None:
                skips.add(source.key(i), broken.cause)
            i = int(rng.integers(len(source)))
            continue
        if config.crop == "square":
            return square(sample.image, config.resolution), caption
        return random_crop(sample.image, config.resolution, rng, config.flip), caption
    raise DataError("100 broken samples one after the other; the data cannot be used")


def share_of_batch(batch_size: int, rank: int, world: int) -> slice:
    """The rows of a batch that are for `rank` of `world` processes. Raises RequestError for what does not fit."""
    if batch_size < 1 or world < 1 or batch_size % world or not 0 <= rank < world:
        raise RequestError(
            f"batch_size {batch_size} on rank {rank} of {world}: expected a multiple of the number of ranks, "
            f"and a rank from 0 to {world - 1}"
        )
    local = batch_size // world
    return slice(rank * local, (rank + 1) * local)


def batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    prefetch: int = 2,
    order: Order | None = None,
    skips: Skips | None = None,
) -> Generator[tuple[Tensor, list[str]], None, None]:
    """Endless training batches from `start_step` on: float32 (B / world, 3, R, R) in [0, 1], and captions.

    `batch_size` is B, the size over all ranks. Step s of rank r is the positions from s B + r B / world on of
    `order`, by default that of `sample_weights`. `threads` load `prefetch` batches ahead, and change nothing
    in what comes out. Closing the generator stops them. Raises RequestError for sizes that do not fit,
    DataError when more than 1 % of the samples are broken (see Skips).
    """
    mine = share_of_batch(batch_size, rank, world)
    if threads < 1 or prefetch < 1:
        raise RequestError(f"expected 1 or more threads and prefetched batches, got {threads} and {prefetch}")
    if order is None:
        weights = sample_weights(source, config)
        order = Order(len(source) if weights is None else weights, seed)
    if order.n != len(source):
        raise RequestError(f"the order is of {order.n} samples, the source has {len(source)}")
    if skips is None:
        skips = Skips(len(source))

    def items(step: int) -> Iterator[tuple[np.ndarray, str]]:
        first = step * batch_size + mine.start
        for position, i in enumerate(order.indices(first, mine.stop - mine.start).tolist(), start=first):
            yield load_item(source, i, position, config, seed, skips)

    return _stream(items, start_step, threads, prefetch)


def _stream(
    items: Callable[[int], Iterator[tuple[np.ndarray, str]]], start_step: int, threads: int, prefetch: int
) -> Generator[tuple[Tensor, list[str]], None, None]:
    """The batches of `items(step)` for start_step, start_step + 1, ..., each loaded whole by one thread."""
    stop = threading.Event()

    def load(step: int) -> tuple[Tensor, list[str]]:
        images, captions = [], []
        for image, caption in items(step):
            if stop.is_set():
                raise CancelledError
            images.append(image)
            captions.append(caption)
        return stack(images), captions

    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    steps = itertools.count(start_step)
    pending: deque[Future] = deque()
    try:
        while True:
            while len(pending) <= prefetch:  # the one that is due, and those ahead
                pending.append(pool.submit(load, next(steps)))
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def all_captions(source: Source, limit: int) -> Iterator[str]:
    """The captions of the first `limit` samples that are not broken, as they are written."""
    for i in range(min(len(source), limit)):
        try:
            yield from source.fields(i)["caption"]
        except BrokenSample:
            continue


def caption_choices(source: Source, i: int, sample: Sample, config: DataConfig) -> list[list[str]]:
    """What a sample's caption is drawn from: one list a template, each as likely as the other, of its texts.

    Raises BrokenSample where no template gives a caption.
    """
    if config.captions == ("{caption}",):  # the usual case, without reading the sample again
        return [list(sample.captions)]
    fields = {**source.fields(i), "caption": sample.captions}
    choices = [found for template in config.captions if (found := expand_template(template, fields))]
    if not choices:
        raise BrokenSample("no caption from any template")
    return choices


def draw_caption(choices: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    """One text of one of the lists."""
    texts = choices[int(rng.integers(len(choices)))]
    return texts[int(rng.integers(len(texts)))]
