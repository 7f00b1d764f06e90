"""The joint stream of text and image tokens that the prior models (paper, section 2.2).

Legend: B batch, T text length, S grid side, N = S*S image tokens, L = T + N.

    input     BOS  t1  t2 ... t(T-1)  tT   z1 ... z(N-1)        L positions
    predicts  t1   t2  t3 ... tT      z1   z2 ... zN

Positions 0..T-1 predict text and T..L-1 predict the image, so each head runs on its own positions only, and
text can never come out where an image token belongs. A caption shorter than T is filled up with `pad_id`, one
past the text vocabulary; its EMBEDDING is another at each position (paper: a learned pad for every position,
attended to like any token), its class as a target is one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """The numbers that the prior takes from the two tokenizers."""

    text_vocab_size: int
    text_length: int
    codebook_size: int
    grid: int

    def __post_init__(self) -> None:
        for name in ("text_vocab_size", "text_length", "codebook_size", "grid"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def length(self) -> int:
        return self.text_length + self.image_length

    @property
    def pad_id(self) -> int:
        return self.text_vocab_size


def text_input_ids(text_tokens: Tensor, shape: StreamShape) -> Tensor:
    """(B, T) text tokens with `pad_id` -> (B, T+1) rows of the text embedding table, BOS first.

    The table holds the vocabulary, then one pad for each position, then BOS.
    """
    positions = torch.arange(shape.text_length, device=text_tokens.device)
    ids = torch.where(text_tokens == shape.pad_id, shape.text_vocab_size + positions, text_tokens)
    bos = ids.new_full((len(ids), 1), shape.text_vocab_size + shape.text_length)
    return torch.cat([bos, ids], dim=1)


def null_text(count: int, shape: StreamShape, device: torch.device | str = "cpu") -> Tensor:
    """(count, T) captions that say nothing: what guidance and caption dropout put in a caption's place."""
    return torch.full((count, shape.text_length), shape.pad_id, device=device)


class StreamLoss(NamedTuple):
    loss: Tensor  # text_weight * text + (1 - text_weight) * image, the image's smoothed where that is asked for
    text: Tensor  # nats per text token, pads counted
    image: Tensor  # nats per image token; where the loss is smoothed, to look at only: without a gradient


def stream_loss(
    text_logits: Tensor,
    image_logits: Tensor,
    text_tokens: Tensor,
    codes: Tensor,
    text_weight: float = 1 / 8,
    label_smoothing: float = 0.0,
) -> StreamLoss:
    """Cross-entropies, each a mean over its own tokens, weighed 1/8 to 7/8 (paper, section 2.2).

    text_logits (B, T, V+1), image_logits (B, N, K), text_tokens (B, T), codes (B, N). With `label_smoothing` s the
    target of an image token is its code at 1 - s and every code at s / K (Szegedy et al., "Rethinking the Inception
    Architecture", 2016); `image` is without.
    """
    text, _ = cross_entropies(text_logits.flatten(0, 1), text_tokens.flatten())
    image, plain = cross_entropies(image_logits.flatten(0, 1), codes.flatten(), label_smoothing)
    return StreamLoss(text_weight * text + (1 - text_weight) * image, text, plain if label_smoothing else image)


def cross_entropies(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Means of -log softmax(logits)[target] in nats, computed in float32: smoothed, and plain, without a gradient.

    logits (M, V), targets (M,) int64.
    """
    return _CrossEntropies.apply(logits, targets, smoothing)


class _CrossEntropies(torch.autograd.Function):
    """Cross-entropy by blocks of rows, so that no float32 copy of 16-bit logits is ever held whole.

    It costs a quarter of the plain formula's time on a CPU, where that is bound by memory.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, smoothing: float):  # type: ignore[override]
        nll = torch.empty(len(logits), device=logits.device)
        spread = torch.zeros_like(nll)  # the target's logit less the mean of all
        for rows in _row_blocks(logits):
            x = logits[rows].float()
            nll[rows] = F.cross_entropy(x, targets[rows], reduction="none")
            if smoothing:
                spread[rows] = x.gather(1, targets[rows, None])[:, 0] - x.mean(1)
        ctx.save_for_backward(logits, targets, nll)
        ctx.smoothing = smoothing
        plain = nll.mean()
        ctx.mark_non_differentiable(plain)
        return plain + smoothing * spread.mean() if smoothing else plain.clone(), plain

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        logits, targets, nll = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            x, t = logits[rows].float(), targets[rows, None]
            log_z = nll[rows, None] + x.gather(1, t)
            p = x.sub_(log_z).exp_()
            p.scatter_add_(1, t, p.new_full(t.shape, ctx.smoothing - 1.0))
            if ctx.smoothing:
                p.sub_(ctx.smoothing / p.shape[1])
            out[rows] = p.mul_(grad / len(logits)).to(out.dtype)
        return out, None, None


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(1, 2**18 // x.shape[-1]) if x.device.type == "cpu" else len(x)
    return [slice(i, i + rows) for i in range(0, len(x), rows)]
