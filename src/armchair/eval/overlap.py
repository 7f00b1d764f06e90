"""Which benchmark pictures are among the training pictures, near enough (paper, section 2.5: data overlap).

With a ranker, pictures are compared where it puts them, as the paper does. Without one, a perceptual hash finds the
nearest few, and each of these is laid over the picture, cropped a little and brightened as fits best: what is left over
says whether the two are the same.
"""

import functools
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
CANDIDATES = 6  # nearest hashes that are looked at closely
OVERLAY_DISTANCE, RANKER_DISTANCE = 0.25, 0.02  # up to which two pictures are the same, by default
OVERLAY = 16  # pixels of a side at which they are: what JPEG does to colours and edges is hardly seen there
SCALES = (1.0, 0.975, 0.95, 0.925)  # of a side: what may be left of a picture that was cropped
PLACES = 4  # of each axis, where a crop may lie
THUMBNAIL = 64
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Match:
    """A benchmark picture and the nearest training picture; `distance` is `overlay`'s, or with a ranker 1 - cosine."""

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


def crops_of(image: np.ndarray) -> np.ndarray:
    """A picture and what may be left of it, cropped by up to 7.5 %: (C, 16, 16, 3) float32 in [0, 1]."""
    picture = Image.fromarray(square(image, 4 * OVERLAY))
    found = []
    for scale in SCALES:
        side = scale * picture.width
        places = np.linspace(0, picture.width - side, PLACES if scale < 1 else 1)
        for top in places:
            for left in places:
                box = (left, top, left + side, top + side)
                found.append(np.asarray(picture.resize((OVERLAY, OVERLAY), Image.Resampling.BOX, box=box)))
    return np.stack(found).astype(np.float32) / 255


def overlay(image: np.ndarray, crops: np.ndarray) -> float:
    """How much of a picture's variance is left over by the best of the crops, made brighter or darker as fits best.

    image: uint8 (H, W, 3); crops: as `crops_of` has them. 0 is the same picture, 1 has nothing of it. Where a picture
    is white, brightening may have cut it off: the crop is brightened and cut off alike.
    """
    x = np.asarray(Image.fromarray(square(image, 4 * OVERLAY)).resize((OVERLAY, OVERLAY), Image.Resampling.BOX))
    x = x.astype(np.float32) / 255
    inside = ((x > 0.02) & (x < 0.98)).astype(np.float32)
    # The gain by least squares over what is not cut off, for each crop.
    gain = np.einsum("hwc,nhwc->n", x * inside, crops) / np.maximum(np.einsum("hwc,nhwc->n", inside, crops**2), 1e-6)
    gain = np.where(inside.any(), gain.clip(0.5, 2.0), 1.0)
    rest = (np.minimum(gain[:, None, None, None] * crops, 1) - x) ** 2
    spread = ((x - x.mean((0, 1))) ** 2).mean()
    return float(rest.mean((1, 2, 3)).min() / max(float(spread), 1e-4))


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
    limit = (OVERLAY_DISTANCE if ranker is None else RANKER_DISTANCE) if threshold is None else threshold
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
    # Bounded: a picture's crops are 100 kB, and near pictures come again soon or not at all.
    crops = functools.lru_cache(maxsize=1024)(lambda n: crops_of(train[n].image))
    matches: list[Match] = []
    pairs: list[tuple[int, int]] = []
    for chunk in _chunks(bench, "benchmark pictures", say):
        count = min(1 if ranker is not None else CANDIDATES, len(numbers))
        cosines, entries = index.search(_vectors([image for _, image in chunk], ranker), count)
        for (i, image), cosine, found in zip(chunk, cosines, entries, strict=True):
            candidates = list(dict.fromkeys(numbers[entry] for entry in found.tolist()))
            if ranker is not None:
                distance, j = max(0.0, 1 - float(cosine[0])), candidates[0]
            else:
                distance, j = min((overlay(image, crops(n)), n) for n in candidates)
            matches.append(Match(bench=bench.key(i), train=train.key(j), distance=distance))
            pairs.append((i, j))
    if not matches:
        raise DataError("the benchmark pictures: none is readable")
    order = sorted(range(len(matches)), key=lambda n: matches[n].distance)
    thumbnails = {}
    for n in order[:shown]:
        i, j = pairs[n]
        thumbnails[f"bench:{matches[n].bench}"] = square(bench[i].image, THUMBNAIL)
        thumbnails[f"train:{matches[n].train}"] = square(train[j].image, THUMBNAIL)
    by = "perceptual hash and overlay"
    if ranker is not None:
        by = f"ranker of {ranker.id.name} ({ranker.id.fingerprint[:16]})"
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
