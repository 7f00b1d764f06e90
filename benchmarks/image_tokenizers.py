"""Image tokenizers side by side: the same networks, code budget and time, and the same prior on top of each.

    python benchmarks/image_tokenizers.py --data 'emoji/train-{0000..0004}.tar' --val emoji/val-0000.tar \\
        --minutes 12 --prior-minutes 12 --out runs/tokenizers

Each variant is trained for `--minutes` of the process's CPU time, its start included, and then a prior on its codes
for `--prior-minutes` (0: none). What else the machine does changes a CPU clock little, and two cores that work for a
minute count as two. A few updates are timed first, so that the step size's schedule ends with the time; the table says
what was spent in the end. Every finished variant is written to OUT/results.json; begun again, the command goes on with
what is missing, and the table is printed from there. It needs the extras `train` and `evaluate`.

Variants (all where none is named):
    dvae            the paper's dVAE from a random start: tau falls from 1 to 1/16 and beta rises to 6.6, over the same
                    shares of the run as the paper's of its step-size schedule
    dvae-beta-B     the same with a constant beta of B
    dvae-start      recipes/emoji-dvae.yaml: five updates of the autoencoder for each of the dVAE that its clusters
                    become
    vq, fsq         recipes/emoji.yaml, recipes/emoji-fsq.yaml
    X+perceptual    X with the distance of features in an ImageNet network in its loss (dvae-start: in its last sixth)
The optimiser and its step sizes are the same for all but dvae-start's last sixth, which has its own.

PSNR is a median over held-out pictures and SSIM a mean, of round trips through the codes. `look` is the mean distance
of the features that +perceptual trains on, so those variants have an eye on it. `bits` are a held-out picture's under
the prior, all of its codes together: read them beside PSNR, as codes that say little are easily foretold. `found` is
the share of drawings, one a held-out caption, whose own caption the ranker of `--ranker` finds best of itself and 100
others.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armchair.bundle import find_bundle
from armchair.clip.contrast import retrieval_ranks, same_captions
from armchair.data.token_cache import TokenCache
from armchair.errors import RequestError, WorkError
from armchair.eval.reconstruction import structural_similarity
from armchair.image.network import ImageTokenizer
from armchair.image.pixels import to_pil
from armchair.sample.pipeline import load_artist
from armchair.sample.ranker import load_ranker
from armchair.train.image_tokenizer import code_figures, fixed_images
from armchair.train.perceptual import Perceptual
from armchair.train.recipe import Recipe, parsed_overrides, read_recipe
from armchair.train.run import VALIDATION_IMAGES, Run, start_run

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = {"vq": "emoji.yaml", "fsq": "emoji-fsq.yaml"}
PLAIN = ("dvae", "dvae-beta-0.3", "dvae-beta-1", "dvae-start", "vq", "fsq")
VARIANTS = (*PLAIN, *(f"{name}+perceptual" for name in PLAIN))
START_STEPS = 5  # updates of the autoencoder for one of the dVAE, as in recipes/emoji-dvae.yaml
PROBE = 12  # updates that are timed
SETTLING = 3  # of those, the first are slow
OPTIMISER = {"lr": 2e-3, "matrix_lr": 0.05, "final_lr": 2e-5, "encoder_scale": 1.0}
PAPER_STEPS = {"all": 1_200_000, "tau": 150_000, "kl": 5_000}
PROMPTS = 200
DISTRACTORS = 100
COLUMNS = {
    "variant": "<", "seed": ">", "minutes": ">.1f", "steps": ">", "images": ">", "psnr": ">.2f", "ssim": ">.3f",
    "look": ">.4f", "usage": ">.3f", "perplexity": ">.0f", "prior_minutes": ">.1f", "bits": ">.1f", "found": ">.3f",
}  # fmt: skip


def recipe_of(variant: str, args: argparse.Namespace, seed: int, steps: int, prior_steps: int) -> Recipe:
    """The recipe of a variant whose training has `steps` updates (of a dVAE with a start: its share of them)."""
    kind, plus, term = variant.partition("+")
    if plus and term != "perceptual":
        raise RequestError(f"unknown variant {variant!r}: {term!r} is not `perceptual`")
    training: dict[str, Any] = {"steps": steps, "warmup": max(1, min(50, steps // 10)), "min_psnr": -99, "min_usage": 0}
    sections: dict[str, Any] = {}
    if kind in FILES:
        file = FILES[kind]
    elif kind == "dvae-start":
        file = "emoji-dvae.yaml"
        start = START_STEPS * steps
        sections["autoencoder_training"] = {"steps": start, "warmup": max(1, min(50, start // 10)), **rarely(start)}
        training["warmup"] = max(1, min(20, steps // 10))
    elif kind == "dvae" or kind.startswith("dvae-beta-"):
        file = "emoji-dvae.yaml"
        shares = {name: max(1, steps * paper // PAPER_STEPS["all"]) for name, paper in PAPER_STEPS.items()}
        training |= {**OPTIMISER, "tau_start": 1.0, "tau_end": 1 / 16, "tau_steps": shares["tau"]}
        if kind == "dvae":
            training |= {"kl_start": 0.0, "kl_weight": 6.6, "kl_steps": shares["kl"]}
        else:
            beta = float(kind.removeprefix("dvae-beta-"))
            training |= {"kl_start": beta, "kl_weight": beta}
    else:
        raise RequestError(f"unknown variant {variant!r}: expected of {', '.join(PLAIN)}, and +perceptual")
    if plus:
        training["perceptual_weight"] = args.perceptual_weight
    sections |= {
        "image_tokenizer_training": training | rarely(steps),
        "prior_training": {"steps": max(1, prior_steps), "warmup": max(1, min(100, prior_steps // 10))}
        | rarely(max(1, prior_steps)),
    }
    overrides: dict[str, Any] = {"name": variant.replace("+", "-"), "seed": seed}
    overrides |= {"data.train": args.data, "data.val": args.val, "ranker": None, "ranker_training": None}
    overrides |= {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    if kind not in ("dvae-start", *FILES):
        overrides["autoencoder_training"] = None
    return read_recipe(RECIPES / file, overrides | args.set)


def rarely(steps: int) -> dict[str, int]:
    """Looking at figures and sheets takes time too: once, at the end."""
    return {"validate_every": steps, "sheet_every": steps, "save_every": max(100, steps // 4), "log_every": 50}


class Clock:
    """CPU seconds of the process, told of every update."""

    def __init__(self) -> None:
        self.began = time.process_time()
        self.ticks: list[float] = []

    def tick(self) -> bool:
        self.ticks.append(time.process_time())
        return False  # go on

    def seconds(self) -> float:
        return time.process_time() - self.began


def timed(recipe: Recipe, folder: Path, work: Callable[[Run], Any]) -> tuple[Any, Clock]:
    """What `work` makes of a new run, and how long it took."""
    shutil.rmtree(folder, ignore_errors=True)
    clock = Clock()
    run = start_run(
        recipe, folder, resume=False, report_stream=sys.stderr, device=torch.device("cpu"), should_stop=clock.tick
    )
    try:
        return work(run), clock
    finally:
        run.report.close()


def steps_for(minutes: float, ticks: list[float], spent: float, counts: list[int], shares: list[int]) -> int:
    """How many updates fit into the minutes.

    ticks: CPU time at the end of each update of stages one after the other, `counts` of each; spent: what the whole
    took; shares: how many updates of each stage go into one of the whole. The last update of a stage is looked at too.
    """
    a_step, stepping, first = 0.0, 0.0, 0
    for count, share in zip(counts, shares, strict=True):
        of_stage = ticks[first : first + count]
        mean = (of_stage[-2] - of_stage[SETTLING - 1]) / (count - 1 - SETTLING)
        a_step, stepping, first = a_step + share * mean, stepping + count * mean, first + count
    fixed = max(0.0, spent - stepping)
    return max(1, round((60 * minutes - fixed) / a_step))


def tokenizer_steps(variant: str, args: argparse.Namespace) -> int:
    """Updates of a variant that take the time, its start and last validation among them."""
    recipe = recipe_of(variant, args, 0, PROBE, 0)
    _, clock = timed(recipe, args.out / "probe", lambda run: run.image_tokenizer())
    has_start = recipe.autoencoder_training is not None
    counts, shares = ([START_STEPS * PROBE, PROBE], [START_STEPS, 1]) if has_start else ([PROBE], [1])
    return steps_for(args.minutes, clock.ticks, clock.seconds(), counts, shares)


def prior_steps(args: argparse.Namespace) -> int:
    """Updates of the prior that take `--prior-minutes`: the same for every variant, as codes are as many in each."""
    recipe = recipe_of("fsq", args, 0, 1, PROBE)
    _, clock = timed(recipe, args.out / "probe", lambda run: run.prior())
    return steps_for(args.prior_minutes, clock.ticks[-PROBE:], 0.0, [PROBE], [1])


def measured(variant: str, seed: int, args: argparse.Namespace, of_prior: int) -> dict[str, Any]:
    """A line of the table."""
    steps = tokenizer_steps(variant, args)
    recipe = recipe_of(variant, args, seed, steps, of_prior)
    folder = args.out / f"{recipe.name}-{seed}"
    tokenizer, clock = timed(recipe, folder, lambda run: run.image_tokenizer())
    start = recipe.autoencoder_training
    images = steps * recipe.image_tokenizer_training.batch_size + (start.steps * start.batch_size if start else 0)
    line: dict[str, Any] = {"variant": variant, "seed": seed, "minutes": clock.seconds() / 60}
    line |= {"steps": steps + (start.steps if start else 0), "images": images}
    clock = Clock()
    run = start_run(
        recipe, folder, resume=True, report_stream=sys.stderr, device=torch.device("cpu"), should_stop=clock.tick
    )
    try:
        held_out = fixed_images(run.val_source, VALIDATION_IMAGES, recipe.data.resolution)
        line |= round_trips(tokenizer, held_out)
        if of_prior:
            try:
                run.prior()
                bundle = run.bundle()
            except WorkError as error:
                line["failed"] = str(error)
            else:
                line["prior_minutes"] = (clock.ticks[-1] - clock.ticks[0]) / 60
                line |= under_prior(folder, tokenizer.grid**2) | drawings(bundle, folder, args)
    finally:
        run.report.close()
    return line


@torch.inference_mode()
def round_trips(tokenizer: ImageTokenizer, images: torch.Tensor) -> dict[str, float]:
    figures = code_figures(tokenizer, images)
    again = torch.cat([tokenizer.decode(tokenizer.encode(chunk)) for chunk in images.split(64)])
    real, back = ([np.asarray(im) for im in to_pil(x)] for x in (images, again))
    look = Perceptual()
    distances = [float(look(a, b)) * len(a) for a, b in zip(images.split(64), again.split(64), strict=True)]
    similar = float(structural_similarity(real, back).mean())
    return {**figures._asdict(), "ssim": similar, "look": sum(distances) / len(images)}


def under_prior(folder: Path, codes: int) -> dict[str, float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = [e for e in map(json.loads, lines) if e["event"] == "validation" and e["stage"] == "prior"][-1]
    return {"bits": last["bits_image"] * codes}


def drawings(bundle: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Drawings of held-out captions, as the ranker finds them."""
    if args.ranker is None:
        return {}
    captions = [texts[0][0] for texts in TokenCache(folder / "codes" / "val").captions[:PROMPTS]]
    ranker = load_ranker(args.ranker, "cpu")
    artist = load_artist(str(bundle), device="cpu")
    shown = ranker.embed_images(artist.draw_each(captions))
    texts, same = ranker.embed_texts(captions), same_captions(captions)
    ranks = retrieval_ranks(shown, texts, same, DISTRACTORS)
    return {"found": float((ranks < 1).double().mean()), "cosine": float((shown * texts).sum(1).mean())}


def table(results: list[dict[str, Any]]) -> str:
    rows = [list(COLUMNS)]
    for line in results:
        cells = [(line.get(name), spec) for name, spec in COLUMNS.items()]
        rows.append(["-" if value is None else format(value, spec[1:]) for value, spec in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = [spec[0] for spec in COLUMNS.values()]
    lines = [
        "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="as above; all where none is named")
    parser.add_argument("--data", nargs="+", required=True, help="training pictures, as `armchair train` takes them")
    parser.add_argument("--val", nargs="+", required=True, help="held-out pictures")
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU minutes of a tokenizer's training")
    parser.add_argument("--prior-minutes", type=float, default=0.0, help="CPU minutes of a prior's; 0: none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--perceptual-weight", type=float, default=1.0)
    parser.add_argument("--ranker", default="emoji", help="a bundle whose ranker judges drawings; `none`: nobody does")
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=C", help="fields of all recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    args = parser.parse_args()
    args.ranker = None if args.ranker == "none" else args.ranker
    variants = args.variants or list(VARIANTS)
    try:
        args.set = parsed_overrides(args.set)
        for variant in variants:  # a wrong name or field shows before hours have gone by
            recipe_of(variant, args, 0, 1, 1)
        if args.ranker is not None and args.prior_minutes:
            find_bundle(args.ranker)
        compare(variants, args)
    except RequestError as error:
        sys.exit(str(error))


def compare(variants: list[str], args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / "results.json"
    settings = {
        name: getattr(args, name) for name in ("data", "val", "minutes", "prior_minutes", "perceptual_weight", "set")
    }
    found = json.loads(place.read_text()) if place.exists() else {"settings": settings, "results": []}
    if found["settings"] != settings:
        raise RequestError(f"{place} was made with other settings, {found['settings']}; choose another --out")

    def save() -> None:
        partial = place.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(place)

    if args.prior_minutes and "prior_steps" not in found:
        found["prior_steps"] = prior_steps(args)
        save()
    for seed in args.seeds:
        for variant in variants:
            if any((line["variant"], line["seed"]) == (variant, seed) for line in found["results"]):
                continue
            found["results"].append(measured(variant, seed, args, found.get("prior_steps", 0)))
            save()
            print(f"{variant}, seed {seed}: done", file=sys.stderr)
    shutil.rmtree(args.out / "probe", ignore_errors=True)
    print(table([r for r in found["results"] if r["variant"] in variants and r["seed"] in args.seeds]))


if __name__ == "__main__":
    main()
