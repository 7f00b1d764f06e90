"""What is in a set of captioned images: counts, captions, sizes, duplicates, and a sheet to look at."""

import hashlib
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from armchair.data.sources import DataConfig, Source
from armchair.errors import DataError
from armchair.image.pixels import BrokenSample, square
from armchair.image.sheet import contact_sheet

logger = logging.getLogger(__name__)

SHEET_IMAGES = 24
SHEET_COLUMNS = 6
CELL = 160  # pixels, about
FREQUENT = 30


def inspect(
    source: Source, config: DataConfig, *, sheet: Path | None, limit: int | None = None
) -> dict[str, Any]:
    """Read every sample (or the first `limit`) and count; write a contact sheet as PNG to `sheet` if given.

    Returns plain data: `images` (usable), `broken` (cause -> number), `captions`, `caption_words` (min,
    median, max; None without captions), `distinct_words`, `frequent_words` ([word, number] pairs), `sizes`
    ("WxH" -> number, the ten most frequent), `odd_aspect` (share of images wider than 2:1 or taller than
    1:2), `duplicates` (images whose pixels equal an earlier one's). The sheet shows pictures spread over the
    source, after the centre crop to `config.resolution`; there is none without a usable picture. Broken
    samples are counted, however many. Raises DataError if the sheet cannot be written.
    """
    total = len(source) if limit is None else min(limit, len(source))
    shown = set(np.linspace(0, total - 1, min(SHEET_IMAGES, total)).astype(int).tolist())
    broken: Counter[str] = Counter()
    words: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    lengths: list[int] = []
    odd = duplicates = 0
    seen: set[bytes] = set()
    pictures: list[Image.Image] = []
    labels: list[str] = []
    for i in range(total):
        try:
            image, captions = source[i]
        except BrokenSample as error:
            broken[error.cause] += 1
            logger.info("%r is broken: %s", source.key(i), error.cause)
            continue
        height, width = image.shape[:2]
        sizes[f"{width}x{height}"] += 1
        odd += max(width, height) > 2 * min(width, height)
        identity = hashlib.blake2b(image.tobytes(), digest_size=16, person=b"%d" % width).digest()
        duplicates += identity in seen
        seen.add(identity)
        for caption in captions:
            found = re.findall(r"\w+", caption.lower())
            lengths.append(len(found))
            words.update(found)
        if i in shown:
            pictures.append(Image.fromarray(square(image, config.resolution)))
            labels.append(captions[0])
    if sheet is not None and pictures:
        drawn = contact_sheet(pictures, labels, SHEET_COLUMNS, max(1, round(CELL / config.resolution)))
        try:
            drawn.save(sheet, format="PNG")
        except OSError as error:
            raise DataError(f"{sheet}: cannot write the contact sheet: {error.strerror or error}") from None
    images = sum(sizes.values())
    return {
        "images": images,
        "broken": dict(broken.most_common()),
        "captions": len(lengths),
        "caption_words": _spread(lengths),
        "distinct_words": len(words),
        "frequent_words": [[word, n] for word, n in words.most_common(FREQUENT)],
        "sizes": dict(sizes.most_common(10)),
        "odd_aspect": odd / images if images else 0.0,
        "duplicates": duplicates,
    }


def _spread(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)}
