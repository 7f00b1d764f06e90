"""Attention as it is trained: softmax(q k^T / sqrt(E)) v over whole sequences, for the prior and the ranker.

Legend: B batch, H heads, L length, M keys (L where a sequence attends to itself), E size of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_BLOCK = 96  # queries


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool = True) -> Tensor:
    """Attention over whole sequences. q: (B, H, L, E); k, v: (B, H, M, E); mask: (L, M) bool, True where a key is seen.

    `causal` says that M is L and that the mask lets nothing through that comes later. On a CPU and at the lengths of
    small grids plain products take a third of the time that PyTorch's fused kernel takes forward and backward (13
    against 42 ms at 64 x 4 heads x 96 x 64, bf16); past that length the (L, M) scores would dominate memory.
    `attend_plainly` is the same in two lines.
    """
    if q.device.type == "cpu" and max(q.shape[2], k.shape[2]) <= 512:
        return _BlockAttention.apply(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The literal version that `attend` is tested against."""
    return attention_shares(q, k, mask) @ v


def attention_shares(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """What each position takes of each that it sees, (B, H, L, M): rows sum to 1. q, k, mask: as in `attend`."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


class _BlockAttention(torch.autograd.Function):
    """By blocks of queries, where the mask is causal each with the keys up to its last one: of the scores that it does
    not let through, most are never computed. At a length of 288 that is a third of all.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool) -> Tensor:  # type: ignore[override]
        b, h, length, e = q.shape
        q, k, v = (x.reshape(b * h, -1, e) for x in (q, k, v))
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        shares = []
        for start in range(0, length, ATTENTION_BLOCK):
            rows, keys = _block(start, length, k.shape[1], causal)
            scores = torch.baddbmm(bias[rows, keys], q[:, rows], k[:, keys].transpose(1, 2), alpha=e**-0.5)
            p = scores.softmax(-1, dtype=q.dtype)
            out[:, rows] = torch.bmm(p, v[:, keys])
            shares.append(p)
        ctx.save_for_backward(q, k, v, *shares)
        ctx.causal = causal
        return out.unflatten(0, (b, h))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, *shares = ctx.saved_tensors
        length, e = q.shape[1:]
        b, h = grad.shape[:2]
        grad = grad.reshape(b * h, length, e)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, start in zip(shares, range(0, length, ATTENTION_BLOCK), strict=True):
            rows, keys = _block(start, length, k.shape[1], ctx.causal)
            dv[:, keys].baddbmm_(p.transpose(1, 2), grad[:, rows])
            dp = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.bmm(ds, k[:, keys]).mul_(e**-0.5)
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q[:, rows], alpha=e**-0.5)
        return *(x.unflatten(0, (b, h)) for x in (dq, dk, dv)), None, None


def _block(start: int, length: int, keys: int, causal: bool) -> tuple[slice, slice]:
    """A block of queries from `start` on, and the keys that it may see, of so many."""
    end = min(start + ATTENTION_BLOCK, length)
    return slice(start, end), slice(0, end if causal else keys)
