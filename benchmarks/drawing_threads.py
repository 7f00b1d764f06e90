"""How long pictures take to draw by one thread, by threads that share each product, and by threads with a batch each.

    python benchmarks/drawing_threads.py emoji
    python benchmarks/drawing_threads.py runs/shapes/bundle --candidates 8 64 --threads 4 --rounds 9

The same codes all three ways, which is checked, in rounds that alternate. Seconds of drawing, without decoding and
ranking, are medians; how many times as fast as one thread is the median of the rounds' own ratios.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from armchair.sample.engine import Engine
from armchair.sample.pipeline import Artist, load_artist

WAYS = ("one", "shared", "a batch each")


def drawn(artist: Artist, prompt: str, candidates: int, way: str, threads: int) -> tuple[float, np.ndarray]:
    """Seconds, and the codes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if way == "one" else threads)
    try:
        with mock.patch.object(Engine, "independent_threads", way == "a batch each"):
            began = time.perf_counter()
            codes = artist._draw(prompt, list(range(candidates)), 0, artist.settings)
            return time.perf_counter() - began, codes
    finally:
        torch.set_num_threads(before)


def measure(artist: Artist, prompt: str, candidates: int, threads: int, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(1 + rounds):
        found = {way: drawn(artist, prompt, candidates, way, threads) for way in WAYS}
        assert all((codes == found["one"][1]).all() for _, codes in found.values()), "other codes came out"
        for way, (took, _) in found.items() if i else ():  # the first round does not count
            seconds[way].append(took)
    row: dict[str, Any] = {"candidates": candidates, **{way: statistics.median(seconds[way]) for way in WAYS}}
    for way in WAYS[1:]:
        row[f"{way}, times as fast"] = statistics.median(
            a / b for a, b in zip(seconds["one"], seconds[way], strict=True)
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artist, rows = load_artist(args.model, "cpu"), []
    if not artist.decoder().independent_threads:
        sys.exit("drawing here is not by the compiled step, and threads share each product")
    for candidates in args.candidates:
        rows.append(measure(artist, args.prompt, candidates, args.threads, args.rounds))
        print("  ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
