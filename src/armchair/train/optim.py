"""Parameter groups, step-size schedules and the moving average of the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from armchair.image.dvae import DVAE
from armchair.prior.transformer import BASE_WIDTH, Prior
from armchair.train.recipe import FitConfig


def parameter_groups(model: nn.Module, weight_decay: float, encoder_scale: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay on matrices only, never on gains, biases or embeddings (paper, section 2.4).

    A prior's hidden matrices carry `lr_scale` 256 / D, so that one step size serves every width (see the table
    in `armchair.prior.transformer`). The encoder of a dVAE, its logits included, carries `encoder_scale`.
    """
    matrix_scale = BASE_WIDTH / model.config.d_model if isinstance(model, Prior) else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(weight_decay, matrix_scale): [], (0.0, 1.0): []}
    for name, p in model.named_parameters():
        if isinstance(model, Prior):
            hidden = model.is_hidden_matrix(name)
        else:
            hidden = p.ndim >= 2 and not name.endswith("codebook")
        scale = matrix_scale if hidden else 1.0
        if isinstance(model, DVAE) and name.startswith(("encoder.", "to_logits.")):
            scale *= encoder_scale
        groups.setdefault((weight_decay if hidden else 0.0, scale), []).append(p)
    return [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `steps` and after, along half a cosine."""
    t = min(step / steps, 1.0) if steps > 0 else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))


def step_size(step: int, config: FitConfig, plateau_scale: float = 1.0) -> float:
    """The step size of update `step` (from 0): linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        left = max(1, config.steps - config.warmup)
        return warm * cosine(max(0, step - config.warmup), left, config.lr, config.final_lr)
    return warm * config.lr * plateau_scale


class Plateau:
    """Halves the step size each time the validation loss has not improved for `patience` validations."""

    def __init__(self, patience: int):
        self.patience = patience
        self.scale, self.best, self.waited = 1.0, math.inf, 0

    def observe(self, loss: float) -> None:
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
            if self.waited >= self.patience:
                self.scale, self.waited = self.scale / 2, 0

    def state(self) -> dict[str, float]:
        # JSON has no infinity; a best that was never set is left out.
        best = {} if math.isinf(self.best) else {"best": self.best}
        return {"scale": self.scale, "waited": self.waited, **best}

    def load(self, state: dict[str, float]) -> None:
        self.scale, self.waited = state["scale"], int(state["waited"])
        self.best = state.get("best", math.inf)


@torch.no_grad()
def update_ema(average: list[Tensor], parameters: list[Tensor], decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * parameters; the decay grows to its value over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, parameters, 1 - decay)
