"""What a ballot is of: two systems, the captions that both have pictures of, and all that decides about these.

A system is a bundle, which draws whatever it is asked, or a folder of captioned pictures that anything else has made.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from armchair.bundle import bundled_names
from armchair.config import to_dict
from armchair.data.folder import FolderSource
from armchair.data.sources import DataConfig, digest, open_source
from armchair.errors import DataError
from armchair.eval.pairs import read_pairs
from armchair.image.pixels import BrokenSample, square
from armchair.sample.pipeline import Artist

MAX_SIDE = 512  # pixels of a picture that people are shown; the page has room for fewer


class PictureFolder:
    """Pictures with their captions, as `FolderSource` reads them, that some system made. Raises DataError for none."""

    def __init__(self, place: str):
        root = Path(os.path.expanduser(place))
        try:
            self.source = FolderSource(root)
        except DataError as error:
            raise DataError(f"{place} has no bundle.json, and is no folder of pictures: {error}") from None
        self.name = Path(os.path.abspath(root)).name
        self.fingerprint = self.source.fingerprint()

    def captions(self) -> Iterator[tuple[int, list[str]]]:
        """Each picture that has captions, and these."""
        for i in range(len(self.source)):
            try:
                yield i, self.source.fields(i)["caption"]
            except BrokenSample:
                continue


System = Artist | PictureFolder


class Round(NamedTuple):
    """A caption, the side in pixels that its pictures are shown at, and those that are there already, uint8
    (side, side, 3)."""

    caption: str
    side: int
    pictures: tuple[np.ndarray | None, np.ndarray | None] = (None, None)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two systems and the captions that they are judged by."""

    systems: tuple[System, System]
    rounds: list[Round] = field(repr=False)
    seed: int

    @property
    def captions(self) -> list[str]:
        return [round.caption for round in self.rounds]

    @property
    def names(self) -> tuple[str, str]:
        first, second = (_named(system, 8) for system in self.systems)
        return first, second

    def made_of(self) -> dict[str, str]:
        """What decides about the pictures, by name, for people to read and for a ballot to compare."""
        found = {"captions": f"{len(self.rounds)} of {digest(self.captions)[:8]}", "seed": str(self.seed)}
        for which, system in zip(("first", "second"), self.systems, strict=True):
            found[which] = _named(system, 16)
            if isinstance(system, PictureFolder):
                continue
            drawn_with = {**to_dict(system.settings), "weights": system.weights}
            del drawn_with["naturalness"]  # of several it says which is best: here one is drawn
            found |= {f"{which}'s {name}": str(value) for name, value in drawn_with.items()}
        return found

    def pictures(self, say: Callable[[str], None]) -> tuple[list[Image.Image], list[Image.Image]]:
        """Those of either system, one a caption, the two of a caption equally large: size is not to tell them apart."""
        first, second = ([round.pictures[k] for round in self.rounds] for k in (0, 1))
        return self._whole(self.systems[0], first, say), self._whole(self.systems[1], second, say)

    def _whole(
        self, system: System, there: list[np.ndarray | None], say: Callable[[str], None]
    ) -> list[Image.Image]:
        """With what the system draws where there is no picture."""
        missing = [i for i, picture in enumerate(there) if picture is None]
        if missing and isinstance(system, Artist):
            say(f"{len(missing)} drawings of {_named(system, 8)}")
            drawn = system.draw_each([self.rounds[i].caption for i in missing], seed=self.seed)
            for i, image in zip(missing, drawn, strict=True):
                there[i] = square(np.asarray(image), self.rounds[i].side)
        return [Image.fromarray(picture) for picture in there if picture is not None]


def is_picture_folder(place: str) -> bool:
    """Whether a system's place is a folder of pictures, not a bundle. A bundled model is one whatever the folders."""
    folder = os.path.expanduser(place)
    return os.path.isdir(folder) and place not in bundled_names() and not os.path.exists(f"{folder}/bundle.json")


def make_contest(
    first: System,
    second: System,
    data: Sequence[str],
    *,
    count: int,
    seed: int = 0,
    without: frozenset[str] = frozenset(),
    say: Callable[[str], None] = lambda text: None,
) -> Contest:
    """Of `count` captions at most, each once.

    Two bundles draw those of pictures of `data`, as `read_pairs` reads them for the first. Where there is a folder,
    they are those that both sides have a picture of, and `data` has too, if there is any; a bundle draws any caption,
    and captions are the same whose words are but for capitals. Pictures are cut square. `without`: keys of pictures of
    the data to leave out. Raises DataError where no caption is left.
    """
    systems = (first, second)
    if isinstance(first, Artist) and isinstance(second, Artist):
        captions = dict.fromkeys(read_pairs(data, first, count, without).captions)
        side = min(first.resolution, second.resolution)
        return Contest(systems=systems, rounds=[Round(caption, side) for caption in captions], seed=seed)
    shared = _shared(first, second, _captions_of(data, without) if data else None)
    if not shared:
        also = f", that {', '.join(data)} has too" if data else ""
        raise DataError(f"no caption has a picture on both sides{also}: {_told(first)}, {_told(second)}")
    rounds: list[Round] = []
    broken: Counter[str] = Counter()
    for n in np.random.Generator(np.random.PCG64(0)).permutation(len(shared)).tolist():
        caption, *numbers = shared[n]
        try:
            found = [_read(system, i) for system, i in zip(systems, numbers, strict=True)]
        except BrokenSample as error:
            broken[error.cause] += 1
            continue
        sides_of = [s.resolution for s in systems if isinstance(s, Artist)]
        side = min([MAX_SIDE, *sides_of, *(min(x.shape[:2]) for x in found if x is not None)])
        a, b = (None if x is None else square(x, side) for x in found)
        rounds.append(Round(caption, side, (a, b)))
        if len(rounds) == count:
            break
    if not rounds:
        raise DataError(f"no picture can be read: {', '.join(f'{n} {cause}' for cause, n in broken.items())}")
    passed = f"; passed over: {', '.join(f'{n} {cause}' for cause, n in broken.items())}" if broken else ""
    say(f"{len(shared)} captions are on both sides, of which {len(rounds)} are asked about{passed}")
    return Contest(systems=systems, rounds=rounds, seed=seed)


def _shared(first: System, second: System, wanted: set[str] | None) -> list[tuple[str, int | None, int | None]]:
    """Captions of both, and the numbers of the pictures in their folders. No caption and no picture comes twice.

    At least one is a folder. wanted: captions, as `_same` has them, besides which none is taken.
    """
    if isinstance(first, Artist):
        return [(caption, j, i) for caption, i, j in _shared(second, first, wanted)]
    of_second: dict[str, list[int]] = {}
    if isinstance(second, PictureFolder):
        for number, captions in second.captions():
            for caption in captions:
                of_second.setdefault(_same(caption), []).append(number)
    found: list[tuple[str, int | None, int | None]] = []
    taken: set[str] = set()
    used: set[int] = set()
    for i, captions in first.captions():
        for caption in captions:
            same = _same(caption)
            if same in taken or (wanted is not None and same not in wanted):
                continue
            j = next((j for j in of_second.get(same, ()) if j not in used), None)
            if j is None and isinstance(second, PictureFolder):
                continue
            found.append((caption, i, j))
            taken.add(same)
            if j is not None:
                used.add(j)
            break
    return found


def _captions_of(data: Sequence[str], without: frozenset[str]) -> set[str]:
    source, found = open_source(data, DataConfig()), set()
    for i in range(len(source)):
        try:
            found |= set() if source.key(i) in without else {_same(text) for text in source.fields(i)["caption"]}
        except BrokenSample:
            continue
    return found


def _same(caption: str) -> str:
    return " ".join(caption.split()).casefold()


def _read(system: System, i: int | None) -> np.ndarray | None:
    """Picture i of a folder, uint8 (H, W, 3). Raises BrokenSample."""
    return None if i is None or isinstance(system, Artist) else system.source[i].image


def _named(system: System, digits: int) -> str:
    """As it stands beside results, with so much of its fingerprint."""
    if isinstance(system, PictureFolder):
        return f"{system.name} {system.fingerprint[:digits]}"
    return f"{system.bundle.name} {system.bundle.fingerprint[:digits]}"


def _told(system: System) -> str:
    if isinstance(system, Artist):
        return f"{system.bundle.name} draws any"
    captions = list(dict.fromkeys(text for _, texts in system.captions() for text in texts))
    example = f", such as {captions[0][:60]!r}" if captions else ""
    return f"{system.name} has {len(captions)}{example}"
