"""What each form of a bundle's weights costs: bits an image token of held-out pictures, drawn code after code.

    python benchmarks/engine_quality.py emoji --data emoji/val-0000.tar
    python benchmarks/engine_quality.py runs/shapes/bundle --data shapes:val,length=500

`exact` reads whole pictures at once in 32 bits. A rise is of the mean, with the 95 % interval of its own bootstrap over
pictures. What it does to the shapes world's accuracy: `shapes_accuracy.py BUNDLE --weights fp32` and `--weights int8`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from armchair.eval.figures import bootstrap
from armchair.eval.likelihood import drawn_nats, token_nats
from armchair.eval.pairs import read_pairs
from armchair.sample.engine import WEIGHTS, exact_products
from armchair.sample.pipeline import load_artist

FORMS = [weights for weights in WEIGHTS if weights != "int8" or exact_products()]


def quality(model: str, data: list[str], count: int) -> dict:
    """Bits an image token, and by how much more than exactly, in per cent with its interval, for each form."""
    artist = load_artist(model, "cpu")
    pairs = read_pairs(data, artist, count)
    codes = artist.encode([Image.fromarray(image) for image in pairs.images])
    exact = token_nats(artist, pairs.captions, codes)[1].mean(1).numpy() / math.log(2)
    found: dict = {"bundle": artist.bundle.fingerprint, "pictures": len(pairs), "exact": {"bits": float(exact.mean())}}
    for weights in FORMS:
        bits = drawn_nats(artist, pairs.captions, codes, weights).mean(1).numpy() / math.log(2)

        def rise(rows: np.ndarray, bits: np.ndarray = bits) -> float:
            return 100 * float(bits[rows].mean() / exact[rows].mean() - 1)

        interval = bootstrap(len(bits), rise)
        found[weights] = {
            "bits": float(bits.mean()),
            "rise_percent": rise(np.arange(len(bits))),
            "interval": list(interval),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = quality(args.model, args.data, args.pictures)
    print(f"{found['pictures']} pictures; exact {found['exact']['bits']:.4f} bits an image token")
    for weights in FORMS:
        f = found[weights]
        low, high = f["interval"]
        print(f"{weights:<6} {f['bits']:.4f}  {f['rise_percent']:+.3f} % [{low:+.3f}, {high:+.3f}]")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
