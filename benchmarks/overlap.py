"""How well `armchair data overlap` finds training pictures that were planted in a benchmark, changed a little.

    python benchmarks/overlap.py --json overlap.json
    python benchmarks/overlap.py --scenes 1
    python benchmarks/overlap.py --train 'train-{0000..0004}.tar' --bench val-0000.tar

100 of the training pictures are re-encoded (JPEG, quality 75), resized (to 80 %), cropped (5 % off, anywhere) and
brightened (by 15 %), each alone and all at once in turn, and put among 10,000 pictures that were never trained on. By
default both sides are of the shapes world: 10,000 pictures of four scenes each of the training split, and 10,000 whose
scenes have a pair of form and colour that it never has, so that whatever is found among those is false. Four scenes
make two pictures differ in many places, as photographs do; with `--scenes 1` they may differ by the colour of one small
object, which is the hard case.
"""

import argparse
import io
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from armchair.data.sources import DataConfig, Sample, Source, open_source
from armchair.eval.overlap import find_overlap
from armchair.image.pixels import BrokenSample
from armchair.sample.ranker import load_ranker

PLANTED, OTHERS = 100, 10_000


def reencoded(image: Image.Image, rng: random.Random) -> Image.Image:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=75)
    return Image.open(data).convert("RGB")


def resized(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.resize((round(0.8 * image.width), round(0.8 * image.height)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    w, h = round(0.95 * image.width), round(0.95 * image.height)
    left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    return image.crop((left, top, left + w, top + h))


def brightened(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.15)


def everything(image: Image.Image, rng: random.Random) -> Image.Image:
    return reencoded(brightened(resized(cropped(image, rng), rng), rng), rng)


CHANGES = (reencoded, resized, cropped, brightened, everything)


class Collages:
    """Scenes of the shapes world, side * side of them a picture."""

    def __init__(self, split: str, length: int, side: int):
        self.split, self.side = split, side
        self.scenes = open_source([f"shapes:{split},length={length * side * side}"], DataConfig())

    def __len__(self) -> int:
        return len(self.scenes) // self.side**2

    def __getitem__(self, i: int) -> Sample:
        tiles = [self.scenes[i * self.side**2 + n].image for n in range(self.side**2)]
        rows = [np.concatenate(tiles[n : n + self.side], 1) for n in range(0, len(tiles), self.side)]
        return Sample(np.concatenate(rows), ("scenes",))

    def key(self, i: int) -> str:
        return f"{self.split}/{i}"


class Planted:
    """A benchmark with changed training pictures behind its own."""

    def __init__(self, bench: Source, train: Source, count: int):
        self.bench, self.train = bench, train
        self.chosen: list[int] = []
        for i in random.Random(0).sample(range(len(train)), len(train)):
            if len(self.chosen) == count:
                break
            try:
                train[i]
            except BrokenSample:
                continue
            self.chosen.append(i)

    def __len__(self) -> int:
        return len(self.bench) + len(self.chosen)

    def __getitem__(self, i: int) -> Sample:
        if i < len(self.bench):
            return self.bench[i]
        n = i - len(self.bench)
        sample = self.train[self.chosen[n]]
        changed = CHANGES[n % len(CHANGES)](Image.fromarray(sample.image), random.Random(n))
        return Sample(np.asarray(changed), sample.captions)

    def key(self, i: int) -> str:
        return self.bench.key(i) if i < len(self.bench) else f"planted/{i - len(self.bench)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, choices=(1, 4, 9), default=4, help="of the shapes world, a picture")
    parser.add_argument("--train", nargs="+", help="training pictures of your own, with --bench")
    parser.add_argument("--bench", nargs="+")
    parser.add_argument("--ranker", help="a bundle whose ranker compares, in place of the perceptual hash")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    if (args.train is None) != (args.bench is None):
        parser.error("--train and --bench go together")
    if args.train is None:
        train, bench = (Collages(split, OTHERS, math.isqrt(args.scenes)) for split in ("train", "held-form-colour"))
    else:
        train, bench = (open_source(paths, DataConfig()) for paths in (args.train, args.bench))
    planted = Planted(bench, train, PLANTED)
    ranker = None if args.ranker is None else load_ranker(args.ranker)
    began = time.perf_counter()
    found = find_overlap(train, planted, ranker=ranker, threshold=args.threshold)  # type: ignore[arg-type]
    distances = {match.bench: match.distance for match in found.matches}
    true = {f"planted/{n}": train.key(i) for n, i in enumerate(planted.chosen)}
    right = {m.bench for m in found.duplicates if true.get(m.bench) == m.train}
    own = sorted(d for key, d in distances.items() if not key.startswith("planted/"))
    false = sum(d <= found.threshold for d in own)
    by_change = {
        change.__name__: sum(f"planted/{n}" in right for n in range(k, PLANTED, len(CHANGES)))
        for k, change in enumerate(CHANGES)
    }
    results = {
        "compared by": found.by,
        "threshold": found.threshold,
        "planted": PLANTED,
        "found": len(right),
        "found by change, of 20": by_change,
        "others": len(own),
        "false": false,
        "false, share": false / len(own),
        "distance of planted pictures, largest": max(d for key, d in distances.items() if key.startswith("planted/")),
        "distance of others, 1 % quantile": own[len(own) // 100],
        "seconds": round(time.perf_counter() - began, 1),
    }
    for name, value in results.items():
        print(f"{name:<40} {value}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.sheet:
        find_overlap(train, planted, ranker=ranker).sheet(48).save(args.sheet)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
