"""How many steps a picture that is drawn alone takes, and how long, looking ahead and not; the codes are the same.

    python benchmarks/looking_ahead.py emoji
    python benchmarks/looking_ahead.py runs/shapes/bundle --pictures 40

The prompts of the recipe in turn, one picture each with seeds 0, 1, …; each is drawn both ways, one after the other. A
step is one pass through the prior: of one code, or of several of which the first is known and the others are guessed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from armchair.prior.sequence import null_text
from armchair.sample.generate import AHEAD, FREE, MicroBatch, candidate_uniforms, draw_micro_batch, read_prompts
from armchair.sample.pipeline import Artist, load_artist


def measure(artist: Artist, prompts: list[str], pictures: int, aheads: list[int]) -> list[dict[str, Any]]:
    """For each of `aheads`: steps and milliseconds a picture, and how many times as fast as one code a step."""
    decoder = artist.decoder()
    if not decoder.independent_rows:
        sys.exit("looking ahead needs rows that are independent, as those of int8 are where its products are exact")
    length, steps, passes = decoder.shape.image_length, decoder.decode_steps, 0
    null = read_prompts(decoder, null_text(1, decoder.shape))

    def counted(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return steps(*args)

    def draw(i: int, ahead: int) -> tuple[torch.Tensor, int, float]:
        nonlocal passes
        uniforms = candidate_uniforms(i, [0], length)
        forced = torch.full(uniforms.shape, FREE)
        prompt = read_prompts(decoder, artist._tokens(prompts[i % len(prompts)]))
        passes, began = 0, time.perf_counter()
        batch = MicroBatch(decoder, prompt, null, uniforms, artist.settings, forced, ahead)
        for _ in draw_micro_batch(decoder, batch):
            pass
        return batch.codes, passes, time.perf_counter() - began

    decoder.decode_steps = counted  # type: ignore[method-assign]
    try:
        draw(0, aheads[-1])
        drawn = [{ahead: draw(i, ahead) for ahead in (1, *aheads)} for i in range(pictures)]
    finally:
        decoder.decode_steps = steps  # type: ignore[method-assign]
    assert all(torch.equal(one[ahead][0], one[1][0]) for one in drawn for ahead in aheads), "other codes came out"
    return [
        {
            "ahead": ahead,
            "codes": length,
            "steps": statistics.mean(one[ahead][1] for one in drawn),
            "milliseconds": 1000 * statistics.median(one[ahead][2] for one in drawn),
            "times as fast": statistics.median(one[1][2] / one[ahead][2] for one in drawn),
        }
        for ahead in (1, *aheads)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--ahead", type=int, nargs="+", default=[2, 4, AHEAD, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artist = load_artist(args.model, "cpu")
    prompts = list(artist.bundle.info["recipe"]["drawing"]["prompts"]) or ["a red apple"]
    rows = measure(artist, prompts, args.pictures, args.ahead)
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
