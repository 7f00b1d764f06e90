"""How often the shapes reader reads a picture back whole: every split, clean and disturbed.

    python benchmarks/shapes_reader.py --scenes 200

Whole: ground, count, and every object's form, colour, size and fill are right, all relations hold, and every
centre is within 2 px. Needs no model. Prints a Markdown table; a minute or so on one CPU core.
"""

import argparse
import io
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from armchair.shapes.accuracy import wilson
from armchair.shapes.reader import read
from armchair.shapes.world import GROUNDS, SPLITS, Scene, holds, render, scene

SHIFT = 4  # px, at most, in x and in y
Changed = tuple[np.ndarray, int, int]  # the picture, and how far it was moved right and down


def clean(s: Scene, rng: np.random.Generator) -> Changed:
    return render(s), 0, 0


def jpeg(s: Scene, rng: np.random.Generator) -> Changed:
    file = io.BytesIO()
    Image.fromarray(render(s)).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file).convert("RGB")), 0, 0


def noisy(s: Scene, rng: np.random.Generator) -> Changed:
    soft = np.asarray(Image.fromarray(render(s)).filter(ImageFilter.GaussianBlur(0.6)), np.int16)
    noise = rng.integers(-4, 5, soft.shape)
    return (soft + noise).clip(0, 255).astype(np.uint8), 0, 0


def shifted(s: Scene, rng: np.random.Generator) -> Changed:
    dx, dy = (int(v) for v in rng.integers(-SHIFT, SHIFT + 1, 2))
    picture = render(s)
    side = len(picture)
    wide = np.empty((side + 2 * SHIFT, side + 2 * SHIFT, 3), np.uint8)
    wide[:] = GROUNDS[s.ground]
    wide[SHIFT : SHIFT + side, SHIFT : SHIFT + side] = picture
    return wide[SHIFT - dy : SHIFT - dy + side, SHIFT - dx : SHIFT - dx + side], dx, dy


CHANGES: dict[str, Callable[[Scene, np.random.Generator], Changed]] = {
    "clean": clean,
    "JPEG q90": jpeg,
    "noise ±4, blur 0.6": noisy,
    "shift ±4 px": shifted,
}


def whole(truth: Scene, found: Scene, dx: int, dy: int) -> bool:
    if truth.ground != found.ground or len(truth.objects) != len(found.objects):
        return False
    for chosen in itertools.permutations(found.objects):
        if all(
            (a.form, a.colour, a.size, a.fill) == (b.form, b.colour, b.size, b.fill)
            and max(abs(a.x + dx - b.x), abs(a.y + dy - b.y)) <= 2
            for a, b in zip(truth.objects, chosen, strict=True)
        ):
            return all(holds(r, *chosen[i : i + 2]) for i, r in enumerate(truth.relations))
    return False


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--scenes", type=int, default=200, help="scenes a cell")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes and of the disturbances")
    args = parser.parse_args()
    began, reads = time.perf_counter(), 0
    print(f"| split | {' | '.join(CHANGES)} |")
    print("|---|" + "---|" * len(CHANGES))
    total = dict.fromkeys(CHANGES, 0)
    for split in SPLITS:
        scenes = [scene(i, seed=args.seed, split=split) for i in range(args.scenes)]
        cells = []
        for name, change in CHANGES.items():
            rng = np.random.default_rng(args.seed)
            right = 0
            for s in scenes:
                picture, dx, dy = change(s, rng)
                right += whole(s, read(picture), dx, dy)
            reads += len(scenes)
            total[name] += right
            cells.append(f"{right / len(scenes):.3f}")
        print(f"| {split} | {' | '.join(cells)} |", flush=True)
    number = args.scenes * len(SPLITS)
    print(f"| all {number} | " + " | ".join(f"{n / number:.4f}" for n in total.values()) + " |")
    spans = (wilson(n, number) for n in total.values())
    print("| 95 % interval | " + " | ".join(f"{low:.4f} to {high:.4f}" for low, high in spans) + " |")
    seconds = time.perf_counter() - began
    print(f"{reads} pictures in {seconds:.0f} s, {1000 * seconds / reads:.1f} ms each", file=sys.stderr)


if __name__ == "__main__":
    main()
