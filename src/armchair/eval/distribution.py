"""How like real pictures the drawings are as a whole: FID, KID and IS, and these under blur (paper, figure 9)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from armchair.eval.distances import fid, fid_figure, inception_figure, inception_score, kid_figure
from armchair.eval.features import named
from armchair.eval.figures import Cell, Picture, Section, Table, line_plot
from armchair.eval.pairs import Context

RADII = tuple(range(9))  # pixels at 256 x 256, as in the paper
PAPER_SIDE = 256
SHOWN = 32


def distribution(context: Context) -> Section:
    real, drawn = context.held_out.images, context.drawings()
    tables, pictures = [], [_sheet(context, drawn)]
    for network in context.networks:
        a = context.extracted(network, "held-out pictures", real)
        b = context.extracted(network, "drawings", drawn)
        half = len(real) // 2
        rows: list[tuple[Cell, ...]] = [
            ("drawings", fid_figure(a.features, b.features), kid_figure(a.features, b.features))
        ]
        halves = a.features[:half], a.features[half:]
        rows.append(
            (f"held-out pictures, one half against the other ({half})", fid_figure(*halves), kid_figure(*halves))
        )
        columns: tuple[str, ...] = ("", "FID", "KID")
        if a.logits is not None and b.logits is not None:
            rows[0] += (inception_figure(b.logits),)
            rows[1] += (inception_figure(a.logits),)
            columns += ("IS",)
        title = f"Distances over {network.name}"
        tables.append(Table(title=title, columns=columns, rows=rows, features=named(network)))
    pictures += _blur(context, real, drawn)
    return Section(
        key="distribution",
        title="Drawings as a whole",
        protocol=(
            f"{len(drawn)} drawings, one for each held-out caption, none chosen, against the {len(real)} pictures of "
            f"these captions at {context.artist.resolution} x {context.artist.resolution}. Resized for the network "
            "bicubically with antialiasing in floating point "
            "(Parmar et al., 2022). FID, KID (subsets of half) and IS (10 splits) by torchmetrics; intervals are 1.96 "
            "standard deviations of bootstrap resamples, IS: their percentiles. FID falls with the number of "
            "pictures: compare at equal numbers and over the same features only. The second row is what real pictures "
            "have among themselves; IS there is that of all of them."
        ),
        tables=tables,
        pictures=pictures,
    )


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """uint8 (R, R, 3) under a Gaussian of the given standard deviation in pixels."""
    return image if radius == 0 else np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _blur(context: Context, real: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> list[Picture]:
    """FID and IS over the first network, of both sides blurred alike."""
    network, count = context.networks[0], min(len(real), context.options["blur"])
    if count < 2:
        return []
    scale = context.artist.resolution / PAPER_SIDE
    fids, scores, own = [], [], []
    for radius in RADII:
        a = network.extract([blurred(image, radius * scale) for image in real[:count]])
        b = network.extract([blurred(image, radius * scale) for image in drawn[:count]])
        fids.append((radius, fid(a.features, b.features)))
        if a.logits is not None and b.logits is not None:
            scores.append((radius, inception_score(b.logits)))
            own.append((radius, inception_score(a.logits)))
        context.say(f"blur radius {radius} of {RADII[-1]}")
    x = f"blur radius, pixels at {PAPER_SIDE} x {PAPER_SIDE}"
    title = f"over {network.name}, {count} pictures"
    plots = [line_plot("fid-blur", {"drawings": fids}, title=f"FID {title}, both sides blurred", x=x, y="FID")]
    if scores:
        plots.append(line_plot("is-blur", {"drawings": scores, "pictures": own}, title=f"IS {title}", x=x, y="IS"))
    return plots


def _sheet(context: Context, drawn: Sequence[np.ndarray]) -> Picture:
    labels = context.held_out.captions[:SHOWN]
    return context.sheet("drawings", drawn[:SHOWN], labels, f"The first {len(labels)} drawings, each under its caption")
