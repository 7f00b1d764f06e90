"""Scenes of one to three flat shapes on a plain ground, and their pictures.

The canonical picture is 64x64 pixels.  Object centres lie 8 pixels apart, those of medium objects half a step off
the others'; stripes are 4 pixels apart and dots sit 4 pixels off each other, in a chequer.  This is deliberate: cut
into 8x8 patches, a shape gives the same few patches wherever it stands, and seldom shares one with another.

x runs right and y runs down, in canonical pixels; a centre (20, 32) is the corner shared by pixels 19 and 20
in x and by pixels 31 and 32 in y.

Relations are facts about centres and radii, see `relation_of`.
"""

import difflib
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from armchair.errors import RequestError

T = TypeVar("T")

WORLD_VERSION = "shapes-2"  # any change of a scene, a picture or a caption changes this
CANVAS = 64  # px, side of the canonical picture
LATTICE = 8  # px, spacing of centres
PERIOD = 4  # px, period of stripes and dots
GAP = 3  # px, least distance between the bounding boxes of two objects side by side
CLEAR = 3.25  # px, least distance between an object and the outline around it
DOMINANCE = 8  # px, by which the distance along a relation exceeds the distance across it
OUTLINE = 1.75  # px, width of an outline
RIM = 1.0  # px, width of the edge kept around stripes and dots, so that the form stays readable
DOT = 1.5  # px, radius of a dot

COLOURS = {
    "red": (230, 0, 30),
    "orange": (255, 115, 0),
    "yellow": (250, 215, 0),
    "green": (20, 150, 50),
    "blue": (20, 70, 240),
    "purple": (130, 20, 180),
    "pink": (255, 110, 200),
    "brown": (105, 60, 20),
}
GROUNDS = {
    "white": (255, 255, 255),
    "grey": (215, 215, 215),
    "cream": (250, 235, 205),
    "sky": (190, 225, 250),
}
RADII = {"small": 7.0, "medium": 10.0, "large": 14.0}  # px, half the side of the bounding box
CENTRES = {"small": range(16, 49, 8), "medium": range(12, 53, 8), "large": range(16, 49, 8)}  # px
FORMS = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "crescent")
SIZES = tuple(RADII)
FILLS = ("solid", "outlined", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below", "inside")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

HELD_FORM_COLOUR = frozenset(
    {
        ("circle", "purple"),
        ("square", "pink"),
        ("triangle", "brown"),
        ("diamond", "red"),
        ("star", "blue"),
        ("heart", "green"),
        ("cross", "orange"),
        ("crescent", "yellow"),
    }
)
HELD_RELATION_FORM = frozenset(  # the form is the subject: "a star left of ..."
    {
        ("left of", "star"),
        ("right of", "cross"),
        ("above", "heart"),
        ("below", "circle"),
        ("inside", "diamond"),
    }
)
COUNTS = {  # objects a scene of the split may have
    "train": (1, 2),
    "val": (1, 2),
    "held-form-colour": (1, 2),
    "held-relation-form": (2,),
    "held-count": (3,),
}
SPLITS = tuple(COUNTS)
_STREAM = {split: number for number, split in enumerate(SPLITS)}


@dataclass(frozen=True, slots=True)
class Object:
    """One shape; x and y locate its centre in canonical pixels."""

    form: str
    colour: str
    size: str
    fill: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a ground; relations[i] says how objects[i] stands to objects[i + 1]."""

    ground: str
    objects: tuple[Object, ...]
    relations: tuple[str, ...]


def known(kind: str, got: str, names: Iterable[str]) -> str:
    """`got` if it is one of `names`; otherwise RequestError naming it and the nearest valid name."""
    names = tuple(names)
    if got in names:
        return got
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0)[0]
    raise RequestError(f"unknown {kind} {got!r}; did you mean {near!r}? (one of {', '.join(names)})")


def relation_of(a: Object, b: Object) -> str:
    """The one relation in which `a` stands to `b`.

    inside: `a` is of a smaller size and its bounding box lies within that of `b` (give or take 1 px).
    Otherwise the longer of the two distances between the centres decides, the horizontal one at a tie.
    Scenes of this world keep the longer at least DOMINANCE px beyond the shorter: never near a tie.
    """
    dx, dy = b.x - a.x, b.y - a.y
    slack = RADII[b.size] - RADII[a.size]
    if slack > 0 and max(abs(dx), abs(dy)) <= slack + 1:
        return "inside"
    if abs(dx) >= abs(dy):
        return "left of" if dx >= 0 else "right of"
    return "above" if dy > 0 else "below"


def holds(relation: str, a: Object, b: Object) -> bool:
    """Whether `a` stands in `relation` to `b`; RequestError on an unknown relation."""
    return relation_of(a, b) == known("relation", relation, RELATIONS)


# Pictures.


def _silhouette(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points within a form whose bounding box is about [-1, 1] x [-1, 1]."""
    if form == "circle":
        return x * x + y * y <= 0.98**2
    if form == "square":
        return np.maximum(abs(x), abs(y)) <= 6 / 7
    if form == "triangle":
        return (y <= 0.86) & (abs(x) * 1.86 <= y + 1.0)
    if form == "diamond":
        return abs(x) * 1.12 + abs(y) <= 1.0
    if form == "star":
        y = y - 0.06
        angle = np.arctan2(x, -y)
        step = 2 * math.pi / 5
        angle = abs((angle + step / 2) % step - step / 2)
        radius = np.hypot(x, y)
        px, py = radius * np.cos(angle), radius * np.sin(angle)
        tip, notch = 1.05, 0.56  # circumradius and inner radius
        nx, ny = notch * math.cos(step / 2), notch * math.sin(step / 2)
        return (px - tip) * ny <= py * (nx - tip)
    if form == "heart":
        u, v = abs(x), y + 0.4
        lobe = (u - 0.47) ** 2 + v * v <= 0.51**2
        # Below the lobes, straight flanks tangent to them meet in the point (0, 0.92).
        flank = (u * 0.80 + (y - 0.92) * 0.60 <= 0.0) & (v >= 0) & (u <= 0.98)
        return lobe | flank
    if form == "cross":
        return (np.minimum(abs(x), abs(y)) <= 5 / 14) & (np.maximum(abs(x), abs(y)) <= 1.0)
    bite = (x - 0.54) ** 2 + y * y <= 0.70**2
    return (x * x + y * y <= 0.98**2) & ~bite


def _eroded(inside: np.ndarray, radius: float) -> np.ndarray:
    reach = int(radius)
    padded = np.pad(inside, reach)
    side = len(inside)
    out = inside.copy()
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dx * dx + dy * dy <= radius * radius:
                out &= padded[reach + dy : reach + dy + side, reach + dx : reach + dx + side]
    return out


@cache
def alpha(form: str, size: str, fill: str, scale: int = 1) -> np.ndarray:
    """Opacity of a shape, int32 (2h, 2h, 1) in 0..255, centre in the middle, h = ceil(radius) * scale px."""
    radius = RADII[size]
    half, fine = math.ceil(radius), 8  # fine: samples per canonical px and axis at scale 1
    fine = max(fine, 4 * scale)
    at = (np.arange(2 * half * fine) + 0.5) / fine - half
    x, y = at[None, :], at[:, None]
    inside = _silhouette(form, x / radius, y / radius)
    if fill == "outlined":
        inside &= ~_eroded(inside, OUTLINE * fine)
    elif fill in ("striped", "dotted"):
        rim = inside & ~_eroded(inside, RIM * fine)
        i, j = np.round(x / PERIOD), np.round(y / PERIOD)
        if fill == "striped":
            inside &= (abs(y - j * PERIOD) >= 1.0) | rim
        else:  # polka dots: every other lattice point
            inside &= (np.hypot(x - i * PERIOD, y - j * PERIOD) >= DOT) | ((i + j) % 2 == 0) | rim
    cell = fine // scale
    cover = inside.reshape(2 * half * scale, cell, 2 * half * scale, cell).mean((1, 3))
    out = np.round(cover * 255).astype(np.int32)[:, :, None]
    out.setflags(write=False)
    return out


def render(scene: Scene, resolution: int = CANVAS) -> np.ndarray:
    """The picture of a scene, uint8 (resolution, resolution, 3); later objects are painted first.

    resolution is a multiple of 64, otherwise RequestError; so are unknown names in the scene.
    """
    scale, rest = divmod(resolution, CANVAS)
    if scale < 1 or rest:
        raise RequestError(f"resolution {resolution} is not a positive multiple of {CANVAS}")
    picture = np.empty((resolution, resolution, 3), np.uint8)
    picture[:] = GROUNDS[known("ground", scene.ground, GROUNDS)]
    for thing in reversed(scene.objects):  # an inner object comes before the one around it
        known("form", thing.form, FORMS)
        known("size", thing.size, SIZES)
        known("fill", thing.fill, FILLS)
        colour = np.array(COLOURS[known("colour", thing.colour, COLOURS)], np.int32)
        a = alpha(thing.form, thing.size, thing.fill, scale)
        half = len(a) // 2
        top, left = thing.y * scale - half, thing.x * scale - half
        patch = picture[top : top + 2 * half, left : left + 2 * half]
        patch[:] = (patch * (255 - a) + colour * a + 127) // 255
    return picture


# Scenes.


class _Draw:
    """Integers from a counter-based generator: raw Philox words are the same on every platform."""

    def __init__(self, seed: int, stream: int, index: int) -> None:
        key = np.array([seed, stream], np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, index, 0], np.uint64))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        if not self._words:
            self._words = self._bits.random_raw(32).tolist()
        return ((self._words.pop() >> 32) * n) >> 32

    def among(self, options: tuple[T, ...]) -> T:
        return options[self.below(len(options))]


def _apart(size_a: str, xa: int, ya: int, size_b: str, xb: int, yb: int) -> bool:
    return max(abs(xa - xb), abs(ya - yb)) >= RADII[size_a] + RADII[size_b] + GAP


@cache
def _centres(size: str) -> tuple[tuple[int, int], ...]:
    return tuple((x, y) for y in CENTRES[size] for x in CENTRES[size])


@cache
def _beside(size: str, x: int, y: int, relation: str, other: str) -> tuple[tuple[int, int], ...]:
    """Centres of an object of size `other` to which an object of `size` at (x, y) stands in `relation`."""
    if relation == "inside":
        return ((x, y),) if (x, y) in _centres(other) else ()
    sign = 1 if relation in ("left of", "above") else -1
    found = []
    for ox, oy in _centres(other):
        along, across = (ox - x, oy - y) if relation in ("left of", "right of") else (oy - y, ox - x)
        if sign * along >= max(RADII[size] + RADII[other] + GAP, abs(across) + DOMINANCE):
            found.append((ox, oy))
    return tuple(found)


@cache
def _seats(size: str, relation: str, other: str) -> tuple[tuple[int, int], ...]:
    """Centres from which an object of `size` can stand in `relation` to some object of size `other`."""
    return tuple(at for at in _centres(size) if _beside(size, *at, relation, other))


@cache
def hosts(inner: str) -> tuple[str, ...]:
    """Forms in which, large and outlined, a small concentric `inner` stays clear of the outline."""
    fine = 4
    at = (np.arange(28 * fine) + 0.5) / fine - 14
    x, y = at[None, :], at[:, None]
    guest = _silhouette(inner, x / RADII["small"], y / RADII["small"])
    edge = CLEAR + OUTLINE
    rooms = {f: _eroded(_silhouette(f, x / RADII["large"], y / RADII["large"]), edge * fine) for f in FORMS}
    return tuple(form for form, room in rooms.items() if room[guest].all())


def held_relation(relation: str, a: str, b: str) -> bool:
    """Whether forms `a` and `b` in `relation` make a held-out pair in either wording."""
    return (relation, a) in HELD_RELATION_FORM or (CONVERSE.get(relation, ""), b) in HELD_RELATION_FORM


def scene(index: int, *, seed: int = 0, split: str = "train", objects: int | None = None) -> Scene:
    """Scene number `index` >= 0 of a split: the same for the same arguments, always and everywhere.

    objects forces the count.  train and val follow one distribution (about 40 % one object, 60 % two) from
    separate streams, and contain no pair of HELD_FORM_COLOUR or HELD_RELATION_FORM.  held-form-colour has at
    least one held (form, colour) pair a scene, held-relation-form exactly one held (relation, form) pair, and
    held-count three objects; each is otherwise like train.
    RequestError: an unknown split, a negative index or seed, or a count the split does not have (see COUNTS).
    """
    counts = COUNTS[known("split", split, SPLITS)]
    if index < 0 or seed < 0:
        raise RequestError(f"index and seed must be >= 0, got {index} and {seed}")
    if objects is not None and objects not in counts:
        raise RequestError(f"split {split!r} has scenes of {counts} objects, not {objects}")
    draw = _Draw(seed, _STREAM[split], index)
    two = draw.below(10) >= 4
    count = objects or (counts[0] if len(counts) == 1 else 1 + two)
    while True:
        if drawn := _drawn(draw, split, count):
            return drawn


def _drawn(draw: _Draw, split: str, count: int) -> Scene | None:
    """One attempt at a scene; None when what was drawn does not fit or is kept for another split."""
    forms = [draw.among(FORMS) for _ in range(count)]
    colours = [draw.among(tuple(COLOURS)) for _ in range(count)]
    sizes = [draw.among(SIZES) for _ in range(count)]
    fills = [draw.among(FILLS) for _ in range(count)]
    # Only the first two may be nested: the chain then always runs from the inner object outwards.
    relations = [draw.among(RELATIONS if i == 0 else RELATIONS[:4]) for i in range(count - 1)]
    if split == "held-form-colour":
        slot = draw.below(count)
        forms[slot], colours[slot] = draw.among(tuple(sorted(HELD_FORM_COLOUR)))
    elif split == "held-relation-form":
        relations[0], forms[0] = draw.among(tuple(sorted(HELD_RELATION_FORM)))
    if relations and relations[0] == "inside":
        sizes[:2] = "small", "large"
        fills[1] = "outlined"
        forms[1] = draw.among(hosts(forms[0]))
        if colours[0] == colours[1]:
            return None
    pairs = list(zip(forms, colours, strict=True))
    if len(set(pairs)) < count:
        return None
    if any(pair in HELD_FORM_COLOUR for pair in pairs) != (split == "held-form-colour"):
        return None
    held = any(held_relation(r, forms[i], forms[i + 1]) for i, r in enumerate(relations))
    if held != (split == "held-relation-form"):
        return None
    places = _placed(draw, sizes, relations)
    if places is None:
        return None
    things = tuple(
        Object(form, colour, size, fill, x, y)
        for form, colour, size, fill, (x, y) in zip(forms, colours, sizes, fills, places, strict=True)
    )
    return Scene(draw.among(tuple(GROUNDS)), things, tuple(relations))


def _placed(draw: _Draw, sizes: list[str], relations: list[str]) -> list[tuple[int, int]] | None:
    """Centres that satisfy the relations and keep all objects apart, or None."""
    if not relations:
        return [draw.among(_centres(sizes[0]))]
    seats = _seats(sizes[0], relations[0], sizes[1])
    if not seats:
        return None
    places = [draw.among(seats)]
    for size, other, relation in zip(sizes, sizes[1:], relations, strict=False):
        options = _beside(size, *places[-1], relation, other)
        if len(places) == 2:
            first = places[0]
            options = tuple(at for at in options if _apart(sizes[0], *first, other, *at))
        if not options:
            return None
        places.append(draw.among(options))
    return places


class ShapesSource:
    """A sequence of `length` pairs (picture, captions), made when asked for and never stored.

    source[i] is (uint8 (resolution, resolution, 3), several wordings of the same scene); IndexError outside
    0..length-1, so that iteration ends.  RequestError: as `scene` and `render`.
    """

    def __init__(self, length: int, *, seed: int = 0, split: str = "train", resolution: int = CANVAS) -> None:
        if length < 0:
            raise RequestError(f"length must be >= 0, got {length}")
        if resolution < CANVAS or resolution % CANVAS:
            raise RequestError(f"resolution {resolution} is not a positive multiple of {CANVAS}")
        if seed < 0:
            raise RequestError(f"seed must be >= 0, got {seed}")
        self.length, self.seed, self.resolution = length, seed, resolution
        self.split = known("split", split, SPLITS)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, tuple[str, ...]]:
        from armchair.shapes.captions import captions  # captions builds on this module

        if not 0 <= i < self.length:
            raise IndexError(f"index {i} is outside 0..{self.length - 1}")
        drawn = scene(i, seed=self.seed, split=self.split)
        return render(drawn, self.resolution), captions(drawn)

    def fingerprint(self) -> str:
        """A hex digest that changes whenever any picture or caption of the sequence may have changed."""
        told = f"{WORLD_VERSION} {self.length} {self.seed} {self.split} {self.resolution}"
        return hashlib.sha256(told.encode()).hexdigest()
