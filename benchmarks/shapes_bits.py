"""Where a shapes bundle's prior spends its bits: on the ground, on an object's first code, on its rest; on rare codes.

    python benchmarks/shapes_bits.py runs/shapes/bundle

Accuracy jumps with one wrong code in 256; bits move with what the prior has learned, so two recipes can be compared by
them after a few hundred updates.

- `ground`: a picture's commonest code; `first`: the first other one, where an object begins; `rest`: the others.
- Pairs: the same for scenes with one object of each held-out pair of form and colour.
- Words swapped: how many bits a picture with two objects costs more, given its prompt with two colours or two forms
  swapped, and how often it costs more. A model that knows which words there are, and not which belong together, is at 0
  and half of the time.
- Codes by how often they occur in `--count` scenes of training: bits a code that is not ground.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from armchair.clip.negatives import NearMisses
from armchair.eval.likelihood import token_nats
from armchair.prior.thinning import busy_places
from armchair.sample.pipeline import Artist, load_artist
from armchair.shapes.captions import prompts
from armchair.shapes.world import COLOURS, FORMS, HELD_FORM_COLOUR, Scene, render, scene

ROWS = (("val", 1), ("val", 2), ("held-form-colour", 1), ("held-form-colour", 2))
SWAPS = NearMisses([FORMS, tuple(COLOURS)])
RARE = (0, 100, 300, 1000)  # bounds of how often a code occurs, in 10 million codes


def codes_of(artist: Artist, scenes: list[Scene]) -> np.ndarray:
    """(scenes, N)"""
    chunks = [scenes[i : i + 256] for i in range(0, len(scenes), 256)]
    codes = [artist.encode([Image.fromarray(render(s)) for s in chunk]) for chunk in chunks]
    return np.concatenate(codes).reshape(len(scenes), -1)


def parts(codes: np.ndarray) -> dict[str, np.ndarray]:
    """Which codes (pictures, N) are ground, an object's first, or its rest: three masks that add up to everything."""
    common = np.array([np.bincount(row).argmax() for row in codes])
    drawn = codes != common[:, None]
    first = drawn & (drawn.cumsum(1) == 1)
    return {"ground": ~drawn, "first": first, "rest": drawn & ~first}


def bits_of(artist: Artist, texts: list[str], codes: np.ndarray) -> np.ndarray:
    """(scenes, N)"""
    return token_nats(artist, texts, codes)[1].cpu().numpy() / np.log(2)


def swapped(artist: Artist, texts: list[str], codes: np.ndarray, bits: np.ndarray) -> str:
    """Of scenes with two objects, which differ in form or in colour; `bits` (scenes, N) are those with their texts."""
    more = bits_of(artist, [SWAPS.swaps(text)[0] for text in texts], codes).sum(1) - bits.sum(1)
    dearer = f"dearer {(more > 0).mean():.3f} of the time"
    return f"{'  words swapped':<22} {len(more):5d} pictures  all {more.mean():+6.1f}  {dearer}"


def line(name: str, bits: np.ndarray, masks: dict[str, np.ndarray]) -> str:
    each = "  ".join(f"{part} {(bits * mask).sum(1).mean():6.1f}" for part, mask in masks.items())
    return f"{name:<22} {len(bits):5d} pictures  all {bits.sum(1).mean():6.1f}  {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=400, help="a row")
    parser.add_argument("--count", type=int, default=4000, help="scenes of training whose codes are counted")
    args = parser.parse_args()
    artist = load_artist(args.model)
    seen = codes_of(artist, [scene(i) for i in range(args.count)])
    often = np.bincount(seen.flatten(), minlength=artist.image_tokenizer.codebook_size) * (10_000_000 / seen.size)
    moving = busy_places(torch.from_numpy(seen), round(seen.shape[1] ** 0.5)).sum(1).float().mean()
    print(f"{moving:.1f} codes of {seen.shape[1]} are another than a neighbour before them")
    print("bits a picture")
    rare = {}
    for split, objects in ROWS:
        scenes = [scene(i, split=split, objects=objects) for i in range(args.scenes)]
        codes = codes_of(artist, scenes)
        texts = [p.text for p in prompts(len(scenes), split=split, objects=objects)]
        bits = bits_of(artist, texts, codes)
        masks = parts(codes)
        print(line(f"{split} {objects}", bits, masks), flush=True)
        drawn = ~masks["ground"]
        rare[f"{split} {objects}"] = (often[codes[drawn]], bits[drawn])
        if objects == 2:
            print(swapped(artist, texts, codes, bits), flush=True)
        if (split, objects) != ("held-form-colour", 1):
            continue
        of = defaultdict(list)
        for i, s in enumerate(scenes):
            of[s.objects[0].form, s.objects[0].colour].append(i)
        for form, colour in sorted(HELD_FORM_COLOUR & of.keys()):
            rows = of[form, colour]
            print(line(f"  {colour} {form}", bits[rows], {k: m[rows] for k, m in masks.items()}))
    print("bits a code that is not ground, by how often it occurs in 10 million of training")
    for name, (counts, bits) in rare.items():
        print(f"{name:<22}", end="")
        for low, high in zip(RARE, (*RARE[1:], np.inf), strict=True):
            among = bits[(counts >= low) & (counts < high)]
            label = f"{low} to {high}" if np.isfinite(high) else f"{low} on"
            mean = f"{among.mean():.2f}" if len(among) else "-"
            print(f"  {label}: {mean} ({len(among)} codes)", end="")
        print()


if __name__ == "__main__":
    main()
