"""Exact prompt accuracy of a shapes bundle: draws prompts, reads the pictures, prints a table and JSON.

    python benchmarks/shapes_accuracy.py runs/shapes/bundle --prompts 500 --json shapes.json --sheet shapes.png

One picture a prompt (no picking of the best), the bundle's own sampling settings. `codes` is the bound that the image
tokenizer sets: how often the rendered scene itself, through the codes and back, satisfies the prompt.
"""

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image

from armchair.image.sheet import contact_sheet
from armchair.sample.generate import candidate_uniforms, draw_codes
from armchair.sample.next_token import Settings
from armchair.sample.pipeline import load_artist
from armchair.shapes.accuracy import Accuracy, judge
from armchair.shapes.captions import prompts
from armchair.shapes.world import render, scene

SUITES = (
    ("val", 1),
    ("val", 2),
    ("held-form-colour", 1),
    ("held-form-colour", 2),
    ("held-relation-form", 2),
    ("held-count", 3),
)


def measure(model: str, count: int, seed: int, overrides: dict, sheet: Path | None, weights: str | None) -> dict:
    artist = load_artist(model, weights=weights)
    settings = replace(artist.settings, **overrides)
    length = artist.prior.shape.text_length
    about = {"bundle": artist.bundle.fingerprint, "settings": settings.__dict__, "weights": artist.weights}
    results: dict = {**about, "seed": seed, "suites": {}}
    shown, labels = [], []
    for split, objects in SUITES:
        began = time.time()
        wanted = prompts(count, split=split, objects=objects, seed=seed)
        tokens = torch.from_numpy(artist.text_tokenizer.encode([p.text for p in wanted], length))
        uniforms = candidate_uniforms(seed, range(count), artist.prior.shape.image_length)
        codes = draw_codes(artist.decoder(), tokens, range(count), uniforms, settings)
        images = artist.decode(codes.numpy())
        verdicts = [judge(p, image) for p, image in zip(wanted, images, strict=True)]
        accuracy = Accuracy.of(verdicts)
        scenes = [render(scene(i, seed=seed, split=split, objects=objects)) for i in range(count)]
        returned = artist.decode(artist.encode([Image.fromarray(s) for s in scenes]))
        bound = Accuracy.of(judge(p, image) for p, image in zip(wanted, returned, strict=True)).whole
        results["suites"][f"{split}/{objects}"] = {
            "prompts": count,
            "whole": accuracy.whole,
            "interval": list(accuracy.interval),
            "codes": bound,
            **accuracy.shares,
        }
        low, high = accuracy.interval
        shares = "  ".join(f"{k} {v:.3f}" for k, v in accuracy.shares.items() if v is not None)
        whole = f"whole {accuracy.whole:.3f} [{low:.3f}, {high:.3f}]  codes {bound:.3f}"
        print(f"{split:<20} {objects}  {whole}  {shares}  {time.time() - began:.0f} s", flush=True)
        shown += images[:8]
        labels += [("" if v.whole else "WRONG ") + p.text for p, v in zip(wanted[:8], verdicts[:8], strict=True)]
    if sheet is not None:
        contact_sheet(shown, labels, columns=8, scale=2).save(sheet)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=type(setting.default))
    parser.add_argument("--weights", help="int8, bf16 or fp32, as armchair draw has it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    asked = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    overrides = {name: value for name, value in asked.items() if value is not None}
    results = measure(args.model, args.prompts, args.seed, overrides, args.sheet, args.weights)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
