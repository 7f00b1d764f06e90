"""Which benchmark pictures are among the training pictures, near enough (paper, section 2.5: data overlap).

With a ranker, pictures are compared where it puts them, as the paper does; without one, by a perceptual hash.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from armchair.data.sources import Source
from armchair.errors import DataError, RequestError
from armchair.image.pixels import BrokenSample, square
from armchair.image.sheet import contact_sheet
from armchair.sample.ranker import Ranker

SIDE = 32  # pixels that a hash is made from
LUMA, CHROMA = 12, 6  # lowest frequencies of each axis that it keeps
MARGIN = 0.025  # of a side: a training picture is known with its margin cut off too, in case that was done to it
HASH_DISTANCE, RANKER_DISTANCE = 0.06, 0.02  # cosine distances up to which pictures are duplicates, by default
THUMBNAIL = 64
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Match:
    """A benchmark picture and the nearest training picture; `distance` is 1 - cosine."""

    bench: str
    train: str
    distance: float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Every benchmark picture with its nearest training picture, nearest first; up to `threshold` are duplicates."""

    matches: list[Match]
    threshold: float
    by: str  # what pictures were compared through
    thumbnails: dict[str, np.ndarray]  # of the nearest pairs, by `train:KEY` and `bench:KEY`

    @property
    def duplicates(self) -> list[Match]:
        return [match for match in self.matches if match.distance <= self.threshold]

    def sheet(self, pairs: int) -> Image.Image:
        """The nearest pairs, benchmark picture first, with distances, so that a threshold can be chosen by looking."""
        images, labels = [], []
        for match in self.matches[:pairs]:
            images += [self.thumbnails[f"bench:{match.bench}"], self.thumbnails[f"train:{match.train}"]]
            labels += [f"{match.distance:.3f}" + (" same" if match.distance <= self.threshold else ""), match.train]
        return contact_sheet([Image.fromarray(image) for image in images], labels, columns=8, scale=2)


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (F,) of length one: the low frequencies of brightness and of two colour differences.

    The mean brightness is left out and the length is one, so that a picture that was brightened, saved again or resized
    keeps its hash nearly (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, without
    the rounding to bits).
    """
    x = square(image, SIDE).astype(np.float32) / 255
    luma = x @ np.array([0.299, 0.587, 0.114], np.float32)
    blue, red = x[..., 2] - luma, x[..., 0] - luma
    steps = np.arange(SIDE)
    cosines = np.cos(np.pi / SIDE * (steps + 0.5) * steps[:, None]).astype(np.float32)  # a row a frequency (DCT-II)
    bright = (cosines[:LUMA] @ luma @ cosines[:LUMA].T).ravel()[1:]
    colours = [(cosines[:CHROMA] @ c @ cosines[:CHROMA].T).ravel() for c in (blue, red)]
    hashed = np.concatenate([bright, *colours])
    return hashed / max(float(np.linalg.norm(hashed)), 1e-6)


def find_overlap(
    train: Source,
    bench: Source,
    *,
    ranker: Ranker | None = None,
    threshold: float | None = None,
    shown: int = 48,
    say: Callable[[str], None] = lambda text: None,
) -> Overlap:
    """The nearest training picture of each benchmark picture, through an index of both versions of each (whole, and
    without its margin). Broken pictures are passed over. Raises DataError where a side has no readable picture."""
    new_index = _new_index()
    if threshold is not None and not 0 <= threshold <= 2:
        raise RequestError(f"threshold: expected a cosine distance from 0 to 2, got {threshold}")
    limit = (HASH_DISTANCE if ranker is None else RANKER_DISTANCE) if threshold is None else threshold
    index = None
    numbers: list[int] = []  # of the training picture that an entry of the index is of
    for chunk in _chunks(train, "training pictures", say):
        for variant in (lambda image: image, _without_margin):
            vectors = _vectors([variant(image) for _, image in chunk], ranker)
            index = new_index(vectors.shape[1]) if index is None else index
            index.add(vectors)
            numbers += [i for i, _ in chunk]
    if index is None:
        raise DataError("the training pictures: none is readable")
    matches: list[Match] = []
    pairs: list[tuple[int, int]] = []
    for chunk in _chunks(bench, "benchmark pictures", say):
        cosines, entries = index.search(_vectors([image for _, image in chunk], ranker), 1)
        for (i, _), cosine, entry in zip(chunk, cosines[:, 0].tolist(), entries[:, 0].tolist(), strict=True):
            j = numbers[entry]
            matches.append(Match(bench=bench.key(i), train=train.key(j), distance=max(0.0, 1 - cosine)))
            pairs.append((i, j))
    if not matches:
        raise DataError("the benchmark pictures: none is readable")
    order = sorted(range(len(matches)), key=lambda n: matches[n].distance)
    thumbnails = {}
    for n in order[:shown]:
        i, j = pairs[n]
        thumbnails[f"bench:{matches[n].bench}"] = square(bench[i].image, THUMBNAIL)
        thumbnails[f"train:{matches[n].train}"] = square(train[j].image, THUMBNAIL)
    by = "perceptual hash" if ranker is None else f"ranker of {ranker.id.name} ({ranker.id.fingerprint[:16]})"
    return Overlap(matches=[matches[n] for n in order], threshold=limit, by=by, thumbnails=thumbnails)


def _chunks(source: Source, name: str, say: Callable[[str], None]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Lists of (index, uint8 picture) of the readable ones."""
    chunk: list[tuple[int, np.ndarray]] = []
    for i in range(len(source)):
        try:
            chunk.append((i, source[i].image))
        except BrokenSample:
            continue
        finally:
            if (i + 1) % 2000 == 0:
                say(f"{name}: {i + 1} of {len(source)}")
        if len(chunk) == BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _vectors(images: Sequence[np.ndarray], ranker: Ranker | None) -> np.ndarray:
    if ranker is None:
        return np.stack([perceptual_hash(image) for image in images]).astype(np.float32)
    return ranker.embed_images([Image.fromarray(image) for image in images]).numpy()


def _without_margin(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left, cut = (height - side) // 2, (width - side) // 2, round(MARGIN * side)
    return image[top + cut : top + side - cut, left + cut : left + side - cut]


def _new_index() -> Callable[[int], Any]:
    """A maker of exact indices over vectors of a given size, by inner product."""
    try:
        from faiss import IndexFlatIP
    except ImportError:
        raise RequestError("looking for overlap needs one more package: pip install 'armchair[evaluate]'") from None
    return IndexFlatIP
