"""How many different patches the shapes world has, and how many of a held-out pair's occur in training.

    python benchmarks/shapes_patches.py

`known` is, over the held-out pairs of form and colour on white, in all sizes and fills, the share of patches that come
within 4 grey levels on average of one that the same colour makes in another form, at the same places of the canvas.
Codes that say a patch each can be put together to an unseen pair only where the patches are known.
"""

import argparse

import numpy as np
import torch

from armchair.shapes.world import CENTRES, FILLS, FORMS, HELD_FORM_COLOUR, SIZES, Object, Scene, render, scene

NEAR = 4.0  # grey levels


def cut(picture: np.ndarray, side: int) -> np.ndarray:
    """(64, 64, 3) -> (patches, side * side * 3)."""
    n = len(picture) // side
    return picture.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, -1)


def patches_of(form: str, colour: str, side: int) -> np.ndarray:
    """What a form in a colour looks like on white, patch by patch, in all sizes and fills; without plain ones."""
    found = []
    for size in SIZES:
        at = CENTRES[size][1]
        for fill in FILLS:
            patches = cut(render(Scene("white", (Object(form, colour, size, fill, at, at),), ())), side)
            found.append(patches[(patches != 255).any(1)])
    return np.concatenate(found)


def known(side: int) -> float:
    shares = []
    for form, colour in sorted(HELD_FORM_COLOUR):
        held = torch.from_numpy(patches_of(form, colour, side)).float()
        seen = torch.from_numpy(np.concatenate([patches_of(f, colour, side) for f in FORMS if f != form])).float()
        nearest = torch.cdist(held, seen, p=1).min(1).values / held.shape[1]
        shares.append(float((nearest < NEAR).float().mean()))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    count = parser.parse_args().pictures
    for side in (4, 8):
        different: set[bytes] = set()
        for i in range(count):
            different.update(patch.tobytes() for patch in cut(render(scene(i)), side))
        size = f"{side} x {side} pixels"
        print(f"{size}: {len(different)} different patches in {count} pictures, known {known(side):.2f}")


if __name__ == "__main__":
    main()
