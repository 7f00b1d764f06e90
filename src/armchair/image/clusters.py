"""Points that gather around centres: rows that are the same, the nearest centre, k-means."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armchair.errors import RequestError

KMEANS_POINTS = 250_000
KMEANS_ROUNDS = 8


class DistinctRows(NamedTuple):
    """Of M rows, N of them different."""

    first: Tensor  # (N,) where each occurs first
    which: Tensor  # (M,) the number of each row among the N
    counts: Tensor  # (N,) how often each occurs


def distinct_rows(rows: Tensor) -> DistinctRows:
    """rows: (M, C), compared bit by bit as opaque values, which numpy sorts many times faster than torch rows."""
    x = rows.contiguous().numpy(force=True)
    opaque = x.view(f"V{x.itemsize * x.shape[1]}")[:, 0]
    _, *found = np.unique(opaque, return_index=True, return_inverse=True, return_counts=True)
    return DistinctRows(*(torch.from_numpy(f).to(rows.device) for f in found))


def distinct(points: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) -> those that differ in their first four decimals, (N, C), and how often each occurs, (N,) float."""
    found = distinct_rows((points * 1e4).round().to(torch.int32))
    return points[found.first], found.counts.to(points)


def kmeans(points: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> tuple[Tensor, float]:
    """(M, C) -> k centres (k, C) and the mean squared distance of the points to them.

    weights: (M,), how much each point counts; all the same where there are none. Starts with k-means++ (Arthur and
    Vassilvitskii, 2007), then Lloyd's rounds; a centre that loses all of its points stays where it is. Where there are
    fewer distinct points than k, some centres coincide.
    """
    if len(points) == 0:
        raise RequestError("k-means needs at least one point")
    order = torch.randperm(len(points), generator=generator).to(points.device)[:KMEANS_POINTS]
    points = points[order]
    weights = torch.ones_like(points[:, 0]) if weights is None else weights[order]
    centres = points[:1].repeat(k, 1)
    distance = (points - centres[0]).square().sum(-1)
    for i in range(1, k):
        u = torch.rand((), generator=generator, dtype=torch.float64).to(points.device)
        cdf = (weights * distance).double().cumsum(0)
        centres[i] = points[torch.searchsorted(cdf, u * cdf[-1]).clamp(max=len(points) - 1)]
        torch.minimum(distance, (points - centres[i]).square().sum(-1), out=distance)
    for _ in range(KMEANS_ROUNDS):
        nearest, _ = nearest_centres(points, centres)
        mass = torch.zeros_like(centres[:, 0]).index_add_(0, nearest, weights)
        total = torch.zeros_like(centres).index_add_(0, nearest, weights[:, None] * points)
        centres = torch.where((mass > 0)[:, None], total / mass.clamp_min(1e-9)[:, None], centres)
    error = nearest_centres(points, centres)[1]
    return centres, float((weights * error).sum() / weights.sum())


def nearest_centres(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C), (k, C) -> the number of each point's nearest centre, (M,) int64, and the squared distance to it, (M,)."""
    half = centres.square().sum(-1) / 2
    index, best = [], []
    for chunk in points.split(4096):  # (4096, k) distances stay in the cache
        value, where = (half - chunk @ centres.T).min(-1)
        index.append(where)
        best.append((2 * value + chunk.square().sum(-1)).clamp_min(0))
    return torch.cat(index), torch.cat(best)
