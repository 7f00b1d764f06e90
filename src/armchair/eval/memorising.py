"""Whether the model draws, or remembers: how near drawings are to the nearest picture it learned from.

Legend: N pictures asked about, M training pictures, F numbers or codes a picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armchair.eval.fidelity import share
from armchair.eval.figures import Cell, Figure, Section, Table, mean_figure
from armchair.eval.pairs import Context
from armchair.image.pixels import stack

SIDE = 32  # pixels are compared at this size: small shifts are no difference, details are
FOUND = 0.95  # the share of true copies that the bounds of a near-copy are set to find
SHOWN = 12
CHUNK = 512  # pictures in 32 bits at once

TRAINING, COPIES = "drawings of training captions", "training pictures, round trip"
NEAREST, NEAR = "Nearest training pictures", "Near-copies"  # the tables


class Nearest(NamedTuple):
    """The nearest training picture by pixels and that by codes, for each of N pictures."""

    rmse: np.ndarray  # float (N,)
    by_pixels: np.ndarray  # int (N,), which it is
    shared: np.ndarray  # float (N,), share of codes in common
    by_codes: np.ndarray  # int (N,)


def memorising(context: Context) -> Section:
    section = Section(key="memorising", title="Memorising", protocol="")
    if context.train is None:
        section.skipped = "Give --train, the pictures that the model learned from."
        return section
    most, train, held_out = context.options["memorising"], context.train, context.held_out
    known, known_codes = _small(train.images), _codes(context, train.images)
    captions = train.captions[:most]
    drawn, held_drawn = context.draw_each(captions), context.drawings()
    copies = _pictures(context, known_codes[:most])
    groups = {TRAINING: drawn, COPIES: copies}
    places = list(dict.fromkeys(held_out.places))
    for place in places:
        of = [i for i, name in enumerate(held_out.places) if name == place][:most]
        which = "held-out" if len(places) == 1 else f"held-out ({place})"
        pictures = [held_out.images[i] for i in of]
        groups[f"drawings of {which} captions"] = [held_drawn[i] for i in of]
        groups[f"{which} pictures, round trip"] = _pictures(context, _codes(context, pictures))
        groups[f"{which} pictures"] = pictures
    # What a model can draw of a training picture at best is its round trip: as near as those are copies are.
    own_rmse = _rmse(_small(copies), known[: len(copies)])
    own_shared = (_codes(context, copies) == known_codes[: len(copies)]).mean(1)
    bound, codes_bound = float(np.quantile(own_rmse, FOUND)), float(np.quantile(own_shared, 1 - FOUND))
    section.protocol = (
        f"The nearest of {len(train)} training pictures by RMSE of pixels in [0, 1] at {SIDE} x {SIDE} (area), and by "
        "the share of codes in common. Drawings of training captions and of held-out captions, one each, none chosen "
        "among several. A model that remembers a picture can at best draw its round trip, through the codes and back: "
        f"a near-copy is as near as {FOUND:.0%} of the round trips of {len(copies)} training pictures are to their own "
        f"pictures, by pixels an RMSE of at most {bound:.4f}, by codes at least {codes_bound:.1%} in common. Round "
        "trips of held-out pictures, which the model cannot remember, tell how often that happens by chance, or "
        "because the data hold variants of one picture."
    )
    distances: list[tuple[Cell, ...]] = []
    shares: list[tuple[Cell, ...]] = []
    found: dict[str, Nearest] = {}
    for name, images in groups.items():
        rmse, by_pixels = nearest_pixels(_small(images), known)
        shared, by_codes = most_shared(_codes(context, images), known_codes)
        found[name] = Nearest(rmse, by_pixels, shared, by_codes)
        middle = Figure(value=float(np.median(rmse)), count=len(images))
        distances.append((name, mean_figure(rmse), middle, mean_figure(shared)))
        near = (rmse <= bound, shared >= codes_bound)
        counted = [share(int(x.sum()), len(images)) for x in (*near, near[0] | near[1])]
        shares.append((name, len(images), *counted))
        context.say(f"memorising: {name}")
    of_distances = ("", "RMSE, mean", "RMSE, median", "codes in common, mean")
    of_shares = ("", "pictures", "by pixels", "by codes", "by either")
    section.tables.append(Table(title=NEAREST, columns=of_distances, rows=distances))
    section.tables.append(Table(title=NEAR, columns=of_shares, rows=shares))
    of_drawn = found[TRAINING]
    for by, order, index, said in (
        ("pixels", np.argsort(of_drawn.rmse), of_drawn.by_pixels, [f"RMSE {x:.3f}" for x in of_drawn.rmse]),
        ("codes", np.argsort(-of_drawn.shared), of_drawn.by_codes, [f"{x:.0%} of the codes" for x in of_drawn.shared]),
    ):
        first = order[:SHOWN].tolist()
        shown = [image for i in first for image in (drawn[i], train.images[index[i]])]
        labels = [text for i in first for text in (captions[i], said[i])]
        alt = f"The drawings that are nearest to a training picture by {by}, each followed by that picture"
        section.pictures.append(context.sheet(f"memorising-{by}", shown, labels, alt))
    return section


def nearest_pixels(x: Tensor, known: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """RMSE to the nearest of `known` (M, F) for each of x (N, F), and which it is."""
    index = torch.cdist(x, known).min(1).indices
    # Once more by subtraction: cdist's products would leave the same picture a little apart from itself.
    return _rmse(x, known[index]), index.numpy()


def most_shared(codes: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest share of codes in common with one of `known` (M, F) for each of (N, F), and whose it is."""
    shares = np.empty(len(codes))
    index = np.empty(len(codes), np.int64)
    for i, row in enumerate(codes):
        common = (row == known).mean(1)
        index[i] = common.argmax()
        shares[i] = common[index[i]]
    return shares, index


def _rmse(x: Tensor, y: Tensor) -> np.ndarray:
    """Of each row of (N, F)."""
    return (x - y).square().mean(1).sqrt().numpy()


def _pictures(context: Context, codes: np.ndarray) -> list[np.ndarray]:
    """uint8 (R, R, 3) of each row of codes (N, F)."""
    grid = context.artist.grid
    return [np.asarray(image) for image in context.artist.decode(codes.reshape(-1, grid, grid))]


def _small(images: Sequence[np.ndarray]) -> Tensor:
    """(N, 3 * SIDE * SIDE) float32 in [0, 1]."""
    rows = []
    for start in range(0, len(images), CHUNK):
        x = stack(images[start : start + CHUNK])
        rows.append(torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="area").flatten(1))
    return torch.cat(rows)


def _codes(context: Context, images: Sequence[np.ndarray]) -> np.ndarray:
    """(N, F) int32."""
    rows = []
    for start in range(0, len(images), CHUNK):
        codes = context.artist.encode(context.pil(images[start : start + CHUNK]))
        rows.append(codes.reshape(len(codes), -1).astype(np.int32))
        if len(images) > CHUNK:
            context.say(f"memorising: codes of {start + len(codes)} of {len(images)} pictures")
    return np.concatenate(rows)
