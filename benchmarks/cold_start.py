"""How long the first pictures take from the shell to the files, of bundles side by side.

    armchair export emoji --format int8 --out emoji-int8
    python benchmarks/cold_start.py emoji emoji-int8
    python benchmarks/cold_start.py emoji --candidates 16 512 --keep 4

Each start is a process of its own that draws and ranks so many candidates and writes those that are kept; rounds
alternate, and a ratio is the median of the rounds' own to the first line's. `import torch` alone is timed beside them:
nothing can start sooner. Memory is the most that a start held. Opening and drawing are timed once more in one process
that has drawn before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from armchair.bundle import find_bundle
from armchair.sample.pipeline import Artist, load_artist

PROMPT = "a red apple"
PEAK = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss)
sys.exit(process.returncode)
"""


def alternating(jobs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each job in each round, after a round that does not count."""
    found: dict[Any, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def summary(seconds: list[float], base: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}


def size(model: str) -> int:
    """Bytes on disk."""
    place = find_bundle(model)
    return place.stat().st_size if place.is_file() else sum(path.stat().st_size for path in place.iterdir())


def run(command: list[str]) -> str:
    """What it prints. Ends everything where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def peak_memory(command: list[str]) -> int:
    """The most memory that it holds, in bytes.

    It is started by a small process, as what a process held when it started another counts as that one's too.
    """
    return int(run([sys.executable, "-c", PEAK, *command]).splitlines()[-1]) * 1024


def measure(models: list[str], candidates: list[int], keep: int | None, rounds: int) -> dict:
    lines = [(model, count) for model in models for count in candidates]
    with tempfile.TemporaryDirectory() as out:
        flags = ("--device", "cpu", "--out", out, "--force", *(() if keep is None else ("--keep", str(keep))))
        starts: dict[Any, list[str]] = {
            (model, count): ["-m", "armchair", "draw", PROMPT, "-n", str(count), "--model", model, *flags]
            for model, count in lines
        }

        def start(arguments: list[str]) -> Callable[[], object]:
            return lambda: run([sys.executable, *arguments])

        every = {**starts, "import torch": ["-c", "import torch"]}
        cold = alternating({what: start(arguments) for what, arguments in every.items()}, rounds)
        peaks = {line: peak_memory([sys.executable, *arguments]) for line, arguments in starts.items()}
    opened = alternating({model: lambda model=model: load_artist(model, "cpu") for model in models}, rounds)
    artists = {model: load_artist(model, "cpu") for model in models}

    def draw(artist: Artist, count: int) -> Callable[[], object]:
        return lambda: artist.draw(PROMPT, candidates=count, keep=keep)

    drawn = alternating({line: draw(artists[line[0]], line[1]) for line in lines}, rounds)
    first = lines[0]
    return {
        "import torch": summary(cold["import torch"], cold[first]),
        "open": {
            model: {"bytes": size(model)} | summary(opened[model], opened[models[0]]) for model in models
        },
        "starts": [
            {
                "model": model,
                "candidates": count,
                "start": summary(cold[model, count], cold[first]),
                "draw": summary(drawn[model, count], drawn[first]),
                "peak": peaks[model, count],
            }
            for model, count in lines
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--candidates", type=int, nargs="+", default=[8])
    parser.add_argument("--keep", type=int, help="as in `armchair draw`; all where it is not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.models, args.candidates, args.keep, args.rounds)

    def told(figures: dict) -> str:
        return f"{figures['seconds']:.3f} s ({figures['ratio']:.2f})"

    print(f"import torch alone {told(found['import torch'])}")
    for model, f in found["open"].items():
        print(f"{model}: {f['bytes'] / 2**20:.1f} MiB, open {told(f)}")
    for f in found["starts"]:
        times = f"shell to files {told(f['start'])}, draw {told(f['draw'])}, {f['peak'] / 2**20:.0f} MiB at most"
        print(f"{f['model']}, {f['candidates']} candidates: {times}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
