"""Whether drawing has become slower: the engine beside the literal decoder, in ratios that hold on a busy machine.

    python benchmarks/ratios.py

A prior of four layers with random weights is drawn from by `Prior.decode_step`, which is the literal decoder, and by
the engine in eight bits, in turn; and by the engine on a grid of 24 x 24 and of 8 x 8 with each attention pattern.
Figures are medians of five rounds. Bounds are about two thirds of what an idle machine has, where more is better, and
half as much again where less is. Ends with exit code 1 where one is broken. Some 15 seconds of one core.
"""

import argparse
import json
import sys
from pathlib import Path

from armchair.bench.run import run
from armchair.bench.shape import Job

SIZES = {"text": 16, "grid": 8, "text_vocab": 1000, "codebook": 2048, "width": 512, "depth": 4, "heads": 8}
AT_LEAST = {"batch 1": 1.3, "batch 8": 1.4}  # times as fast as the literal decoder
AT_MOST = {  # a step's time on the larger grid over that on the smaller
    "grid 24 over 8, row": 1.5,
    "grid 24 over 8, column": 1.7,
    "grid 24 over 8, convolutional": 2.3,  # on 8 x 8 it sees two thirds of its window
}


def broken(found: dict[str, float]) -> list[str]:
    """What is not within its bound, a line each."""
    slow = [f"{n}: {found[n]:.2f}, at least {bound}" for n, bound in AT_LEAST.items() if found[n] < bound]
    return slow + [f"{n}: {found[n]:.2f}, at most {bound}" for n, bound in AT_MOST.items() if found[n] > bound]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(Job(system="armchair-int8", **SIZES), extra="ratios")
    for name, ratio in found.items():
        print(f"{name:32}{ratio:6.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if wrong := broken(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
