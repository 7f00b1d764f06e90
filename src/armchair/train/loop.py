"""The only training loop. A stage says what a batch, a loss, a validation and a sheet are; the rest is here.

Everything random in step s is drawn from generators seeded with (seed, stage, s), and the data order is a
function of the step too, so the state of a run is its weights, their average, the optimiser's moments and the
step: a run that was killed goes on as if it had not been.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
from PIL import Image
from torch import Tensor, nn

from armchair.errors import WorkError
from armchair.runtime import autocast
from armchair.train.checkpoint import load_checkpoint, save_checkpoint
from armchair.train.optim import Plateau, make_optimizer, step_size, update_ema
from armchair.train.recipe import FitConfig
from armchair.train.report import Report

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user asked to stop; the state was saved first."""


class Stage(Protocol):
    """What one stage of a recipe brings to the loop."""

    name: str

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Any, None, None]:
        """Batches from `start_step` on, a pure function of the step; of `world` processes, the share of `rank`.

        Raises RequestError where the stage has to see its batch whole.
        """

    def parts(self, batch: Any, count: int) -> list[Any]:
        """A batch cut into `count` equal parts, for gradient accumulation."""

    def loss(self, batch: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The scalar to minimise and what to log beside it, for part `part` of step `step`'s batch."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures on held-out data, `loss` among them, of the averaged weights."""

    def sheet(self, model: nn.Module) -> Image.Image | None:
        """A picture that shows how well the averaged weights do, with fixed inputs and seeds."""


@runtime_checkable
class FollowsUp(Protocol):
    """A stage that moves something of its model's by itself, which no gradient does, such as a codebook."""

    def after_update(self, step: int) -> None:
        """Called once the optimiser has moved the weights in `step`."""


def fit(
    stage: Stage,
    config: FitConfig,
    folder: Path,
    report: Report,
    *,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    rank: int = 0,
    world: int = 1,
) -> nn.Module:
    """Train `stage` in `folder`, going on from its newest checkpoint if there is one; give the averaged model.

    With a `world` of more than one, as many processes do this together, each with its `rank` and its share of every
    batch, and average their gradients through the default group of `torch.distributed`, which whoever starts them has
    joined them in. Rank 0 writes and tells. The parts of all ranks are numbered through, so that two ranks of one part
    see the noise that one process sees in two parts. `should_stop()` must then say the same on every rank.

    Raises WorkError when the loss is not finite, Interrupted (after saving) when `should_stop()` turns true.
    """
    model = stage.model.to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, config, device)
    plateau = Plateau(config.plateau_patience)
    start = load_checkpoint(folder, model, average, optimizer, plateau)
    if start >= config.steps:
        return average
    if rank == 0:
        report.begin(stage.name, start, config)

    averaged, numbers = _numbers(average), _numbers(model)
    batches = stage.batches(start, rank, world)
    workers = Workers(config, device, rank)
    try:
        for step in range(start, config.steps):
            lr = step_size(step, config, plateau.scale)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            metrics = workers.gradients(stage, batch, step)
            if world > 1:
                _average_gradients(model, world)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            _check_finite(stage.name, step, metrics["loss"], norm, folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(stage, FollowsUp):
                stage.after_update(step)
            update_ema(averaged, numbers, config.ema, step)

            done, last = step + 1, step + 1 == config.steps
            if rank == 0:
                report.step(done, {**metrics, "grad_norm": norm, "lr": lr, "data_wait": waited})
            if done % config.validate_every == 0 or last:
                with autocast(device, config.precision):
                    figures = stage.validate(average)
                plateau.observe(figures["loss"])
                if rank == 0:
                    report.validation(done, figures)
            if rank == 0 and (done % config.sheet_every == 0 or last):
                with torch.no_grad():
                    report.sheet(done, stage.sheet(average))
            stop = should_stop()
            if rank == 0 and (done % config.save_every == 0 or last or stop):
                save_checkpoint(folder, done, model, average, optimizer, plateau)
            if stop and not last:
                raise Interrupted(f"stopped after step {done} of {stage.name}; the state is saved in {folder}")
    finally:
        batches.close()
        workers.close()
    if rank == 0:
        report.end()
    return average


def _average_gradients(model: nn.Module, world: int) -> None:
    for p in model.parameters():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= world


class Workers:
    """Computes the parts of a batch, one after the other or, on a CPU, `at_once` at a time.

    Two halves on a core each can take less time than the whole on two: a prior whose products are too small to share
    well gains, an autoencoder, whose halves are too small themselves, loses.
    Gradients are added in the order of the parts, so that the sums do not depend on who was first.
    """

    def __init__(self, config: FitConfig, device: torch.device, rank: int = 0):
        self.config, self.device = config, device
        self.first_part = rank * config.accumulate
        self.threads = torch.get_num_threads()
        self.pool: ThreadPoolExecutor | None = None
        if config.at_once > 1 and device.type == "cpu":
            share = max(1, self.threads // config.at_once)
            self.pool = ThreadPoolExecutor(config.at_once, "part", initializer=lambda: torch.set_num_threads(share))

    def gradients(self, stage: Stage, batch: Any, step: int) -> dict[str, Tensor | float]:
        """Leave the gradients of the batch's mean loss in the parameters; the mean of what the parts log."""
        count = self.config.accumulate
        pieces = stage.parts(batch, count)

        def forward(part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
            with autocast(self.device, self.config.precision):
                loss, more = stage.loss(pieces[part], step, self.first_part + part)
            return loss / count, {"loss": loss.detach(), **more}

        def alone(part: int) -> dict[str, Tensor | float]:
            loss, told = forward(part)
            loss.backward()
            return told

        def beside_others(part: int) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor | float]]:
            loss, told = forward(part)
            return torch.autograd.grad(loss, weights, allow_unused=True), told

        if self.pool is None:
            return _mean([alone(part) for part in range(count)])
        weights = [p for p in stage.model.parameters() if p.requires_grad]
        told = []
        for gradients, figures in self.pool.map(beside_others, range(count)):
            told.append(figures)
            for p, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    # A copy in the weight's own layout: what autograd gives may be a view, or another's gradient too.
                    p.grad = torch.empty_like(p).copy_(gradient) if p.grad is None else p.grad.add_(gradient)
        return _mean(told)

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)  # what threads that start later take for their own


def _numbers(model: nn.Module) -> list[Tensor]:
    """What is averaged: the weights, and statistics of what they give, which would not be those of averaged weights."""
    saved = model.state_dict().keys()  # other buffers are tables that never change
    return [*model.parameters(), *(b for name, b in model.named_buffers() if name in saved and b.is_floating_point())]


def _mean(told: list[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    return {name: sum(part[name] for part in told) / len(told) for name in told[0]}


def _check_finite(name: str, step: int, loss: Tensor | float, norm: Tensor, folder: Path) -> None:
    if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
        raise WorkError(
            f"{name}: loss {float(loss):.4g}, gradient norm {float(norm):.4g} at step {step + 1}; checkpoints, where "
            f"one was saved, are in {folder}. A smaller lr or a longer warmup usually helps"
        )
