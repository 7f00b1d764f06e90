"""Prompt accuracy against training time, from the log of a run with `prior_training.accuracy_prompts`.

    armchair train recipes/shapes.yaml --out runs/long --set prior_training.steps=7200 \\
        --set prior_training.validate_every=300 --set prior_training.accuracy_prompts=100
    python benchmarks/shapes_curve.py runs/long --json curve.json --plot curve.png

Minutes count the work of all stages, with the validations and drawings on the way, without the pauses of a run that
was stopped and resumed.
A plot needs the `evaluate` extra.
"""

import argparse
import json
import sys
from pathlib import Path

LINES = {
    "accuracy_1": "one object",
    "accuracy_2": "two objects",
    "accuracy_held_1": "one object, pairs kept from training",
    "accuracy_held_2": "two objects, pairs kept from training",
}
PAUSE = 300  # s; a longer silence in the log is a run that was not running


def curve(log: Path) -> list[dict[str, float]]:
    """A point for each validation with accuracies: minutes, step, and share of drawings that were right."""
    points, worked, before = [], 0.0, None
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if before is not None and event["time"] - before < PAUSE:
            worked += event["time"] - before
        before = event["time"]
        if event["event"] == "validation" and (shares := {k: v for k, v in event.items() if k.startswith("accuracy")}):
            points = [p for p in points if p["step"] < event["step"]]  # told again after a resume
            points.append({"minutes": round(worked / 60, 2), "step": event["step"], **shares})
    return points


def plot(points: list[dict[str, float]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("a plot needs matplotlib: pip install 'armchair[evaluate]'")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, label in LINES.items():
        shown = [p for p in points if name in p]  # logs from before held-out pairs were drawn have two of the four
        if shown:
            axes.plot([p["minutes"] for p in shown], [100 * p[name] for p in shown], marker="o", ms=3, label=label)
    axes.set(xlabel="minutes of training, all stages", ylabel="whole scene right, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    points = curve(args.run / "log.jsonl")
    if not points:
        sys.exit(f"{args.run}/log.jsonl has no accuracies: train with prior_training.accuracy_prompts above 0")
    for p in points:
        print("  ".join(f"{k} {v:g}" for k, v in p.items()))
    if args.json:
        args.json.write_text(json.dumps(points, indent=1) + "\n")
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
