"""Pixels in and out: decode any picture to RGB, cut it square, and go between arrays, tensors and PIL."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64_000_000
# Named, because PIL would hand an EPS to an outside program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BrokenSample(Exception):
    """A captioned image that cannot be used. `cause` is a short phrase, the same for all of a kind."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def read_image(data: bytes | Path) -> np.ndarray:
    """Decode an image file, or its bytes, to uint8 (H, W, 3) RGB.

    The EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled to 8, and of an
    animation the first frame is taken. Raises BrokenSample for whatever cannot be decoded, and for more than
    64 megapixels by the header, before any pixel is decoded.
    """
    try:
        if isinstance(data, Path):
            data = data.read_bytes()
    except (OSError, ValueError):  # ValueError: a name that cannot be one
        raise BrokenSample("unreadable file") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenSample("image over 64 megapixels")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(rgb(image))
    except BrokenSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenSample("image over 64 megapixels") from None
    except UnidentifiedImageError:
        raise BrokenSample("not an image") from None
    except Exception:  # the decoders raise OSError, SyntaxError, struct.error, ... on damaged bytes
        raise BrokenSample("damaged image") from None


def random_crop(image: np.ndarray, resolution: int, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """The training crop of the dVAE (DALL-E paper, appendix A.2): uint8 (H, W, 3) to uint8 (R, R, 3).

    A square of the shorter side, its offset within the middle quarter of the slack; area-resized to a random
    size in [R, 9/8 R], never enlarged beyond R; a random R x R crop of that; if `flip`, a random horizontal
    flip.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (_centre_ish(length - side, rng) for length in (height, width))
    largest = max(resolution, min(side, round(9 / 8 * resolution)))
    size = int(rng.integers(resolution, largest + 1))
    image = _resize_area(image, (left, top, left + side, top + side), size)
    top, left = rng.integers(0, size - resolution + 1, size=2)
    image = image[top : top + resolution, left : left + resolution]
    return image[:, ::-1] if flip and rng.random() < 0.5 else image


def square(image: np.ndarray, resolution: int) -> np.ndarray:
    """The centre square of uint8 (H, W, 3), area-resized to (R, R, 3). R x R comes back unchanged."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize_area(image, (left, top, left + side, top + side), resolution)


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """Equal-sized uint8 (R, R, 3) arrays to one float32 tensor (B, 3, R, R) in [0, 1]."""
    # In numpy: torch would start a pool of its own in every loading thread.
    pixels = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels / np.float32(255))


def to_pil(images: Tensor) -> list[Image.Image]:
    """A float tensor (B, 3, R, R) to RGB images: clamped to [0, 1], rounded to the nearest of 256 levels."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenSample("floating-point image")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _centre_ish(slack: int, rng: np.random.Generator) -> int:
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def _resize_area(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    left, top, right, bottom = box
    image = image[top:bottom, left:right]
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
