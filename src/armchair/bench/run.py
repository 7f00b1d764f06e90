"""`armchair bench`: armchair beside named peers and beside the machine's own bounds, all in one run.

Each measurement is a process of its own, so that none inherits another's memory or threads. Rounds go over all systems,
one after the other, so that a machine whose speed drifts drifts for all; figures are medians over the rounds, ratios
the medians of the rounds' own ratios.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from armchair import environment
from armchair.bench.shape import PEERS, SYSTEMS, Job
from armchair.config import check_name
from armchair.errors import RequestError, WorkError

TIME_LIMIT = 1800  # seconds of one measurement


@dataclass(kw_only=True)
class Measured:
    """Tokens (of training: samples) a second of one system at one batch size, a figure a round."""

    system: str
    batch: int
    precision: str | None  # of training
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def over(self, other: "Measured") -> float:
        """How many times as fast as `other`, the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def bench(
    job: Job,
    systems: Sequence[str],
    batches: Sequence[int],
    *,
    peer_python: str,
    rounds: int,
    precisions: Sequence[str] = ("bf16",),
    say: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Measure `systems`, names of SYSTEMS and PEERS, at each batch size.

    Raises RequestError for an unknown system, one whose package the environment lacks, or one that cannot do it.
    """
    for system in systems:
        check_name("system", system, (*SYSTEMS, *PEERS))
    training = job.what == "training"
    jobs = [
        replace(job, system=system, batch=batch, precision=precision)
        for batch in batches
        for system in systems
        for precision in (precisions if training else ("fp32",))
    ]
    found = [Measured(system=j.system, batch=j.batch, precision=j.precision if training else None) for j in jobs]
    for number in range(1, rounds + 1):
        for one, measured in zip(jobs, found, strict=True):
            result = run(one, peer_python)
            measured.rates.append(result["count"] / result["seconds"])
            kind = f" {measured.precision}" if training else ""
            rate = short(measured.rates[-1])
            say(f"round {number} of {rounds}: {one.system}{kind}, batch {one.batch}: {rate} a second")
    return found


def run(job: Job, peer_python: str = sys.executable, extra: str | None = None) -> dict[str, Any]:
    """One measurement in a process of its own. Raises as `bench`, and WorkError where it fails."""
    wanted = {**asdict(job), **({"extra": extra} if extra else {})}
    peer = job.system in PEERS
    own = [sys.executable, "-m", "armchair.bench.own"]
    place = [peer_python, str(Path(__file__).with_name("peer.py"))] if peer else own
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    surroundings = {**os.environ, **threads, **offline}
    if not peer and job.what == "sampling":  # as the commands that draw do
        environment.for_drawing(job.batch, job.system.removeprefix("armchair-"), surroundings)
    try:
        done = subprocess.run(
            [*place, json.dumps(wanted)],
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except OSError as error:
        raise RequestError(f"cannot run {place[0]}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise WorkError(f"{job.system} took longer than {TIME_LIMIT} s; ask for a smaller model or batch") from None
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise WorkError(f"{job.system} failed: {last[:300]}") from None
    if "missing" in result:
        raise RequestError(
            f"{job.system} needs {result['missing']!r} in the environment of {peer_python}; install it there, or name "
            "another with --peer-python (docs/speed.md says what each peer needs)"
        )
    if "refused" in result:
        raise RequestError(str(result["refused"]))
    return dict(result)


def share_of_bound(measured: Measured, machine: dict[str, float]) -> float | None:
    """Steps a second over those that reading the weights once a step would allow; None for what is not ours."""
    size = {"armchair-int8": 1, "armchair-bf16": 2, "armchair-fp32": 4, "plain": 4}.get(measured.system)
    if size is None or not machine:
        return None
    return measured.median / measured.batch / (machine["read_bytes"] / (size * machine["weights"]))


def report(
    job: Job, found: Sequence[Measured], machine: dict[str, float], parts: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """All of it as JSON data."""
    first = found[0]
    rows = []
    for measured in found:
        beside = (first.system, measured.batch, measured.precision)
        ours = next(m for m in found if (m.system, m.batch, m.precision) == beside)
        rows.append(
            {
                **{k: v for k, v in vars(measured).items() if v is not None},
                "median": measured.median,
                "lowest": min(measured.rates),
                "highest": max(measured.rates),
                f"{first.system} over it": ours.over(measured),
                "share of the bound": share_of_bound(measured, machine) if job.what == "sampling" else None,
            }
        )
    sizes = {k: v for k, v in asdict(job).items() if k not in ("system", "batch", "precision")}
    return {"sizes": sizes, "machine": machine, "measured": rows, "seconds a token by part": parts}


def _label(row: dict[str, Any]) -> str:
    return " ".join(filter(None, (row["system"], row.get("precision"))))


def _unit(data: dict[str, Any]) -> str:
    return "image tokens a second" if data["sizes"]["what"] == "sampling" else "samples a second"


def table(data: dict[str, Any]) -> str:
    """The report for people."""
    sizes, machine = data["sizes"], data["machine"]
    lines = [
        f"{_unit(data)}; text {sizes['text']}, grid {sizes['grid']}, width {sizes['width']}, depth {sizes['depth']}, "
        f"heads {sizes['heads']}, {sizes['threads']} thread(s)"
    ]
    if machine:
        lines.append(
            f"this machine, measured beside: reads {machine['read_bytes'] / 1e9:.1f} GB/s, copies "
            f"{machine['copied_bytes'] / 1e9:.1f} GB/s, {machine['flops_fp32'] / 1e9:.0f} GFLOP/s in fp32, "
            f"{machine['flops_bf16'] / 1e9:.0f} in bf16"
        )
    over = next(name for name in data["measured"][0] if name.endswith("over it"))
    lines += ["", f"{'system':<26}{'batch':>6}{'median':>10}{'lowest':>10}{'highest':>10}{over:>25}{'of bound':>10}"]
    for row in data["measured"]:
        share = row["share of the bound"]
        lines.append(
            f"{_label(row):<26}{row['batch']:>6}{row['median']:>10.4g}{row['lowest']:>10.4g}{row['highest']:>10.4g}"
            f"{row[over]:>25.2f}{'' if share is None else f'{share:.0%}':>10}"
        )
    for name, parts in data["seconds a token by part"].items():
        whole = parts["all"]
        lines += ["", f"{name}: {1e3 * whole:.2f} ms a step"]
        lines += [f"  {part:<14}{1e3 * s:>8.3f} ms{s / whole:>7.0%}" for part, s in parts.items() if part != "all"]
    return "\n".join(lines)


def plot(data: dict[str, Any], path: Path) -> None:
    """Bars of every system's median at each batch size. Raises RequestError without matplotlib."""
    pyplot = _pyplot()
    rows = data["measured"]
    names = list(dict.fromkeys(map(_label, rows)))
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    height = 0.8 / len(batches)
    for i, batch in enumerate(batches):
        chosen = [r for r in rows if r["batch"] == batch]
        places = [names.index(_label(r)) for r in chosen]
        values = [r["median"] for r in chosen]
        spread = [[r["median"] - r["lowest"] for r in chosen], [r["highest"] - r["median"] for r in chosen]]
        y = [place + i * height for place in places]
        bars = axes.barh(y, values, height, xerr=spread, label=f"batch {batch}")
        axes.bar_label(bars, fmt=short, padding=4, fontsize=8)
    axes.set(yticks=[n + 0.4 - height / 2 for n in range(len(names))], yticklabels=names, xlabel=_unit(data))
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


GROWTH = {"grid": (8, 12, 16, 24, 32), "depth": (6, 12, 24), "batch": (1, 2, 4, 8, 16, 32)}
PATTERNS = ("full", "row", "column", "convolutional")


def growth(job: Job, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Tokens a second against grid, depth and candidates: of each attention pattern along the grid, else `full`."""
    points = []
    for axis, values in GROWTH.items():
        for pattern in PATTERNS if axis == "grid" else ("full",):
            for value in values:
                one = replace(job, pattern=pattern, **{axis: value})  # type: ignore[arg-type]
                result = run(one)
                rate = result["count"] / result["seconds"]
                points.append({"axis": axis, "value": value, "pattern": pattern, "tokens_per_second": rate})
                say(f"{axis} {value}, {pattern}: {short(rate)} tokens a second")
    return points


def plot_growth(points: Sequence[dict[str, Any]], path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(12, 3.6), layout="constrained")
    names = {"grid": "side of the grid", "depth": "layers", "batch": "candidates drawn together"}
    for panel, axis in zip(axes, GROWTH, strict=True):
        for pattern in PATTERNS:
            of = [p for p in points if (p["axis"], p["pattern"]) == (axis, pattern)]
            if of:
                values, rates = [p["value"] for p in of], [p["tokens_per_second"] for p in of]
                panel.plot(values, rates, marker="o", label=pattern)
        panel.set(xlabel=names[axis], ylabel="image tokens a second", ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise RequestError("a plot needs more packages: pip install 'armchair[evaluate]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def short(value: float) -> str:
    """Three digits, for people: 2.91, 47.6, 1,220."""
    return f"{float(f'{value:.3g}'):,g}"


def rounded(value: Any) -> Any:
    """Numbers to four digits, for JSON that people read too."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float) and math.isfinite(value) and value:
        return float(f"{value:.4g}")
    return value
