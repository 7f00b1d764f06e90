"""How like real pictures the drawings are as a whole: FID, KID and IS, and these under blur (paper, figure 9)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from armchair.eval.distances import (
    FID_RESAMPLES,
    IS_RESAMPLES,
    KID_RESAMPLES,
    fid_figure,
    inception_figure,
    kid_figure,
)
from armchair.eval.features import named
from armchair.eval.figures import Cell, Figure, Picture, Section, Table, line_plot
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
    blur, plots = _blur(context, real, drawn)
    tables += blur
    pictures += plots
    return Section(
        key="distribution",
        title="Drawings as a whole",
        protocol=(
            f"{len(drawn)} drawings, one for each held-out caption, none chosen, against the {len(real)} pictures of "
            f"these captions at {context.artist.resolution} x {context.artist.resolution}. Resized for the network "
            "bicubically with antialiasing in floating point (Parmar et al., 2022). FID, KID (subsets of half) and IS "
            "(10 splits) by torchmetrics; intervals, under blur too, are 1.96 standard deviations of bootstrap "
            f"resamples, {FID_RESAMPLES} for FID, {KID_RESAMPLES} for KID, {IS_RESAMPLES} for IS: not percentiles, "
            "as pictures repeat in a resample, and that alone moves figures. FID falls with the number of pictures: "
            "compare at equal numbers and over the same features only. The second row is what real pictures have among "
            "themselves; IS there is that of all of them."
        ),
        tables=tables,
        pictures=pictures,
    )


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """uint8 (R, R, 3) under a Gaussian of the given standard deviation in pixels."""
    return image if radius == 0 else np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _blur(
    context: Context, real: Sequence[np.ndarray], drawn: Sequence[np.ndarray]
) -> tuple[list[Table], list[Picture]]:
    """FID and IS over the first network, of both sides blurred alike."""
    network, count = context.networks[0], min(len(real), context.options["blur"])
    if count < 2:
        return [], []
    scale = context.artist.resolution / PAPER_SIDE
    fids: dict[str, list[tuple[int, Figure]]] = {"drawings": []}
    scores: dict[str, list[tuple[int, Figure]]] = {"drawings": [], "pictures": []}
    rows: list[tuple[Cell, ...]] = []
    for radius in RADII:
        a = network.extract([blurred(image, radius * scale) for image in real[:count]])
        b = network.extract([blurred(image, radius * scale) for image in drawn[:count]])
        fids["drawings"].append((radius, fid_figure(a.features, b.features)))
        if a.logits is not None and b.logits is not None:
            scores["drawings"].append((radius, inception_figure(b.logits)))
            scores["pictures"].append((radius, inception_figure(a.logits)))
        found = [line[-1][1] for line in (*fids.values(), *scores.values()) if line]
        rows.append((str(radius), *found))
        context.say(f"blur radius {radius} of {RADII[-1]}")
    x = f"blur radius, pixels at {PAPER_SIDE} x {PAPER_SIDE}"
    over = f"over {network.name}, {count} pictures"
    plots = [_plot("fid-blur", fids, f"FID {over}, both sides blurred", x, "FID")]
    columns: tuple[str, ...] = (x, "FID")
    if scores["drawings"]:
        plots.append(_plot("is-blur", scores, f"IS {over}", x, "IS"))
        columns += ("IS", "IS of pictures")
    title = f"Both sides blurred, {count} pictures, over {network.name}"
    return [Table(title=title, columns=columns, rows=rows, features=named(network))], plots


def _plot(name: str, lines: dict[str, list[tuple[int, Figure]]], title: str, x: str, y: str) -> Picture:
    points = {label: [(at, figure.value) for at, figure in line] for label, line in lines.items()}
    bands = {label: [f.interval or (f.value, f.value) for _, f in line] for label, line in lines.items()}
    return line_plot(name, points, title=title, x=x, y=y, bands=bands)


def _sheet(context: Context, drawn: Sequence[np.ndarray]) -> Picture:
    labels = context.held_out.captions[:SHOWN]
    return context.sheet("drawings", drawn[:SHOWN], labels, f"The first {len(labels)} drawings, each under its caption")
