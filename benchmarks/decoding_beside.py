"""How long pictures take to draw when they are decoded beside the drawing, and when they are decoded after it.

    python benchmarks/decoding_beside.py emoji
    python benchmarks/decoding_beside.py runs/shapes/bundle --candidates 64 256 --rounds 9

The same pictures both ways, which is checked, in rounds that alternate; seconds are medians. Ranking, where there is a
ranker, comes after both alike; `decode` is decoding alone. With one thread there is nothing beside.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from armchair.sample.pipeline import Artist, load_artist


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def measure(artist: Artist, prompt: str, candidates: int, rounds: int) -> dict[str, Any]:
    """Seconds both ways, and how many times as fast the one is as the other (median of the rounds' own ratios)."""
    if not artist._decodes_beside(candidates):
        sys.exit(f"{candidates} candidates with {torch.get_num_threads()} threads are decoded after the drawing")
    beside, after, decode = [], [], []
    for _ in range(1 + rounds):  # the first does not count
        seconds, one = timed(lambda: artist.draw(prompt, candidates=candidates))
        beside.append(seconds)
        with mock.patch.object(Artist, "_decodes_beside", lambda *_: False):
            seconds, other = timed(lambda: artist.draw(prompt, candidates=candidates))
        after.append(seconds)
        assert [x.tobytes() for x in one.images] == [x.tobytes() for x in other.images], "other pictures came out"
        codes = one.codes
        decode.append(timed(lambda codes=codes: artist.decode(codes))[0])
    return {
        "candidates": candidates,
        "beside": statistics.median(beside[1:]),
        "after": statistics.median(after[1:]),
        "decode": statistics.median(decode[1:]),
        "times as fast": statistics.median(a / b for a, b in zip(after[1:], beside[1:], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--candidates", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artist, rows = load_artist(args.model, "cpu"), []
    for candidates in args.candidates:
        rows.append(measure(artist, args.prompt, candidates, args.rounds))
        print("  ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
