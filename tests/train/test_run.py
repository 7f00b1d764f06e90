"""Runs as wholes: what may change on the way, and what they start from."""

import contextlib
import copy
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from armchair.bundle import Bundle, read_bundle
from armchair.config import from_dict, with_overrides
from armchair.errors import RequestError
from armchair.train.checkpoint import newest_step
from armchair.train.loop import Interrupted
from armchair.train.recipe import Recipe
from armchair.train.run import Run, recipe_for_init, start_run

FIT = {"steps": 2, "batch_size": 4, "lr": 2e-3, "warmup": 0, "log_every": 1, "save_every": 1}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": ["shapes:train,length=24"], "val": ["shapes:val,length=6"]},
    "text_tokenizer": {"vocab_size": 300, "length": 12},
    "image_tokenizer": {
        "kind": "vq", "resolution": 64, "patch": 8, "n_groups": 2, "n_blocks": 1, "n_hid": 8, "n_init": 8,
        "codebook_size": 16, "code_channels": 4,
    },
    "prior": {"d_model": 16, "n_layer": 1, "n_head": 2, "attention": ["full"], "last_attention": None},
    "image_tokenizer_training": {**FIT, "min_psnr": -99.0, "min_usage": 0.0},
    "prior_training": {**FIT, "steps": 10, "schedule": "trapezoid", "cooldown": 0.5},
}  # fmt: skip


@contextlib.contextmanager
def opened(
    folder: Path, changes: dict[str, Any] | None = None, stop: int | None = None, **options: Any
) -> Iterator[Run]:
    """A run, begun or gone on with; with `stop` as if Ctrl-C came after so many updates."""
    recipe = options.pop("recipe", None) or from_dict(Recipe, with_overrides(copy.deepcopy(RECIPE), changes or {}))
    asked = iter(range(1, 10**6))
    options.setdefault("should_stop", lambda: next(asked) == stop)
    options |= {"resume": folder.exists(), "report_stream": io.StringIO(), "device": torch.device("cpu")}
    run = start_run(recipe, folder, **options)
    with contextlib.closing(run.report):
        yield run


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


# What may change.


def test_a_prior_may_be_another_until_it_is_begun(tmp_path):
    with opened(tmp_path / "run") as run:
        run.image_tokenizer()
    with opened(tmp_path / "run", {"prior.d_model": 8, "prior_training.steps": 1}) as run:
        assert run.prior().config.d_model == 8
    with pytest.raises(RequestError, match="another recipe: prior differ"), opened(
        tmp_path / "run", {"prior.d_model": 16, "prior_training.steps": 1}
    ):
        pass


def test_a_trapezoid_takes_another_length_while_it_is_flat(tmp_path):
    """And ends with the bits of one that had that length from the start."""
    longer = {"prior_training.steps": 12}
    with opened(tmp_path / "straight", longer) as run:
        straight = weights(run.prior())
    with opened(tmp_path / "run", stop=2 + 4) as run, pytest.raises(Interrupted):  # after step 4 of the prior
        run.prior()
    assert newest_step(tmp_path / "run/prior") == 4
    with opened(tmp_path / "run", longer) as run:
        assert same(weights(run.prior()), straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"prior_training.steps": 6},  # would have cooled down since step 3
        {"prior_training.steps": 12, "prior_training.lr": 1e-3},
        {"prior_training.steps": 12, "prior_training.schedule": "constant"},
    ],
)
def test_another_length_that_steps_so_far_depend_on_is_refused(tmp_path, changes):
    with opened(tmp_path / "run", stop=2 + 4) as run, pytest.raises(Interrupted):
        run.prior()
    with pytest.raises(RequestError, match="another recipe: prior_training differ"), opened(tmp_path / "run", changes):
        pass


def test_a_length_is_not_changed_once_the_cooldown_is_on(tmp_path):
    with opened(tmp_path / "run", stop=2 + 6) as run, pytest.raises(Interrupted):
        run.prior()
    with pytest.raises(RequestError, match="prior_training differ"), opened(
        tmp_path / "run", {"prior_training.steps": 20}
    ):
        pass


# What runs start from.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    with opened(tmp_path_factory.mktemp("base") / "run") as run:
        return read_bundle(run.bundle())


def begun_from(bundle: Bundle, folder: Path, changes: dict[str, Any]) -> contextlib.AbstractContextManager[Run]:
    recipe = recipe_for_init(from_dict(Recipe, with_overrides(copy.deepcopy(RECIPE), changes)), bundle)
    return opened(folder, recipe=recipe, init=bundle)


WORDS = {"data.captions": ["kumquat {caption}"]}  # which the bundle's tokenizer has never seen


def test_tuning_keeps_the_tokenizers_and_trains_the_prior(tmp_path, bundle):
    dvae = {"image_tokenizer.kind": "dvae", "image_tokenizer.code_channels": None, "image_tokenizer.resolution": 128}
    sections = {name: dict(RECIPE[name]) for name in ("image_tokenizer", "data")}
    del sections["image_tokenizer"]["code_channels"], dvae["image_tokenizer.code_channels"]
    changes = {**sections, **dvae, "data.resolution": 128, "prior.d_model": 8, "prior_training.steps": 3, **WORDS}
    with begun_from(bundle, tmp_path / "run", changes) as run:
        tuned = read_bundle(run.bundle())
    for part in ("text_tokenizer.json", "image_tokenizer.safetensors"):
        assert (tuned.path / part).read_bytes() == (bundle.path / part).read_bytes()
    assert not same(tuned.weights("prior"), bundle.weights("prior"))
    assert tuned.info["recipe"]["image_tokenizer_training"] == bundle.info["recipe"]["image_tokenizer_training"]
    assert tuned.info["metrics"]["image_tokenizer"] == bundle.info["metrics"]["image_tokenizer"]
    assert {e["stage"] for e in events(tmp_path / "run", "begin")} == {"prior"}


def test_tuning_keeps_a_decoder_that_was_trained_on(tmp_path):
    decoder = {"steps": 2, "batch_size": 4, "lr": 1e-3, "warmup": 0}
    with opened(tmp_path / "first", {"decoder_training": decoder, "prior_training.steps": 1}) as run:
        first = read_bundle(run.bundle())
    with begun_from(first, tmp_path / "second", {"prior_training.steps": 1}) as run:
        tuned = read_bundle(run.bundle())
    assert (tuned.path / "image_tokenizer.safetensors").read_bytes() == (
        first.path / "image_tokenizer.safetensors"
    ).read_bytes()
    assert {e["stage"] for e in events(tmp_path / "second", "begin")} == {"prior"}
    for place in ("recipe", "metrics"):
        name = {"recipe": "decoder_training", "metrics": "decoder"}[place]
        assert tuned.info[place][name] == first.info[place][name] and first.info[place][name]


def test_tuning_trains_the_image_tokenizer_on_where_the_recipe_says_so(tmp_path, bundle):
    little = {"image_tokenizer_training.lr": 1e-9, "image_tokenizer_training.steps": 1}
    with begun_from(bundle, tmp_path / "run", {"init.image_tokenizer": "train", **little}) as run:
        more = run.image_tokenizer()
    torch.testing.assert_close(more.up.weight, bundle.weights("image_tokenizer")["up.weight"].float())
    assert {e["stage"] for e in events(tmp_path / "run", "begin")} == {"image_tokenizer"}


def test_tuning_takes_the_recipes_own_tokenizers_where_it_says_so(tmp_path, bundle):
    """The prior's blocks are the bundle's, its tables of codes and words are new."""
    own = {"init.image_tokenizer": "own", "init.text_tokenizer": "own", "prior_training.lr": 1e-5}
    sizes = {"text_tokenizer.length": 14, "text_tokenizer.vocab_size": 320, "image_tokenizer.codebook_size": 24}
    with begun_from(bundle, tmp_path / "run", own | sizes) as run:
        assert run.image_tokenizer().codebook_size == 24
        assert run.text_tokenizer().vocab_size == 320
        prior = run.prior()
    assert prior.shape.codebook_size == 24 and prior.shape.text_length == 14
    first = {name: w.float() for name, w in bundle.weights("prior").items()}
    moved = (prior.blocks[0].attention.qkv.weight - first["blocks.0.attention.qkv.weight"]).abs().max()
    assert 0 < moved < 0.01  # ten small steps from there, and not another start: its weights have a spread of 0.25


def test_a_run_goes_on_from_the_bundle_that_it_started_from(tmp_path, bundle):
    changes = {"prior_training.steps": 1}
    with begun_from(bundle, tmp_path / "run", changes) as run:
        run.prior()
    with begun_from(bundle, tmp_path / "run", changes):
        pass
    with opened(tmp_path / "other") as run:
        other = dataclasses.replace(read_bundle(run.bundle()), fingerprint="0" * 64)
    with pytest.raises(RequestError, match="started from the bundle tiny .*cannot go on with --init tiny .000000"):
        begun_from(other, tmp_path / "run", changes).__enter__()
    with pytest.raises(RequestError, match="cannot go on without --init"), opened(tmp_path / "run"):
        pass
    with pytest.raises(RequestError, match="was begun without --init"):
        begun_from(bundle, tmp_path / "other", changes).__enter__()


def test_the_bundle_says_the_command_that_made_each_of_its_figures(tmp_path):
    with opened(tmp_path / "run", command="armchair train a.yaml") as run:
        run.image_tokenizer()
    with opened(tmp_path / "run", command="armchair train b.yaml") as run:
        found = read_bundle(run.bundle()).info["metrics"]
    assert {name: figures["command"] for name, figures in found.items()} == {
        "image_tokenizer": "armchair train a.yaml",
        "prior": "armchair train b.yaml",
    }
