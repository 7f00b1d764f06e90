"""How long the first pictures take from the shell to the files, of bundles side by side.

    armchair export emoji --format int8 --out emoji-int8
    python benchmarks/cold_start.py emoji emoji-int8

Each start is a process of its own that draws and ranks eight candidates; rounds alternate between the bundles, and a
ratio is the median of the rounds' own. `import torch` alone is timed beside them: nothing can start sooner. Opening and
drawing are timed once more in one process that has drawn before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from armchair.bundle import find_bundle
from armchair.sample.pipeline import Artist, load_artist

PROMPT = "a red apple"
CANDIDATES = 8


def alternating(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
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


def measure(models: list[str], rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as out:

        def start(*arguments: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

        flags = ("-n", str(CANDIDATES), "--device", "cpu", "--out", out, "--force", "--model")
        starts = {model: start("-m", "armchair", "draw", PROMPT, *flags, model) for model in models}
        cold = alternating(starts | {"import torch": start("-c", "import torch")}, rounds)
    opened = alternating({model: lambda model=model: load_artist(model, "cpu") for model in models}, rounds)
    artists = {model: load_artist(model, "cpu") for model in models}

    def draw(artist: Artist) -> Callable[[], object]:
        return lambda: artist.draw(PROMPT, candidates=CANDIDATES)

    drawn = alternating({model: draw(artist) for model, artist in artists.items()}, rounds)
    first = models[0]
    return {
        "import torch": summary(cold["import torch"], cold[first]),
        "bundles": {
            model: {
                "bytes": size(model),
                "start": summary(cold[model], cold[first]),
                "open": summary(opened[model], opened[first]),
                "draw": summary(drawn[model], drawn[first]),
            }
            for model in models
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.models, args.rounds)
    torch = found["import torch"]
    print(f"import torch alone {torch['seconds']:.3f} s, {torch['ratio']:.2f} of a start of {args.models[0]}")
    for model, f in found["bundles"].items():
        times = ", ".join(
            f"{what} {f[key]['seconds']:.3f} s ({f[key]['ratio']:.2f})"
            for what, key in (("shell to files", "start"), ("open", "open"), (f"draw {CANDIDATES}", "draw"))
        )
        print(f"{model}: {f['bytes'] / 2**20:.1f} MiB, {times}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
