"""What each option of the prior is worth in the same time: the paper's block, and every option alone on top of it.

    armchair train recipes/emoji.yaml --data … --out runs/emoji --stage prior
    python benchmarks/prior_ablation.py runs/emoji --minutes 60 --seeds 0 1 2 --out ablation

RUN is the folder of a run whose prior was begun: its codes, its tokenizers and its recipe are used, and left alone. The
variants are `faithful` (the paper's block, learned positions, AdamW, nothing left out or blurred), each option alone on
top of that, `all` of them (but `tied`, which does not go with `code_features`), and the `recipe` as it is. Sizes,
attention patterns, step size and batches are the recipe's in all of them; an option's value too, where the recipe has
it.

Each has as many updates as --minutes of CPU time hold, all cores counted together, by the median of a few that are
timed first: CPU time, as clocks on the wall run on while others work. So the step size of each has its whole schedule.
A seed sets weights and order: variants of one seed see the same pictures, as far as they come. Held-out and training
bits are of the averaged weights, over 512 pictures each, with whole captions and nothing left out, blurred or smoothed;
`best` is the lowest of the eight validations on the way. Bits do not say what guidance is for: of `guidance` they say
what it costs.

OUT/ablation.json is written after each; what is in it is not trained again, and what was interrupted goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from armchair.config import from_dict, to_dict, with_overrides
from armchair.data.token_cache import TokenCache
from armchair.errors import ArmchairError, RequestError
from armchair.image.network import ImageTokenizer
from armchair.image.tokenizer import make_image_tokenizer
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior
from armchair.runtime import autocast, stream_seed
from armchair.text.bpe import TextTokenizer
from armchair.train.checkpoint import checkpoints
from armchair.train.loop import fit
from armchair.train.prior import PriorStage
from armchair.train.recipe import Recipe, parsed_overrides
from armchair.train.report import Report

CPU = torch.device("cpu")
TIMED = 9  # updates
VALIDATIONS = 8

# Option -> its field, what the paper has there, and what is tried where the recipe has the paper's.
OPTIONS: dict[str, tuple[str, Any, Any]] = {
    "rms": ("prior.norm", "layer", "rms"),
    "swiglu": ("prior.mlp", "gelu", "swiglu"),
    "qk-norm": ("prior.qk_norm", False, True),
    "text-conv": ("prior.text_conv", 0, 4),
    "rotary": ("prior.rotary", False, True),
    "tied": ("prior.tied", False, True),
    "code-features": ("prior.code_features", 0, 512),
    "muon": ("prior_training.matrix_lr", None, 0.02),
    "guidance": ("prior_training.caption_dropout", 0.0, 0.1),
    "dropout": ("prior_training.dropout", 0.0, 0.1),
    "code-dropout": ("prior_training.code_dropout", 0.0, 0.15),
    "code-noise": ("prior_training.code_noise", 0.0, 0.1),
    "label-smoothing": ("prior_training.label_smoothing", 0.0, 0.1),
}
# Column -> its width, and how its numbers are written.
COLUMNS = {
    "variant": (15, ""), "seed": (4, ""), "steps": (6, ""), "pictures": (9, ""), "parameters": (10, ""),
    "cpu_minutes": (11, ".1f"), "bits_image": (10, ".4f"), "bits_text": (9, ".4f"), "best": (7, ".4f"),
    "best_step": (9, ""), "train_bits_image": (16, ".4f"), "gap": (7, ".4f"),
}  # fmt: skip


class Material(NamedTuple):
    """What a run has left for its prior to learn from."""

    recipe: Recipe
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    train: TokenCache
    val: TokenCache


def read_run(folder: Path) -> Material:
    """Raises RequestError for a folder that lacks something."""

    def found(path: Path) -> Path:
        if not path.exists():
            name = path.relative_to(folder)
            raise RequestError(f"{folder} has no {name}: begin its prior first, with `armchair train … --stage prior`")
        return path

    recipe = from_dict(Recipe, json.loads(found(folder / "recipe.json").read_text(encoding="utf-8")))
    text_tokenizer = TextTokenizer.from_json(found(folder / "text_tokenizer.json").read_text(encoding="utf-8"))
    image_tokenizer = make_image_tokenizer(recipe.image_tokenizer).eval().requires_grad_(False)
    newest = (checkpoints(folder / "image_tokenizer") or [folder / "image_tokenizer/step_N"])[-1]
    image_tokenizer.load_state_dict(load_file(found(newest / "average.safetensors")))
    train, val = (TokenCache(found(folder / f"codes/{name}/cache.json").parent) for name in ("train", "val"))
    return Material(recipe, text_tokenizer, image_tokenizer, train, val)


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """By name, what is compared."""
    own = to_dict(recipe)
    paper = {field: value for field, value, _ in OPTIONS.values()}
    tried = {}
    for name, (field, papers, usual) in OPTIONS.items():
        section, key = field.split(".")
        tried[name] = {field: usual if own[section][key] == papers else own[section][key]}
    together = {field: value for name, option in tried.items() if name != "tied" for field, value in option.items()}
    alone = {name: {**paper, **option} for name, option in tried.items()}
    overrides = {"faithful": paper, **alone, "all": {**paper, **together}, "recipe": {}}
    return {name: from_dict(Recipe, with_overrides(own, fields)) for name, fields in overrides.items()}


def quiet(recipe: Recipe, seed: int, steps: int) -> Recipe:
    """The recipe with that seed and so many updates, which draws nothing on the way."""
    every = max(1, -(-steps // VALIDATIONS))
    training = replace(
        recipe.prior_training, steps=steps, warmup=min(recipe.prior_training.warmup, max(1, steps // 10)),
        validate_every=every, sheet_every=steps, save_every=every, accuracy_prompts=0,
    )  # fmt: skip
    return replace(recipe, seed=seed, prior_training=training, drawing=replace(recipe.drawing, prompts=()))


def stage_of(material: Material, recipe: Recipe, validation: TokenCache) -> PriorStage:
    """The prior's stage, as `armchair.train.run.Run` would begin it."""
    text, image = material.text_tokenizer, material.image_tokenizer
    length, size = recipe.text_tokenizer.length, image.codebook_size
    shape = StreamShape(text_vocab_size=text.vocab_size, text_length=length, codebook_size=size, grid=image.grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(recipe.seed, "initialise", "prior"))
        model = Prior(recipe.prior, shape, image.code_vectors)
    return PriorStage(recipe, model, text, image, material.train, validation)


class Enough(Exception):
    """As many updates as are timed."""


def seconds_an_update(material: Material, recipe: Recipe) -> float:
    """CPU seconds, all cores together: the median of TIMED updates of the real loop."""
    recipe = quiet(recipe, 0, 10**6)
    times: list[float] = []

    def tick() -> bool:
        times.append(time.process_time())
        if len(times) == TIMED + 3:  # the first two are spent on warming up
            raise Enough
        return False

    with tempfile.TemporaryDirectory() as folder:
        report = Report(Path(folder), None)
        stage = stage_of(material, recipe, material.val)
        try:
            fit(stage, recipe.prior_training, Path(folder) / "prior", report, device=CPU, should_stop=tick)
        except Enough:
            pass
        finally:
            report.close()
    return statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))


def measure(material: Material, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train one variant in a folder of its own, of which the log stays."""
    stage = stage_of(material, recipe, material.val)
    training = recipe.prior_training
    report = Report(folder, None)
    began, resumed = time.process_time(), bool(checkpoints(folder / "prior"))
    try:
        average = fit(stage, training, folder / "prior", report, device=CPU)
    finally:
        report.close()
    spent = time.process_time() - began
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = {event["step"]: event for event in events if event["event"] == "validation"}
    last, best = held_out[training.steps], min(held_out.values(), key=lambda event: event["bits_image"])
    with autocast(CPU, training.precision):
        seen = stage_of(material, recipe, material.train).validate(average)
    shutil.rmtree(folder / "prior")
    return {
        "steps": training.steps,
        "pictures": training.steps * training.batch_size,
        "parameters": sum(p.numel() for p in average.parameters()),
        "cpu_minutes": None if resumed else spent / 60,  # validations included
        **{name: last[name] for name in ("bits_image", "bits_text")},
        "best": best["bits_image"],
        "best_step": best["step"],
        **{f"train_{name}": seen[name] for name in ("bits_image", "bits_text")},
        "gap": last["bits_image"] - seen["bits_image"],
    }


def line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{'-' if row[name] is None else format(row[name], form):>{width}}" for name, (width, form) in COLUMNS.items()
    )


def header() -> str:
    return "  ".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A variant a row: means over seeds, and how many bits more than `faithful` of the same seed, with their spread."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["seed"]] = row
    paper = by_name.get("faithful", {})
    found = []
    for name, seeds in by_name.items():
        means: dict[str, Any] = {"variant": name, "seeds": len(seeds), "steps": next(iter(seeds.values()))["steps"]}
        for figure in ("bits_image", "bits_text", "best", "gap"):
            means[figure] = statistics.mean(row[figure] for row in seeds.values())
        more = [row["bits_image"] - paper[seed]["bits_image"] for seed, row in seeds.items() if seed in paper]
        means["more"] = statistics.mean(more) if more else None
        means["spread"] = statistics.stdev(more) if len(more) > 1 else None
        found.append(means)
    return found


def in_words(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in ("bits_image", "bits_text", "best", "gap"))
    more = "" if row["more"] is None else f"  more than faithful {row['more']:+.4f}"
    spread = "" if row["spread"] is None else f" (standard deviation over seeds {row['spread']:.4f})"
    return f"{row['variant']:<16}  seeds {row['seeds']}  steps {row['steps']:>6}  {figures}{more}{spread}"


def save(path: Path, results: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({**results, "summary": summary(results["rows"])}, indent=1) + "\n")
    os.replace(partial, path)


def open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are there already. Raises RequestError where they were made otherwise."""
    if not path.exists():
        return {"settings": settings, "seconds_an_update": {}, "rows": []}
    results = json.loads(path.read_text())
    if differ := [name for name, value in settings.items() if results["settings"].get(name) != value]:
        raise RequestError(f"{path} was made with other settings ({', '.join(differ)}); choose another --out")
    return results


def ablate(args: argparse.Namespace) -> None:
    material = read_run(args.run)
    recipe = from_dict(Recipe, with_overrides(to_dict(material.recipe), parsed_overrides(args.set)))
    compared = variants(recipe)
    if unknown := [name for name in args.variants if name not in compared]:
        raise RequestError(f"no variant {unknown[0]!r}: take of {', '.join(compared)}")
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / "ablation.json"
    settings = {"codes": material.train.info["fingerprint"], "minutes": args.minutes, "threads": args.threads}
    settings |= {"prior": to_dict(recipe.prior), "prior_training": to_dict(recipe.prior_training)}
    results = open_results(place, settings)
    print(header(), flush=True)
    for seed in args.seeds:
        for name in args.variants or compared:
            row = next((r for r in results["rows"] if (r["variant"], r["seed"]) == (name, seed)), None)
            if row is None:
                costs = results["seconds_an_update"]
                if name not in costs:
                    costs[name] = seconds_an_update(material, compared[name])
                    save(place, results)
                steps = max(1, int(60 * args.minutes / costs[name]))
                trained = measure(material, quiet(compared[name], seed, steps), args.out / f"{name}-{seed}")
                row = {"variant": name, "seed": seed, **trained}
                results["rows"].append(row)
                save(place, results)
            print(line(row), flush=True)
    print()
    for row in summary(results["rows"]):
        print(in_words(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, required=True, help="CPU time of each training, all cores together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="these only, of the names above")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a field of the recipe, for all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        ablate(args)
    except ArmchairError as error:
        sys.exit(f"prior_ablation: {error}")
    except KeyboardInterrupt:
        sys.exit("prior_ablation: interrupted; the same command goes on")


if __name__ == "__main__":
    main()
