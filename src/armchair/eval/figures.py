"""Figures with their uncertainty: bootstrap intervals, and what a test hands to the report."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, its 95 % interval where it has one, and how many observations it is of."""

    value: float
    interval: tuple[float, float] | None = None
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": self.interval and list(self.interval), "count": self.count}


Cell = Figure | str | int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, the first of each its name. Numbers over different features never share a table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    features: str | None = None  # name and fingerprint of the network that the numbers are over


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot or a sheet, as PNG; `alt` says in words what is on it."""

    name: str
    png: bytes = field(repr=False)
    alt: str

    @classmethod
    def of(cls, name: str, image: Image.Image, alt: str) -> "Picture":
        data = io.BytesIO()
        image.save(data, format="PNG")
        return cls(name=name, png=data.getvalue(), alt=alt)

    @classmethod
    def of_plot(cls, name: str, canvas: Any, alt: str) -> "Picture":
        """canvas: a matplotlib Figure."""
        data = io.BytesIO()
        canvas.savefig(data, format="png")
        return cls(name=name, png=data.getvalue(), alt=alt)


@dataclass(kw_only=True)
class Section:
    """What one test found. `protocol` says how, exactly; `skipped` why there is nothing."""

    key: str
    title: str
    protocol: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0


def bootstrap(
    count: int, statistic: Callable[[np.ndarray], float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic over `count` observations (Efron, 1979).

    `statistic` takes indices (count,) int64 drawn with repetition, always the same for a seed.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    values = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def around(
    value: float, resampled: Sequence[float], count: int, *, least: float = -np.inf, most: float = np.inf
) -> Figure:
    """A value with 1.96 standard deviations of its bootstrap resamples either side, within what it can be.

    For statistics that resampling itself moves: pictures repeat in a resample, so that it has fewer different ones, and
    percentiles would lie beside the value.
    """
    reach = 1.96 * float(np.std(resampled, ddof=1))
    return Figure(value=value, interval=(max(least, value - reach), min(most, value + reach)), count=count)


def mean_figure(values: Sequence[float] | np.ndarray, seed: int = 0) -> Figure:
    """The mean of one or more observations."""
    x = np.asarray(values, dtype=np.float64)
    return Figure(
        value=float(x.mean()), interval=bootstrap(len(x), lambda i: float(x[i].mean()), seed=seed), count=len(x)
    )


def line_plot(
    name: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Picture:
    """Lines through (x, y) points, with intervals as bands."""
    from matplotlib.figure import Figure as Canvas  # no pyplot: nothing of the process is changed

    canvas = Canvas(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = canvas.add_subplot()
    for label, points in lines.items():
        (line,) = axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=label)
        if bands and label in bands:
            low, high = zip(*bands[label], strict=True)
            axes.fill_between([p[0] for p in points], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    ends = "; ".join(
        f"{label}: {p[0][1]:.3g} at {p[0][0]:g} to {p[-1][1]:.3g} at {p[-1][0]:g}" for label, p in lines.items()
    )
    return Picture.of_plot(name, canvas, f"{title}. {y} against {x}. {ends}")
