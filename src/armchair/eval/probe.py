"""Zero-shot image to image: the top half is given, the prompt asks for the same below, changed (paper, figure 2d)."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from armchair.eval.features import named
from armchair.eval.fidelity import share
from armchair.eval.figures import Cell, Section, Table
from armchair.eval.pairs import Context

SHOWN = 8


def _outline(image: Image.Image) -> Image.Image:
    """Dark lines on white where brightness changes."""
    edges = ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES).point(lambda v: 255 - min(255, 3 * v))
    edges.paste(255, (0, 0, edges.width, 1))  # the filter leaves the border as it was
    return edges.convert("RGB")


CHANGES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "the same": ("{caption} on the top, exactly the same on the bottom", lambda image: image),
    "upside down": ("{caption} on the top, exactly the same upside down on the bottom", ImageOps.flip),
    "as an outline": ("{caption} on the top, exactly the same as an outline on the bottom", _outline),
}


def probe(context: Context) -> Section:
    count = min(context.options["probe"], len(context.held_out))
    network, side = context.networks[0], context.artist.resolution
    pictures, captions = context.held_out.images[:count], context.held_out.captions[:count]
    rows: list[tuple[Cell, ...]] = []
    shown: list[Image.Image] = []
    labels: list[str] = []
    for name, (template, change) in CHANGES.items():
        drawn, wanted = [], []
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            small = Image.fromarray(picture).resize((side // 2, side // 2), Image.Resampling.BOX)
            canvas = Image.new("RGB", (side, side), _ground(picture))
            canvas.paste(small, (side // 4, 0))
            drawing = context.artist.complete(
                canvas, template.format(caption=caption), keep_top=0.5, candidates=1, seed=context.seed + i
            )
            bottom = drawing.images[0].crop((side // 4, side - side // 2, side // 4 + side // 2, side))
            drawn.append(np.asarray(bottom))
            wanted.append(np.asarray(change(small)))
            if i < SHOWN:
                shown.append(drawing.images[0])
                labels.append(name if i == 0 else "")
        a, b = (torch.nn.functional.normalize(network.extract(x).features, dim=1) for x in (drawn, wanted))
        likeness = a @ b.T
        first = int((likeness.argmax(1) == torch.arange(count)).sum())
        rows.append((name, share(first, count), f"{1 / count:.3f}"))
        context.say(f"image to image: {name}")
    return Section(
        key="probe",
        title="Image to image, zero shot",
        protocol=(
            f"{count} held-out pictures at half size on the top half, the bottom half drawn with the prompt "
            f"`{CHANGES['upside down'][0].format(caption='CAPTION')}` and its like. Right where, of all {count} "
            "pictures so changed, the wanted one is nearest to what was drawn in the middle of the bottom half, by "
            "the cosine of features. Nothing like it is in the training, unless the data holds such pairs."
        ),
        tables=[
            Table(
                title="The wanted change found",
                columns=("change", "share", "by chance"),
                rows=rows,
                features=named(network),
            )
        ],
        pictures=[
            context.sheet("probe", shown, labels, "Top halves given, bottom halves drawn, a row a change")
        ],
    )


def _ground(picture: np.ndarray) -> tuple[int, int, int]:
    """The median colour of the border."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    r, g, b = np.median(border, axis=0).astype(int).tolist()
    return r, g, b
