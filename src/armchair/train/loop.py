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
from pathlib import Path
from typing import Any, Protocol

import torch
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

    def batches(self, start_step: int) -> Generator[Any, None, None]:
        """Batches from `start_step` on, a pure function of the step."""

    def parts(self, batch: Any, count: int) -> list[Any]:
        """A batch cut into `count` equal parts, for gradient accumulation."""

    def loss(self, batch: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The scalar to minimise and what to log beside it, for part `part` of step `step`'s batch."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures on held-out data, `loss` among them, of the averaged weights."""

    def sheet(self, model: nn.Module) -> Image.Image | None:
        """A picture that shows how well the averaged weights do, with fixed inputs and seeds."""


def fit(
    stage: Stage,
    config: FitConfig,
    folder: Path,
    report: Report,
    *,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train `stage` in `folder`, going on from its newest checkpoint if there is one; give the averaged model.

    Raises WorkError when the loss is not finite, Interrupted (after saving) when `should_stop()` turns true.
    """
    model = stage.model.to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, config, device)
    plateau = Plateau(config.plateau_patience)
    start = load_checkpoint(folder, model, average, optimizer, plateau)
    if start >= config.steps:
        return average
    report.begin(stage.name, start, config)

    batches = stage.batches(start)
    try:
        for step in range(start, config.steps):
            lr = step_size(step, config, plateau.scale)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            metrics: dict[str, Tensor | float] = {}
            for part, piece in enumerate(stage.parts(batch, config.accumulate)):
                with autocast(device, config.precision):
                    loss, more = stage.loss(piece, step, part)
                (loss / config.accumulate).backward()
                for name, value in {"loss": loss.detach(), **more}.items():
                    metrics[name] = metrics.get(name, 0.0) + value / config.accumulate
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            _check_finite(stage.name, step, metrics["loss"], norm, folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_ema(list(average.parameters()), list(model.parameters()), config.ema, step)

            done, last = step + 1, step + 1 == config.steps
            report.step(done, {**metrics, "grad_norm": norm, "lr": lr, "data_wait": waited})
            if done % config.validate_every == 0 or last:
                with autocast(device, config.precision):
                    figures = stage.validate(average)
                plateau.observe(figures["loss"])
                report.validation(done, figures)
            if done % config.sheet_every == 0 or last:
                with torch.no_grad():
                    report.sheet(done, stage.sheet(average))
            stop = should_stop()
            if done % config.save_every == 0 or last or stop:
                save_checkpoint(folder, done, model, average, optimizer, plateau)
            if stop and not last:
                raise Interrupted(f"stopped after step {done} of {stage.name}; the state is saved in {folder}")
    finally:
        batches.close()
    report.end()
    return average


def _check_finite(name: str, step: int, loss: Tensor | float, norm: Tensor, folder: Path) -> None:
    if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
        raise WorkError(
            f"{name}: loss {float(loss):.4g}, gradient norm {float(norm):.4g} at step {step + 1}; checkpoints, where "
            f"one was saved, are in {folder}. A smaller lr or a longer warmup usually helps"
        )
