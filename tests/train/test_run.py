"""Runs as wholes: what may change on the way, and what they start from."""

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from armchair.config import from_dict, with_overrides
from armchair.errors import RequestError
from armchair.train.checkpoint import newest_step
from armchair.train.loop import Interrupted
from armchair.train.recipe import Recipe
from armchair.train.run import Run, start_run

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
def opened(folder: Path, changes: dict[str, Any] | None = None, stop: int | None = None, **options: Any) -> Iterator[Run]:
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
