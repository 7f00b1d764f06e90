"""Parameter groups, step-size schedules and the moving average of the weights."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from armchair.clip.model import CLIP
from armchair.image.network import ImageTokenizer
from armchair.prior.transformer import BASE_WIDTH, Prior
from armchair.runtime import compute_type
from armchair.train.muon import MuonAdamW
from armchair.train.recipe import FitConfig, ImageTokenizerTraining, PriorTraining

# Step size of the codes' vectors, as a share of the recipe's, where `code_features` computes them. A weight of
# `CodeVectors` moves every code's vector at once: at a scale of 1 a shapes prior had 76 bits a picture after 400
# updates of 800, at 0.4 it had 41, at 0.1 37. What a code has for itself is learned more slowly still: at a scale of 1
# pairs of form and colour that training never showed came out right 48 times in 100, at 0.1 76 times. That 0.03 goes on
# from there was not measured alone: the shapes recipe that has it also draws otherwise.
CODE_VECTORS_SCALE = 0.1
OWN_VECTORS_SCALE = 0.03


def make_optimizer(model: nn.Module, config: FitConfig, device: torch.device) -> MuonAdamW:
    """AdamW as the recipe says, with Muon on the matrices where it gives `matrix_lr`."""
    return MuonAdamW(
        parameter_groups(
            model,
            config.weight_decay,
            config.encoder_scale if isinstance(config, ImageTokenizerTraining) else 1.0,
            None if config.matrix_lr is None else config.matrix_lr / config.lr,
            config.lr_width if isinstance(config, PriorTraining) else BASE_WIDTH,
        ),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
        product_type=compute_type(device, config.precision),
    )


class _Kind(NamedTuple):
    """What the members of a parameter group have in common."""

    weight_decay: float
    lr_scale: float  # step size, as a share of the recipe's
    matrices: int = 0  # matrices a weight holds, for Muon; 0: AdamW


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    encoder_scale: float = 1.0,
    matrix_scale: float | None = None,
    lr_width: int = BASE_WIDTH,
) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`: weight decay on matrices only, never on gains, biases or embeddings (paper, section 2.4).

    Under AdamW a prior's hidden matrices carry `lr_scale` `lr_width` / D, so that one step size, stated at that width,
    serves every width (see the table in `armchair.prior.transformer`); where it has `code_features`, the codes' vectors
    carry CODE_VECTORS_SCALE.
    The encoder of an image tokenizer, with what makes codes of its features, carries `encoder_scale`.
    With `matrix_scale`, Muon moves the matrices within the blocks and the convolutions, at that share of the step size.
    """
    groups: dict[_Kind, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        kind = _kind(model, name, p, weight_decay, encoder_scale, matrix_scale, lr_width)
        groups.setdefault(kind, []).append(p)
    return [{"params": groups[kind], **kind._asdict()} for kind in sorted(groups, reverse=True)]  # decayed first


def _kind(
    model: nn.Module,
    name: str,
    p: nn.Parameter,
    decay: float,
    encoder_scale: float,
    matrix_scale: float | None,
    lr_width: int,
) -> _Kind:
    if isinstance(model, Prior):
        own = ("image_embedding.weight", "image_head.weight")
        if name.startswith(("code_inputs.", "code_outputs.")) or (model.config.code_features and name in own):
            return _Kind(0.0, OWN_VECTORS_SCALE if name in own else CODE_VECTORS_SCALE)
        if not model.is_hidden_matrix(name):
            return _Kind(0.0, 1.0)
        if matrix_scale is not None and name.startswith("blocks."):
            return _Kind(decay, matrix_scale, model.matrices_in(name))
        return _Kind(decay, lr_width / model.config.d_model)
    if isinstance(model, CLIP):
        if matrix_scale is not None and model.is_hidden_matrix(name):
            return _Kind(decay, matrix_scale, 3 if name.endswith("qkv.weight") else 1)
        return _Kind(decay if p.ndim >= 2 and "embedding" not in name and "position" not in name else 0.0, 1.0)
    scale = encoder_scale if isinstance(model, ImageTokenizer) and name.startswith(model.encoder_parts) else 1.0
    if matrix_scale is not None and p.ndim == 4 and "to_logits" not in name:
        return _Kind(decay, matrix_scale * scale, 1)
    return _Kind(decay if p.ndim >= 2 and not name.endswith("codebook") else 0.0, scale)


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
    if config.schedule == "trapezoid":  # Zhai et al., "Scaling Vision Transformers", 2022, section 3.5
        high = min(1.0, (config.steps - step) / (config.steps - config.cooldown_step + 1))
        return warm * (config.final_lr + (config.lr - config.final_lr) * high)
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
