"""From logits to the next token: guidance, min-p, temperature, top-k, top-p, and the pick: functions of tensors."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from armchair.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are drawn, and pictures ranked.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all codes; guidance 1 is off. naturalness 0 leaves the
    ranking to the ranker, more counts how likely a picture is by itself (`Artist.scores`).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    naturalness: float = 0.0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature <= 100, "0, or 0.001 to 100"),
            ("top_k", self.top_k >= 0, "a count of 0 or more, 0 for all codes"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1, 0 for all codes"),
            ("guidance", 0 <= self.guidance <= 100, "0 to 100, 1 for none"),
            ("naturalness", 0 <= self.naturalness <= 100, "0 to 100, 0 for the ranker alone"),
        ):
            if not good:
                raise RequestError(f"{name}: expected {expected}, got {getattr(self, name)}")


SETTINGS = tuple(field.name for field in fields(Settings))


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on logits (Ho and Salimans, 2022; for tokens: Gafni et al., 2022)."""
    return unconditional + guidance * (conditional - unconditional)


def plausible(logits: Tensor, conditional: Tensor, min_p: float) -> Tensor:
    """logits (B, K) without the codes that the model, unguided, finds less than min_p times as likely as its first.

    Guidance raises whatever a caption makes likelier, were it by a thousand times and still absurd: a second object
    where the one that was asked for stands already. What the `conditional` logits (B, K) rule out it may not bring back
    (the plausibility constraint of contrastive decoding, Li et al., 2023; min-p, Nguyen et al., 2024, has no guidance).
    """
    if min_p == 0:
        return logits
    floor = conditional.max(1, keepdim=True).values + math.log(min_p)
    return logits.masked_fill(conditional < floor, -torch.inf)


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """logits (B, K) -> what tokens are drawn from, (B, K) float64: temperature first, then top-k, then top-p.

    top-k keeps the k likeliest codes, top-p the fewest likeliest ones whose mass reaches p (at least one).
    """
    logits = logits.double()
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[1]:
        kept = logits.topk(settings.top_k, dim=1)
        logits = torch.full_like(logits, -torch.inf).scatter_(1, kept.indices, kept.values)
    p = logits.softmax(1)
    if settings.top_p < 1:
        ordered, order = p.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered  # mass of the likelier codes
        ordered = ordered.masked_fill(before >= settings.top_p, 0.0)
        p = torch.zeros_like(p).scatter_(1, order, ordered)
        p = p / p.sum(1, keepdim=True)
    return p


def pick(p: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: p (B, K) float64, uniforms (B,) in [0, 1) -> tokens (B,) int64.

    One number drawn ahead decides a row's token, so no row's draw depends on its neighbours in the batch.
    """
    cdf = p.cumsum(1)
    total = cdf[:, -1]
    # Rounding can bring a uniform just below 1 up to all of the mass, past the last code that has any.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, wanted[:, None], right=True)[:, 0]
