"""Muon: momentum, orthogonalised (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024).

The gradient of a matrix is dominated by a few directions, and so is what Adam makes of it; setting all of its singular
values to one moves every direction alike. That is worth far more than its cost, a few small products an update:
docs/recipes.md has figures.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic: singular values end within about 0.7 to 1.2


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the groups that say `matrices: n`, n > 0: a weight there is n matrices, one above the other.

    A convolution's kernel (out, in, k, k) counts as a matrix (out, in * k * k). An update moves a matrix by
    lr * sqrt(max(1, rows / columns)) in spectral norm, at every width the same. Decay is decoupled, as in AdamW.
    product_type: what the products of the orthogonalisation are computed in; bfloat16 serves.
    """

    def __init__(self, params: Any, *, product_type: torch.dtype = torch.float32, **options: Any):
        super().__init__(params, **options)
        self.product_type = product_type

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("matrices"):
                self._orthogonal_step(group)
        return super().step(closure)  # AdamW passes over weights without a gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        lr, parts = group["lr"], group["matrices"]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp_(momentum, MOMENTUM).flatten(1).unflatten(0, (parts, -1))
            alike[tuple(update.shape[1:])].append((p, update))
            p.grad = None
        for (rows, columns), members in alike.items():  # matrices of one shape go through the products together
            updates = orthogonalised(torch.cat([update for _, update in members]).to(self.product_type))
            scale = lr * math.sqrt(max(1.0, rows / columns))
            for (p, _), update in zip(members, updates.split(parts), strict=True):
                p.mul_(1 - lr * group["weight_decay"]).sub_(update.reshape(p.shape), alpha=scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> the same: each with its singular values brought near 1, by rounds of Newton and Schulz."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
