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

# Rows whose logits are there at once, in a loss that starts from states: enough for products at full speed, and for
# the sums of the weight's gradient, one a chunk, not to count.
HEAD_ROWS = {"cpu": 1024, "cuda": 4096}


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


class Head(NamedTuple):
    """What makes logits of states."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)


def stream_loss_of_states(
    states: Tensor,
    heads: tuple[Head, Head],
    text_tokens: Tensor,
    codes: Tensor,
    text_weight: float = 1 / 8,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> StreamLoss:
    """`stream_loss` of the logits that the heads make of states (B, L, D), of which a chunk is there at a time.

    heads: that of the text, on the first T positions, and that of the image, on the others. weights: (B, N), how much
    each image token counts, 1 on average; none: all alike.
    """
    t, (text_head, image_head) = text_tokens.shape[1], heads
    text, _ = head_cross_entropies(states[:, :t].flatten(0, 1), text_head, text_tokens.flatten())
    shares = None if weights is None else weights.flatten() / weights.numel()
    image, plain = head_cross_entropies(
        states[:, t:].flatten(0, 1), image_head, codes.flatten(), label_smoothing, shares
    )
    return StreamLoss(text_weight * text + (1 - text_weight) * image, text, plain if label_smoothing else image)


def head_cross_entropies(
    states: Tensor, head: Head, targets: Tensor, smoothing: float = 0.0, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropies` of the logits that a head makes of states (M, D), without ever holding all of these.

    shares: (M,), what each counts of the mean; none: 1 / M.

    Products are in the type that autocast asks for, or else in that of the states; sums over rows are in 32 bits.
    """
    device = states.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (states, *head))
    with torch.autocast(device, enabled=False):
        return _HeadCrossEntropies.apply(states, *head, targets, smoothing, shares, dtype, learned)


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


class _HeadCrossEntropies(torch.autograd.Function):
    """Chunk by chunk: the logits, the loss, and at once its gradients, so that no logits are kept or computed again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float, shares: Tensor | None,
        dtype: torch.dtype, learned: bool,
    ):  # fmt: skip
        count, size = len(states), HEAD_ROWS.get(states.device.type, HEAD_ROWS["cuda"])
        x, w, b = (tensor.detach().to(dtype) for tensor in (states, weight, bias))
        nll = torch.empty(count, device=x.device)
        spread = torch.zeros_like(nll)  # the target's logit less the mean of all
        dx = torch.empty_like(x) if learned else None
        dw, db = (torch.zeros(p.shape, device=p.device) if learned else None for p in (weight, bias))
        room = x.new_empty(min(size, count), len(weight))
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            logits = room[: rows.stop - start]
            torch.addmm(b, x[rows], w.T, out=logits)
            for block in _row_blocks(logits):
                here = slice(start + block.start, min(start + block.stop, rows.stop))
                logs, t = logits[block].log_softmax(1, dtype=torch.float32), targets[here, None]
                of_target = logs.gather(1, t)[:, 0]
                nll[here] = -of_target
                if smoothing:
                    spread[here] = of_target - logs.mean(1)
                if db is not None:
                    p = logs.exp_()
                    p.scatter_add_(1, t, p.new_full(t.shape, smoothing - 1.0))
                    if smoothing:
                        p.sub_(smoothing / p.shape[1])
                    db += p.mul_(1 / count if shares is None else shares[here, None]).sum(0)
                    logits[block] = p
            if dx is not None and dw is not None:
                torch.mm(logits, w, out=dx[rows])
                if dtype == torch.float32:
                    dw.addmm_(logits.T, x[rows])
                else:
                    dw += logits.T @ x[rows]
        if dx is not None and dw is not None and db is not None:
            ctx.save_for_backward(dx, dw, db)
        ctx.types = states.dtype, weight.dtype, bias.dtype
        plain, spread = (x.mean() if shares is None else x @ shares for x in (nll, spread))
        ctx.mark_non_differentiable(plain)
        return plain + smoothing * spread if smoothing else plain.clone(), plain

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        gradients = ((grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.types, strict=True))
        return *gradients, None, None, None, None, None


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(1, 2**18 // x.shape[-1]) if x.device.type == "cpu" else len(x)
    return [slice(i, i + rows) for i in range(0, len(x), rows)]
