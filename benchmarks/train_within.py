"""Train a recipe as far as so many minutes allow, on a machine that is lent or rented by the minute.

    armchair data build emoji --size 72
    python benchmarks/train_within.py recipes/emoji.yaml 20 --out runs/emoji-20
    python benchmarks/train_within.py recipes/shapes.yaml 20 --out runs/shapes-20 --plan

A trial comes first, in OUT.trial, which is removed afterwards: all stages, with so few updates that the log says how
long one takes here, and how long everything between them. Each stage's updates are then the recipe's own times one
factor, so that all of them fit into what is left of the minutes; the lengths of a discrete VAE's schedules go with
them. --plan ends there, and prints the command of such a run. Without it the run is trained up to its bundle, which
names that command. Where time is up before, the state is saved, and the command that is printed goes on.

A ninth of the time is left for what no trial sees, such as validations.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from armchair import environment
from armchair.cli import train_command
from armchair.errors import ArmchairError, RequestError
from armchair.runtime import pick_device
from armchair.train.loop import Interrupted
from armchair.train.recipe import FitConfig, Recipe, parsed_overrides, read_recipe
from armchair.train.run import start_run

TRIAL = 24  # updates a stage
SPARE = 0.9  # of what is left is planned for
ENDLESS = 10**9
UNCHECKED = {"image_tokenizer_training.min_psnr": -999.0, "image_tokenizer_training.min_usage": 0.0}
SCHEDULES = ("tau_steps", "kl_steps")  # in updates of the image tokenizer's training


@dataclass(frozen=True)
class Plan:
    """How many updates each stage gets, and what that was reckoned from."""

    factor: float  # of the recipe's own updates
    updates: dict[str, float]  # seconds of one, by section of the recipe
    between: float  # seconds of everything else
    overrides: dict[str, int]


def trainings(recipe: Recipe) -> dict[str, FitConfig]:
    """The sections that train something."""
    found = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return {name: section for name, section in found.items() if isinstance(section, FitConfig)}


def trial_overrides(recipe: Recipe) -> dict[str, Any]:
    """A few updates a stage, each in the log, and nobody minds what comes of them."""
    found: dict[str, Any] = dict(UNCHECKED)
    for name in trainings(recipe):
        found |= {f"{name}.steps": TRIAL, f"{name}.log_every": 1}
        found |= {f"{name}.{every}": ENDLESS for every in ("validate_every", "sheet_every", "save_every")}
    return found


def seconds_an_update(log: Path) -> dict[str, float]:
    """By section: the median of the second half, as a GPU's first updates take longer."""
    times: dict[str, list[float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            times.setdefault(f"{event['stage']}_training", []).append(event["time"])
    return {
        name: statistics.median(b - a for a, b in zip(at[len(at) // 2 - 1 :], at[len(at) // 2 :], strict=False))
        for name, at in times.items()
    }


def plan(recipe: Recipe, updates: dict[str, float], between: float, left: float, most: float) -> Plan:
    """Steps for `left` seconds. Raises RequestError where what comes between the updates takes longer than that."""
    sections = trainings(recipe)
    factor = min(most, SPARE * (left - between) / sum(sections[name].steps * took for name, took in updates.items()))
    if factor <= 0:
        raise RequestError(f"{left:.0f} s are left, and all but updates takes {between:.0f} s: give it more minutes")
    overrides = {f"{name}.steps": max(1, int(factor * section.steps)) for name, section in sections.items()}
    for name in SCHEDULES:
        if (own := getattr(recipe.image_tokenizer_training, name, None)) is not None:
            overrides[f"image_tokenizer_training.{name}"] = max(1, int(factor * own))
    return Plan(factor, updates, between, overrides)


def trained(recipe: Recipe, folder: Path, device: torch.device, command: str, deadline: float) -> None:
    """A whole run. Raises Interrupted where time is up before it ends."""
    run = start_run(
        recipe,
        folder,
        resume=False,
        report_stream=sys.stderr,
        command=command,
        device=device,
        should_stop=lambda: time.monotonic() > deadline,
    )
    try:
        run.bundle()
    finally:
        run.report.close()


def main() -> int | str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("minutes", type=float, help="in all, the trial included")
    parser.add_argument("--out", type=Path, metavar="RUN", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="fields of the recipe")
    parser.add_argument("--most", type=float, default=4.0, metavar="N", help="times the recipe's updates (default: 4)")
    parser.add_argument("--plan", action="store_true", help="only say what there is time for")
    args = parser.parse_args()
    began = time.monotonic()
    deadline = began + 60 * args.minutes
    environment.for_training()  # as `armchair train` does
    try:
        own = parsed_overrides(args.set)
        recipe, device = read_recipe(args.recipe, own), pick_device(args.device)
        out = args.out or Path(f"runs/{recipe.name}")
        if out.exists():
            raise RequestError(f"{out} is there already: choose another --out")
        trial = out.with_name(f"{out.name}.trial")
        shutil.rmtree(trial, ignore_errors=True)
        try:
            trained(read_recipe(args.recipe, own | trial_overrides(recipe)), trial, device, "a trial", deadline)
            updates = seconds_an_update(trial / "log.jsonl")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        took = time.monotonic() - began
        between = took - TRIAL * sum(updates.values())
        made = plan(recipe, updates, between, deadline - time.monotonic(), args.most)
        sets = [*args.set, *(f"{name}={value}" for name, value in made.overrides.items())]
        command = shlex.join(["armchair", "train", str(args.recipe), *(w for item in sets for w in ("--set", item))])
        print(f"a trial of {took:.0f} s: {between:.0f} s between updates; {made.factor:.3g} times the recipe's updates")
        for name, seconds in updates.items():
            print(f"  {name}: {made.overrides[f'{name}.steps']} updates of {seconds:.3g} s")
        print(command, flush=True)
        if args.plan:
            return None
        told = train_command(str(args.recipe), sets)
        trained(read_recipe(args.recipe, own | made.overrides), out, device, told, deadline)
    except Interrupted as stopped:
        if not out.exists():
            return f"{args.minutes:g} minutes are too few for a trial"
        print(f"time is up; {stopped}; {command} --out {out} --resume goes on")
        return 3
    except ArmchairError as error:
        return str(error)
    print(f"{(time.monotonic() - began) / 60:.1f} of {args.minutes:g} minutes")
    return None


if __name__ == "__main__":
    sys.exit(main())
