"""Whether the model draws, or remembers: how near drawings are to the nearest picture it learned from."""

import numpy as np
import torch
from torch import Tensor

from armchair.eval.figures import Cell, Figure, Section, Table, mean_figure
from armchair.eval.pairs import Context
from armchair.image.pixels import stack

SIDE = 32  # pixels are compared at this size: small shifts are no difference, details are
NEAR = 0.05  # RMSE of pixels in [0, 1] below which two pictures are near-copies
SAME_CODES = 0.9  # share of codes in common above which they are, too
SHOWN = 12


def memorising(context: Context) -> Section:
    section = Section(
        key="memorising",
        title="Memorising",
        protocol=(
            f"The nearest of {len(context.train) if context.train else 0} training pictures by RMSE of pixels in [0, "
            f"1] at {SIDE} x {SIDE} (area), and by the share of codes in common. Near-copies: an RMSE below {NEAR}, or "
            f"{SAME_CODES:.0%} of the codes. Drawings of training captions and of held-out captions, one each; "
            "held-out pictures themselves are the measure of how near two different pictures come anyway."
        ),
    )
    if context.train is None:
        section.skipped = "Give --train, the pictures that the model learned from."
        return section
    count = min(context.options["memorising"], len(context.held_out), len(context.train))
    known, known_codes = _small(context.train.images), _codes(context, context.train.images)
    seen = context.draw_each(context.train.captions[:count])
    groups = {
        "drawings of training captions": seen,
        "drawings of held-out captions": context.drawings()[:count],
        "held-out pictures": context.held_out.images[:count],
    }
    rows: list[tuple[Cell, ...]] = []
    nearest_of, near_of = {}, {}
    for name, images in groups.items():
        rmse, nearest = _nearest(_small(images), known)
        shared = _shared(_codes(context, images), known_codes)
        near = ((rmse < NEAR) | (shared > SAME_CODES)).astype(float)
        nearest_of[name], near_of[name] = (rmse, nearest), near.mean()
        rows.append((name, mean_figure(rmse), mean_figure(shared), mean_figure(near)))
    gap = near_of["drawings of training captions"] - near_of["held-out pictures"]
    rows.append(("near-copies beyond what held-out pictures have", "", "", Figure(value=float(gap))))
    columns = ("", "RMSE to the nearest", "codes in common with the nearest", "near-copies, share")
    section.tables.append(Table(title="Nearest training pictures", columns=columns, rows=rows))
    rmse, nearest = nearest_of["drawings of training captions"]
    order = np.argsort(rmse)[:SHOWN]
    shown = [image for i in order for image in (seen[i], context.train.images[nearest[i]])]
    labels = [text for i in order for text in (context.train.captions[i], f"{rmse[i]:.3f}")]
    alt = "The drawings that are nearest to a training picture, each followed by that picture and the RMSE"
    section.pictures.append(context.sheet("memorising", shown, labels, alt))
    return section


def _small(images: list[np.ndarray]) -> Tensor:
    x = stack(images)
    return torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="area").flatten(1)


def _codes(context: Context, images: list[np.ndarray]) -> np.ndarray:
    return context.artist.encode(context.pil(images)).reshape(len(images), -1).astype(np.int32)


def _nearest(x: Tensor, known: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """RMSE to the nearest of `known` (M, F) for each of x (N, F), and which it is."""
    distance, index = torch.cdist(x, known).min(1)
    return (distance / x.shape[1] ** 0.5).numpy(), index.numpy()


def _shared(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.array([(row == known).mean(1).max() for row in codes])
