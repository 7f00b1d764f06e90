"""A run that is killed goes on as if it had not been; a checkpoint is whole or not there."""

import contextlib
import io
import json
import multiprocessing
import multiprocessing.context
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from armchair.errors import WorkError
from armchair.train import checkpoint
from armchair.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from armchair.train.loop import fit
from armchair.train.optim import Plateau, parameter_groups
from armchair.train.recipe import FitConfig
from armchair.train.report import Report
from armchair.train.run import start_run
from train import train_tiny

STAGES = ("autoencoder", "image_tokenizer", "prior", "ranker")
KILLS = 3


# Killed for real.


@pytest.fixture(scope="module")
def programs() -> multiprocessing.context.ForkServerContext:
    """Starts processes of their own that have what a run needs imported already: thirteen of them would import it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([start_run.__module__, "torch._dynamo"])  # optimisers import that when they are made
    return context


@contextlib.contextmanager
def begun(programs: multiprocessing.context.ForkServerContext, run: Path) -> Iterator[Process]:
    """A process that trains, waited for at the end."""
    process = programs.Process(target=train_tiny.main, args=(run,))
    process.start()
    try:
        yield process
    finally:
        process.join()


def log(run: Path) -> list[dict]:
    try:
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in_training(
    programs: multiprocessing.context.ForkServerContext, run: Path, stage: str, step: int, delay: float
) -> None:
    """Start or go on, and kill once `stage` has logged `step`, a little later."""
    with begun(programs, run) as process:
        while not any(e["event"] == "step" and e["stage"] == stage and e["step"] >= step for e in log(run)):
            assert process.is_alive(), run.with_suffix(".err").read_text()
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
    assert process.exitcode == -signal.SIGKILL
    ended = [e["stage"] for e in log(run) if e["event"] == "end"]
    assert stage not in ended, "killed too late to prove anything"


@pytest.mark.slow
def test_a_run_killed_in_training_ends_with_the_same_bits(programs, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    rng = random.Random(11)
    with begun(programs, straight) as reference:
        for stage in STAGES:
            for k in range(KILLS):
                low = 4 + k * train_tiny.STEPS // (KILLS + 1)
                kill_in_training(programs, killed, stage, rng.randint(low, low + 30), rng.uniform(0, 0.05))
        with begun(programs, killed) as last:
            pass
    assert last.exitcode == 0, (tmp_path / "killed.err").read_text()
    assert reference.exitcode == 0, (tmp_path / "straight.err").read_text()

    for stage in STAGES:
        begins = [e["step"] for e in log(killed) if e["event"] == "begin" and e["stage"] == stage]
        assert len(begins) == KILLS + 1 and begins[0] == 0 and all(begins[1:])  # each time from a checkpoint
        newest = checkpoints(killed / stage)[-1]
        assert newest.name == checkpoints(straight / stage)[-1].name == f"step_{train_tiny.STEPS:08d}"
        for name in ("weights.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"):
            assert (newest / name).read_bytes() == (straight / stage / newest.name / name).read_bytes(), (
                stage,
                name,
            )
        for event in ("step", "validation"):  # and what was told on the way is the same
            told = [told_by(run, stage, event) for run in (killed, straight)]
            assert told[0] == told[1]
        sheets = [sorted((run / "sheets").glob(f"{stage}_*.png")) for run in (killed, straight)]
        assert [s.name for s in sheets[0]] == [s.name for s in sheets[1]]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*sheets, strict=True))
    assert (killed / "text_tokenizer.json").read_bytes() == (straight / "text_tokenizer.json").read_bytes()


def told_by(run: Path, stage: str, event: str) -> dict[int, dict]:
    timing = ("time", "images_per_second", "data_wait")
    events = [e for e in log(run) if e["event"] == event and e["stage"] == stage]
    return {e["step"]: {k: v for k, v in e.items() if k not in timing} for e in events}


# A crash at each moment of a save.


class Crash(BaseException):
    """The process dies here."""


class State:
    """A model in training, at a step that its weights, average, moments and plateau tell."""

    def __init__(self, step: int = 0):
        self.model, self.average = nn.Linear(3, 2), nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=0.1)
        self.plateau = Plateau(2)
        if step:
            for p in self.model.parameters():
                p.grad = torch.full_like(p, float(step))
            self.optimizer.step()
            with torch.no_grad():
                for n, p in enumerate([*self.model.parameters(), *self.average.parameters()]):
                    p.fill_(step + n / 10)
            self.plateau.observe(float(step))

    def save(self, folder: Path, step: int) -> None:
        save_checkpoint(folder, step, self.model, self.average, self.optimizer, self.plateau)

    def load(self, folder: Path) -> int:
        return load_checkpoint(folder, self.model, self.average, self.optimizer, self.plateau)

    def facts(self) -> list:
        moments = [self.optimizer.state[p] for p in self.model.parameters()]
        tensors = [
            *self.model.parameters(),
            *self.average.parameters(),
            *(m[k] for m in moments for k in sorted(m)),
        ]
        return [t.tolist() for t in tensors] + [self.plateau.state()]


def crash_at(monkeypatch: pytest.MonkeyPatch, n: int, after: bool) -> None:
    """Die before, or after, the n-th call that changes the disk."""
    calls = 0

    def dying(call: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n and not after:
                raise Crash
            result = call(*args, **kwargs)
            if calls == n:
                raise Crash
            return result

        return wrapper

    monkeypatch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))
    for module, name in (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (Path, "mkdir"),
    ):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    State(7).save(tmp_path, 7)
    found = State()
    assert found.load(tmp_path) == 7
    assert found.facts() == State(7).facts()


def test_no_checkpoint_is_step_zero(tmp_path):
    assert State().load(tmp_path / "nothing") == 0


def test_the_newest_two_checkpoints_stay(tmp_path):
    for step in (5, 10, 100, 20):
        State(step).save(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000020", "step_00000100"]


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, after):
    whole_steps = set()
    for n in range(1, 50):
        folder = tmp_path / str(n)
        for step in (1, 2):
            State(step).save(folder, step)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, n, after)
            try:
                State(3).save(folder, 3)
            except Crash:
                pass
            else:
                break
        found = State()
        step = found.load(folder)
        assert step in (2, 3) and found.facts() == State(step).facts()
        whole_steps.add(step)
        State(4).save(folder, 4)  # and what the crash left is in nobody's way
        assert found.load(folder) == 4
    assert n > 10 and whole_steps == {2, 3}


@pytest.mark.parametrize("name", ["weights.safetensors", "average.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_an_altered_file_is_refused_by_name(tmp_path, name, harm):
    for step in (1, 2):
        State(step).save(tmp_path, step)
    place = tmp_path / "step_00000002" / name
    data = bytearray(place.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        place.write_bytes(data)
    elif harm == "cut":
        place.write_bytes(data[:-4])
    else:
        place.unlink()
    with pytest.raises(WorkError) as error:
        State().load(tmp_path)
    assert name in str(error.value) and str(place.parent) in str(error.value) and "\n" not in str(error.value)
    shutil.rmtree(place.parent)  # as the message says
    assert State().load(tmp_path) == 1


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"step": 2}'])
def test_an_altered_state_is_refused(tmp_path, text):
    State(2).save(tmp_path, 2)
    (tmp_path / "step_00000002" / "state.json").write_text(text)
    with pytest.raises(WorkError, match="step_00000002"):
        State().load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    State(2).save(tmp_path, 2)
    other = State()
    other.model = nn.Linear(4, 2)
    with pytest.raises(WorkError, match="step_00000002.*was the recipe changed since"):
        other.load(tmp_path)


def test_the_whole_loop_survives_a_crash_in_a_save(tmp_path, monkeypatch):
    config = FitConfig(steps=12, batch_size=8, lr=0.02, save_every=4, precision="fp32")

    def train(run: Path) -> nn.Module:
        with contextlib.closing(Report(run, io.StringIO())) as report:
            return fit(tiny.ToyStage(), config, run / "toy", report, device=torch.device("cpu"))

    straight = train(tmp_path / "straight").state_dict()
    real, calls = checkpoint.os.replace, iter(range(1, 10))

    def replace(*args):
        if next(calls) == 2:
            raise Crash
        real(*args)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(Crash):
        train(tmp_path / "crashed")
    assert [p.name for p in checkpoints(tmp_path / "crashed" / "toy")] == ["step_00000004"]
    again = train(tmp_path / "crashed").state_dict()
    assert all(torch.equal(again[name], straight[name]) for name in straight)
