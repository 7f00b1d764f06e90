"""Pictures over the wire: decoded with bounds, the rectangle of a mask, encoded as asked for, kept for a while."""

import io
import secrets
import time
import warnings
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from armchair.config import to_dict
from armchair.errors import RequestError
from armchair.image.pixels import BrokenSample, rgb
from armchair.sample.pipeline import Drawing, Rectangle
from armchair.sample.png import png_bytes

MAX_PIXELS = 16_777_216  # of a picture that comes in, 4096 x 4096
POSSIBLE = "the model can redraw one upright rectangle, given as the fully transparent part of a PNG"
FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def read_picture(data: bytes, name: str) -> Image.Image:
    """A PNG, JPEG or WEBP as RGB, or as RGBA where it has transparency, upright.

    Raises RequestError, which begins with `name`, for anything else, and for more than 16.8 megapixels by the header,
    before a pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise RequestError(f"{name}: expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGBA") if image.has_transparency_data else rgb(image)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{name}: expected at most {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name}: expected a PNG, JPEG or WEBP file") from None
    except BrokenSample as broken:
        raise RequestError(f"{name}: {broken.cause}") from None
    except Exception:  # the decoders raise OSError, SyntaxError, struct.error, ... on damaged bytes
        raise RequestError(f"{name}: the file is damaged") from None


def rectangle_of(mask: Image.Image, resolution: int) -> Rectangle:
    """What a mask wants redrawn, in pixels of the model's resolution, once the picture is cut square and resized.

    A pixel of the model's is redrawn if any of the mask's in it is fully transparent. Raises RequestError for a mask
    without a fully transparent part, or with one that is no rectangle, or outside of the centre square.
    """
    if mask.mode != "RGBA":
        raise RequestError(f"mask: {POSSIBLE}; this one has no transparency")
    clear = np.asarray(mask)[:, :, 3] == 0
    rows, columns = clear.any(1).nonzero()[0], clear.any(0).nonzero()[0]
    if not len(rows):
        raise RequestError(f"mask: {POSSIBLE}; this one has no fully transparent pixel")
    y, y2, x, x2 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    if not clear[y:y2, x:x2].all():
        raise RequestError(f"mask: {POSSIBLE}; the transparent part of this one is no rectangle")
    side = min(mask.size)
    left, top = (mask.width - side) // 2, (mask.height - side) // 2
    starts = [max(0, v - edge) * resolution // side for v, edge in ((x, left), (y, top))]
    ends = [-(-min(side, v - edge) * resolution // side) for v, edge in ((x2, left), (y2, top))]
    if not (starts[0] < ends[0] and starts[1] < ends[1]):
        raise RequestError(f"mask: {POSSIBLE}; that of this one lies outside of the centre square, which is used")
    return starts[0], starts[1], ends[0], ends[1]


def encoded(drawing: Drawing, i: int, side: int, form: str, quality: int) -> bytes:
    """Picture i of a drawing as a file, as `encoded_image`. A PNG has its record in it (`armchair redraw`)."""
    image = drawing.images[i]
    record = to_dict(drawing.record(i)) if form == "png" else None
    return encoded_image(image, side, form, quality, record)


def encoded_image(
    image: Image.Image, side: int, form: str, quality: int, record: dict[str, object] | None = None
) -> bytes:
    """A square picture as a file of `side` pixels: where that is a whole multiple, each pixel as a square of them."""
    if side != image.width:
        whole = side % image.width == 0
        image = image.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
    if form == "png":
        return png_bytes(image, record)
    out = io.BytesIO()
    image.save(out, form.upper(), quality=quality)
    return out.getvalue()


class Kept(NamedTuple):
    data: bytes
    media_type: str
    until: float


class Store:
    """Files that are fetched by a name that nobody can guess, for a while; in memory, the oldest make room."""

    def __init__(self, *, most: int = 64 << 20, seconds: float = 3600.0):
        self.most, self.seconds = most, seconds  # bytes of all
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.size = 0

    def add(self, data: bytes, form: str) -> str:
        """The name that the file is kept under."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._kept[name] = Kept(data, MEDIA_TYPES[form], time.monotonic() + self.seconds)
        self.size += len(data)
        while self._kept and (self.size > self.most or next(iter(self._kept.values())).until < time.monotonic()):
            self.size -= len(self._kept.popitem(last=False)[1].data)
        return name

    def find(self, name: str) -> Kept | None:
        kept = self._kept.get(name)
        return kept if kept is not None and kept.until >= time.monotonic() else None
