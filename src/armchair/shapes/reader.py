"""Reads a picture back into a scene, from its pixels alone.

The ground is the median of the border.  What differs from it falls into connected regions.  A region whose
blurred pixels lie on one line in colour space is one object; otherwise its main colour is one object and what
is drawn on or beside it others.  An object's opacity map is compared with every form, size and fill at every
offset nearby.  What fits nothing well is reported as an object of form "unknown", so that a malformed or
extra blob is never silently forgiven.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from armchair.shapes.world import (
    CANVAS,
    COLOURS,
    FILLS,
    FORMS,
    GROUNDS,
    RADII,
    SIZES,
    Object,
    Scene,
    alpha,
    relation_of,
)

UNKNOWN = "unknown"

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)
# Columns are luma and two chroma axes; _SHARP counts chroma less, because pictures carry it more coarsely.
_SHARP = np.array([[0.52, -0.10, 0.29], [1.02, -0.20, -0.25], [0.20, 0.30, -0.05]], np.float32)
_OPPONENT = np.array([[0.52, -0.33, 0.97], [1.02, -0.67, -0.83], [0.20, 1.0, -0.17]], np.float32)
_SOFT = ImageFilter.GaussianBlur(1.5)
_GROUND_REACH = 45.0  # RGB distance up to which a ground still has a name
_COLOUR_REACH = 90.0  # RGB distance up to which a pixel counts for a colour
_FAINT = 30.0  # RGB distance from the ground below which nothing is seen
_STRANGE = 60.0  # distance to the nearest colour beyond which it has no name
_BEND = 15.0  # RGB distance of a blurred pixel from the line that a region of one colour lies on
_BENT = 25  # px, how many such make it a region of several colours
_OFF = 32.0  # distance at which a pixel is no mixture of the two colours assumed
_SPECK = 12  # px, area up to which a region is ignored
_MISFIT = 0.30  # squared error over squared opacity beyond which no form is recognised
_WINDOW = 36  # px, side of the compared window: the largest form and a margin
_REACH = 4  # px, search around the middle of a region
_PAD = _WINDOW // 2 + _REACH


def read(image: Image.Image | np.ndarray) -> Scene:
    """The scene a picture shows.

    image is a PIL picture or uint8 (H, W, 3); other sizes than 64x64 are resized first.  Objects come in
    reading order, one inside another directly before it; positions are within 2 px.  Names not to be told
    (a ground or colour unlike any, a form that fits nothing) are "unknown".  Never raises on an RGB picture.
    """
    pixels = _canonical(image)
    sides = pixels[:2], pixels[-2:], pixels[2:-2, :2], pixels[2:-2, -2:]
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    found = []
    for region in _regions(_seen(pixels, ground)):
        found += _explained(pixels, ground, region)
    things = _ordered(found)
    relations = tuple(relation_of(a, b) for a, b in itertools.pairwise(things))
    return Scene(_nearest(ground, GROUNDS, _GROUND_REACH), things, relations)


def _canonical(image: Image.Image | np.ndarray) -> np.ndarray:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    picture = picture.convert("RGB")
    if picture.size != (CANVAS, CANVAS):
        picture = picture.resize((CANVAS, CANVAS), Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


def _nearest(rgb: np.ndarray, named: dict[str, tuple[int, int, int]], reach: float) -> str:
    name = min(named, key=lambda n: math.dist(rgb, named[n]))
    return name if math.dist(rgb, named[name]) <= reach else UNKNOWN


# Regions.


@dataclass(frozen=True, slots=True)
class _Region:
    mask: np.ndarray  # bool (64, 64)
    box: tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive


def _seen(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Pixels at least a quarter covered by some colour of the palette, bool (64, 64)."""
    off = (pixels - ground) @ _SHARP
    axes = (_PALETTE - ground) @ _SHARP
    full = np.linalg.norm(axes, axis=-1) + 1e-6
    nearest = (off @ (axes / full[:, None]).T).argmax(-1)
    return np.linalg.norm(off, axis=-1) > np.maximum(_FAINT, 0.25 * full[nearest])


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(ys[0]), int(xs[0]), int(ys[-1]) + 1, int(xs[-1]) + 1) if len(ys) else (0, 0, 0, 0)


def _grown(mask: np.ndarray) -> np.ndarray:
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def _shrunk(mask: np.ndarray) -> np.ndarray:
    return ~_grown(np.pad(~mask, 1, constant_values=True))[1:-1, 1:-1]


def _regions(mask: np.ndarray) -> list[_Region]:
    """8-connected regions of a mask grown by 1 px, without those of no more than _SPECK pixels before."""
    grown = _grown(mask)
    height, width = grown.shape
    flat = np.zeros((height, width + 2), np.int8)
    flat[:, 1:-1] = grown
    edges = np.flatnonzero(np.diff(flat.ravel())) + 1
    rows, begins, ends = (
        edges[::2] // (width + 2),
        edges[::2] % (width + 2) - 1,
        edges[1::2] % (width + 2) - 1,
    )
    runs = list(zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    for row, group in itertools.groupby(range(len(runs)), key=lambda i: runs[i][0]):
        current = list(group)
        for i in current:
            for j in above:
                if runs[j][0] == row - 1 and runs[j][1] <= runs[i][2] and runs[i][1] <= runs[j][2]:
                    parent[root(i)] = root(j)
        above = current
    members: dict[int, list[int]] = {}
    for i in range(len(runs)):
        members.setdefault(root(i), []).append(i)
    regions = []
    for group_runs in members.values():
        part = np.zeros_like(grown)
        for i in group_runs:
            row, begin, end = runs[i]
            part[row, begin:end] = True
        inner = part & mask
        if inner.sum() > _SPECK:
            regions.append(_Region(part, _box(inner)))
    return regions


# Colours.


def _explained(pixels: np.ndarray, base: np.ndarray, region: _Region, depth: int = 0) -> list[Object]:
    """The objects of one region that lie on a plain `base` colour, RGB (3,)."""
    where = region.mask
    # A blur of several pixels keeps a shape of one colour on the line from the base to that colour, whatever
    # its fill, even where the coding of the picture has smeared its chroma.
    soft = np.asarray(
        Image.fromarray(np.where(where[:, :, None], pixels, base).astype(np.uint8)).filter(_SOFT), np.float32
    )
    off = soft[where] - base
    colour, distance = _coloured(pixels[where], base)
    axis = np.linalg.eigh(off.T @ off)[1][:, -1]
    rest = np.linalg.norm(off - (off @ axis)[:, None] * axis, axis=-1)
    if depth == 2 or (rest > _BEND).sum() <= _BENT:
        opacity = np.where(where, _along(pixels, base, _PALETTE[colour]), 0)
        name = _NAMES[colour] if distance < _STRANGE else UNKNOWN
        return [_fitted(opacity, region, np.ones_like(opacity), name)]
    return _layered(pixels, base, region, depth)


def _coloured(part: np.ndarray, base: np.ndarray) -> tuple[int, float]:
    """The palette colour drawn on `base` in pixels (n, 3), and how far off it is.

    Judged by the pixels farthest from the base; the luma of thin strokes may be short of the colour, their
    chroma shorter still.
    """
    off = (part - base) @ _OPPONENT
    far = np.linalg.norm((part - base) @ _SHARP, axis=-1)
    peak = off[far >= np.quantile(far, 0.85)].mean(0)
    axes = (_PALETTE - base) @ _OPPONENT
    luma, chroma = axes[:, 0], axes[:, 1:]
    a = np.clip(peak[0] * luma / (luma * luma + 1e-6), 0.6, 1.15)
    b = np.clip(chroma @ peak[1:] / ((chroma * chroma).sum(-1) + 1e-6), 0.3, 1.15)
    wrong = np.hypot(peak[0] - a * luma, np.linalg.norm(peak[1:] - b[:, None] * chroma, axis=-1))
    best = int(wrong.argmin())
    return best, float(wrong[best])


def _layered(pixels: np.ndarray, base: np.ndarray, region: _Region, depth: int) -> list[Object]:
    """The objects of a region of several colours, nested or touching: the main one and what is on it."""
    near = np.linalg.norm(pixels[region.mask][:, None] - _PALETTE, axis=-1)
    votes = near.argmin(1)[near.min(1) < _COLOUR_REACH]
    colour = int(np.bincount(votes, minlength=len(_NAMES)).argmax())
    main = _PALETTE[colour]
    opacity = _along(pixels, base, main)
    inside = _shrunk(_shrunk(region.mask))
    edge = inside & ~_shrunk(inside)
    differs = _seen(pixels, main)
    if edge.any() and differs[edge].mean() < 0.15:  # solid: everything else within is drawn on it
        other = inside & differs
    else:
        rest = (pixels - base - opacity[:, :, None] * (main - base)) @ _SHARP
        other = region.mask & (np.linalg.norm(rest, axis=-1) > _OFF)
    weight = np.ones_like(opacity)
    objects = []
    top, left, bottom, right = _box(region.mask & ~other & (opacity > 0.5))
    for part in _regions(other):
        t, le, b, r = part.box
        nested = top < t and left < le and b < bottom and r < right
        found = _explained(pixels, main if nested else base, part, depth + 1)
        objects += found
        weight[part.mask] = 0
        if nested:
            for inner in found:
                weight[_shadow(inner)] = 0
    opacity = np.where(region.mask, opacity, 0)
    return [*objects, _fitted(opacity, region, weight, _NAMES[colour] if len(votes) else UNKNOWN)]


def _along(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How far each pixel is from `start` to `end`, float32 (64, 64) in 0..1.3; luma counts above chroma."""
    axis = (end - start) @ _SHARP
    share = (pixels - start) @ _SHARP @ axis / (axis @ axis + 1e-6)
    return np.clip(share, 0.0, 1.3).astype(np.float32)


def _shadow(thing: Object) -> np.ndarray:
    """Pixels an object may have touched, whatever its fill, bool (64, 64)."""
    half = math.ceil(RADII[thing.size]) + 1
    out = np.zeros((CANVAS, CANVAS), bool)
    out[max(0, thing.y - half) : thing.y + half, max(0, thing.x - half) : thing.x + half] = True
    if thing.form == UNKNOWN:
        return out
    padded = np.zeros((CANVAS + 2 * _PAD, CANVAS + 2 * _PAD), bool)
    solid = alpha(thing.form, thing.size, "solid")[:, :, 0] > 0
    half = len(solid) // 2
    top, left = thing.y + _PAD - half, thing.x + _PAD - half
    padded[top : top + 2 * half, left : left + 2 * half] = solid
    return _grown(padded[_PAD:-_PAD, _PAD:-_PAD])


# Forms.


@lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """Names (form, size, fill) and opacities, float32 (window pixels, names), sharp and slightly blurred."""
    names, columns = [], []
    for form, size, fill in itertools.product(FORMS, SIZES, FILLS):
        shape = alpha(form, size, fill)[:, :, 0].astype(np.uint8)
        start = (_WINDOW - len(shape)) // 2
        canvas = Image.new("L", (_WINDOW, _WINDOW))
        canvas.paste(Image.fromarray(shape), (start, start))
        for picture in (canvas, *(canvas.filter(ImageFilter.GaussianBlur(b)) for b in (0.7, 1.1))):
            names.append((form, size, fill))
            columns.append(np.asarray(picture, np.float32).ravel() / 255)
    stacked = np.stack(columns, axis=1)
    return names, stacked, stacked * stacked


def _fitted(opacity: np.ndarray, region: _Region, weight: np.ndarray, colour: str) -> Object:
    """The form, size, fill and place that explain an opacity map (64, 64) best where weight is 1."""
    names, shapes, squares = _templates()
    top, left, bottom, right = region.box
    middle_y, middle_x = (top + bottom) // 2, (left + right) // 2
    side = 2 * _REACH + _WINDOW
    near = np.s_[middle_y + _PAD - side // 2 :, middle_x + _PAD - side // 2 :]

    def windows(values: np.ndarray) -> np.ndarray:
        around = np.pad(values, _PAD)[near][:side, :side]
        views = np.lib.stride_tricks.sliding_window_view(around, (_WINDOW, _WINDOW))
        return views.reshape(-1, _WINDOW * _WINDOW)

    counted, seen = windows(weight), windows(opacity * weight)
    product = seen @ shapes
    energy = counted @ squares
    scale = np.clip(product / np.maximum(energy, 1e-6), 0.75, 1.25)
    total = float((opacity * opacity * weight).sum())
    error = total - 2 * scale * product + scale * scale * energy
    at, best = np.unravel_index(int(error.argmin()), error.shape)
    form, size, fill = names[best]
    if error[at, best] > _MISFIT * energy[at, best]:
        form = UNKNOWN
    dy, dx = divmod(int(at), 2 * _REACH + 1)
    return Object(form, colour, size, fill, middle_x - _REACH + dx, middle_y - _REACH + dy)


def _ordered(found: list[Object]) -> tuple[Object, ...]:
    out: list[Object] = []
    for thing in sorted(found, key=lambda o: (o.y, o.x, -RADII[o.size])):
        spot = len(out)
        for k, other in enumerate(out):
            if relation_of(thing, other) == "inside":
                spot = k
                break
        within = [other for other in out[:spot] if relation_of(other, thing) == "inside"]
        out = [o for o in out[:spot] if o not in within] + within + [thing] + out[spot:]
    return tuple(out)
