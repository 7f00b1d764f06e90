"""Contact sheets: many small pictures with their captions in one image."""

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from armchair.errors import RequestError

PADDING = 8
FONT_SIZE = 12
LINE_HEIGHT = 15
MAX_LINES = 4


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str] | None, columns: int, scale: int
) -> Image.Image:
    """An RGB sheet of `images` in reading order, `columns` a row, on white, labels wrapped under them.

    Every image is enlarged `scale` times with crisp pixels. A label longer than four lines ends in an
    ellipsis; letters are shown without accents, and those that PIL's own font lacks as boxes. Raises
    RequestError without images, or where there are not as many labels as images.
    """
    if not images or columns < 1 or scale < 1:
        raise RequestError(
            f"expected images, and columns and a scale of 1 or more; got {len(images)} images, "
            f"{columns} columns, scale {scale}"
        )
    if labels is not None and len(labels) != len(images):
        raise RequestError(f"expected a label for each of the {len(images)} images, got {len(labels)}")
    columns = min(columns, len(images))
    width = max(image.width for image in images) * scale
    height = max(image.height for image in images) * scale
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrap(label, font, width) for label in labels] if labels is not None else [[] for _ in images]

    rows = math.ceil(len(images) / columns)
    row_texts = [texts[r * columns : (r + 1) * columns] for r in range(rows)]
    row_heights = [height + LINE_HEIGHT * max(len(t) for t in row) + PADDING for row in row_texts]
    sheet = Image.new("RGB", (PADDING + columns * (width + PADDING), PADDING + sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(n, columns)
        x, y = PADDING + column * (width + PADDING), PADDING + sum(row_heights[:row])
        enlarged = (image.width * scale, image.height * scale)
        sheet.paste(image.convert("RGB").resize(enlarged, Image.Resampling.NEAREST), (x, y))
        for k, line in enumerate(lines):
            draw.text((x, y + height + 2 + k * LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of `text` no wider than `width` pixels; a word wider than that is broken."""
    decomposed = unicodedata.normalize("NFKD", text)  # the font has the letters, not the accented ones
    text = "".join(c for c in decomposed if not unicodedata.combining(c))
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while word:
            fits = len(word)
            while fits > 1 and font.getlength(word[:fits]) > width:
                fits -= 1
            lines.append(word[:fits])
            word = word[fits:]
            if len(lines) > MAX_LINES:
                return [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-1] + "…"]
    return lines
