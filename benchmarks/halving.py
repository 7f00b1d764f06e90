"""What it is worth to drop the worse half of the candidates half-way (`--halve`), beside drawing all of them.

    python benchmarks/halving.py emoji --json halving.json
    python benchmarks/halving.py runs/shapes/bundle --shapes held-form-colour --candidates 64

Each prompt is drawn in turn with N candidates, with N halved, and with so many more, halved, as take the time of N,
which is measured first. `score`: the ranker's of the best picture; `kept`: how often halving finishes the best of the N
too; on the shapes world also whether the best is right as a whole. Intervals are 95 % over prompts.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from armchair.eval.figures import mean_figure
from armchair.sample.pipeline import Artist, Drawing, load_artist
from armchair.shapes.accuracy import judge
from armchair.shapes.captions import Prompt, prompts

PROMPTS = (
    "a red apple",
    "grinning face, noto emoji",
    "blue heart, twemoji",
    "house",
    "dog face, fluent flat emoji",
    "woman astronaut, twemoji",
    "pizza",
    "rocket, noto emoji",
    "green book",
    "crescent moon",
    "cat face with tears of joy",
    "evergreen tree, fluent color emoji",
)
TIMED = 3  # draws of each kind that the number of candidates of equal time is found from


def timed(artist: Artist, text: str, candidates: int, halve: bool, seed: int) -> tuple[float, Drawing]:
    began = time.perf_counter()
    drawing = artist.draw(text, candidates=candidates, seed=seed, halve=halve)
    return time.perf_counter() - began, drawing


def measure(artist: Artist, wanted: list[tuple[str, Prompt | None]], candidates: int) -> dict[str, Any]:
    ratios = []
    for i in range(TIMED):
        whole, halved = (timed(artist, wanted[i % len(wanted)][0], candidates, h, i)[0] for h in (False, True))
        ratios.append(whole / halved)
    more = round(candidates * statistics.median(ratios))
    kinds = {"all": (candidates, False), "halved": (candidates, True), "halved, as long as all": (more, True)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    scores: dict[str, list[float]] = {kind: [] for kind in kinds}
    right: dict[str, list[bool]] = {kind: [] for kind in kinds}
    kept = []
    for i, (text, prompt) in enumerate(wanted):
        best = {}
        for kind, (count, halve) in kinds.items():
            took, drawing = timed(artist, text, count, halve, i)
            seconds[kind].append(took)
            scores[kind].append(drawing.scores[0] or 0.0)
            best[kind] = drawing.candidates[0]
            if prompt is not None:
                right[kind].append(judge(prompt, drawing.images[0]).whole)
        kept.append(best["halved"] == best["all"])
    found: dict[str, Any] = {"prompts": len(wanted), "kept": float(np.mean(kept)), "rows": {}}
    for kind, (count, _) in kinds.items():
        gain = np.array(scores[kind]) - np.array(scores["all"])
        row = {
            "candidates": count,
            "seconds": statistics.median(seconds[kind]),
            "score": float(np.mean(scores[kind])),
            "more than all": mean_figure(gain).to_json(),
        }
        if right[kind]:
            row["right"] = float(np.mean(right[kind]))
        found["rows"][kind] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--shapes", metavar="SPLIT", help="prompts of that split of the shapes world, with one object")
    parser.add_argument("--prompts", type=int, default=40, help="of the shapes world")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artist = load_artist(args.model, "cpu")
    if artist.ranker is None:
        parser.error(f"{args.model} has no ranker")
    wanted: list[tuple[str, Prompt | None]] = [(text, None) for text in PROMPTS]
    if args.shapes:
        wanted = [(p.text, p) for p in prompts(args.prompts, split=args.shapes, objects=1)]
    found = measure(artist, wanted, args.candidates)
    print(f"{found['prompts']} prompts; halving finishes the best of all for {found['kept']:.3f} of them")
    for kind, row in found["rows"].items():
        print(kind, "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
