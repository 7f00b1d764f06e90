"""`benchmarks/train_within.py`: a recipe within so many minutes."""

import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from armchair.bundle import read_bundle
from armchair.cli import main as armchair
from armchair.config import from_dict
from armchair.errors import RequestError
from armchair.train.recipe import Recipe
from train import train_tiny

RECIPE = {**train_tiny.RECIPE, "prior_training": {**train_tiny.RECIPE["prior_training"], "views": 1}}
STAGES = ("autoencoder", "image_tokenizer", "prior", "ranker")


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("train_within")


@pytest.fixture
def run(within, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")

    def run(*words: object):
        monkeypatch.setattr(sys, "argv", ["train_within.py", *map(str, words)])
        return within.main()

    return run


def test_updates_are_those_of_the_recipe_times_what_there_is_time_for(within):
    recipe = from_dict(Recipe, RECIPE)
    updates = {f"{stage}_training": seconds for stage, seconds in zip(STAGES, (0.1, 0.2, 0.4, 0.3), strict=True)}
    made = within.plan(recipe, updates, between=10.0, left=10 + 50 / 0.9, most=4)
    assert made.factor == pytest.approx(50 / 150)  # the recipe's 150 updates of each would take 150 s
    assert {made.overrides[f"{name}.steps"] for name in updates} == {50}
    assert made.overrides["image_tokenizer_training.tau_steps"] == 33
    assert made.overrides["image_tokenizer_training.kl_steps"] == 16
    assert within.plan(recipe, updates, between=10.0, left=1e6, most=4).overrides["prior_training.steps"] == 600
    with pytest.raises(RequestError, match="give it more minutes"):
        within.plan(recipe, updates, between=10.0, left=9.0, most=4)


def test_the_first_updates_do_not_count(within, tmp_path):
    times = [0, 50, 60, 70, *(70 + 0.5 * i for i in range(1, 5))]
    log = [{"event": "step", "stage": "prior", "step": i, "time": at} for i, at in enumerate(times)]
    lines = [*log[:3], {"event": "validation", "stage": "prior", "time": 61}, *log[3:]]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert within.seconds_an_update(tmp_path / "log.jsonl") == {"prior_training": 0.5}


def test_a_run_ends_in_a_bundle_that_names_its_command(run, capsys):
    assert run("tiny.yaml", 5, "--out", "r", "--most", 0.1, "--device", "cpu") is None
    out = capsys.readouterr().out
    bundle = read_bundle(Path("r/bundle"))
    assert [bundle.info["recipe"][f"{stage}_training"]["steps"] for stage in STAGES] == [15] * 4
    command = bundle.info["metrics"]["prior"]["command"]
    assert command in out and "prior_training.steps=15" in command and "0.1 times the recipe's updates" in out
    assert not Path("r.trial").exists()
    assert run("tiny.yaml", 5, "--out", "r") == "r is there already: choose another --out"


def test_a_plan_only_trains_nothing_and_its_command_is_one(run, capsys, monkeypatch):
    assert run("tiny.yaml", 5, "--out", "r", "--most", 0.02, "--plan", "--set", "prior.n_layer=1") is None
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("armchair train")]
    assert armchair([*shlex.split(command)[1:], "--out", "r"]) == 0
    recipe = read_bundle(Path("r/bundle")).info["recipe"]
    assert recipe["prior"]["n_layer"] == 1 and recipe["prior_training"]["steps"] == 3


def test_what_is_not_done_in_time_goes_on_later(run, within, capsys, monkeypatch):
    trained = within.trained

    def late(recipe, folder, device, command, deadline):
        trained(recipe, folder, device, command, deadline if folder.name == "r.trial" else 0.0)

    monkeypatch.setattr(within, "trained", late)
    assert run("tiny.yaml", 5, "--out", "r", "--most", 0.02) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time is up")]
    assert armchair(shlex.split(line[line.index("armchair train") :].removesuffix(" goes on"))[1:]) == 0
    assert Path("r/bundle").is_dir()


def test_a_bundle_names_no_folder_of_its_maker(run, within, tmp_path, monkeypatch):
    trained, told = within.trained, []

    def noted(recipe, folder, device, command, deadline):
        told.append(command)
        if folder.name == "r.trial":
            trained(recipe, folder, device, command, deadline)

    monkeypatch.setattr(within, "trained", noted)
    assert run(tmp_path / "tiny.yaml", 5, "--out", "r", "--most", 0.02) is None
    assert told[-1].startswith("armchair train tiny.yaml --set ")


def test_too_few_minutes_and_wrong_recipes_are_told(run):
    assert run("tiny.yaml", 1e-9, "--out", "r") == "1e-09 minutes are too few for a trial"
    assert "no_such_field" in run("tiny.yaml", 5, "--out", "r", "--set", "prior.no_such_field=1")
    assert not Path("r").exists() and not Path("r.trial").exists()
