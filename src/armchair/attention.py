"""Attention as it is trained: softmax(q k^T / sqrt(E)) v over whole sequences, for the prior and the ranker.

Legend: B batch, H heads, L length, M keys (L where a sequence attends to itself), E size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_BLOCK = 96  # queries
MASKED_LENGTH = 512  # positions up to which a mask's scores are all held on a CPU


@dataclass(frozen=True)
class QueryBlock:
    """Queries that are computed together, and the keys that some of them see beside the shared ones.

    Both are runs of positions, and `mask` (queries, shared + keys) says, in their order, who of these sees whom.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: Tensor


@dataclass(frozen=True)
class SparseBlocks:
    """A mask that lets little through, as blocks that hold all of it: every position is a query of one of them.

    The first `shared` positions are keys of every block.
    """

    shared: int
    blocks: tuple[QueryBlock, ...]

    @property
    def scores(self) -> int:
        """How many scores are computed, for one head."""
        return sum(block.mask.numel() for block in self.blocks)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool = True, sparse: SparseBlocks | None = None
) -> Tensor:
    """Attention over whole sequences. q: (B, H, L, E); k, v: (B, H, M, E); mask: (L, M) bool, True where a key is seen.

    `causal` says that M is L and that the mask lets nothing through that comes later. On a CPU and at the lengths of
    small grids plain products take a third of the time that PyTorch's fused kernel takes forward and backward (13
    against 42 ms at 64 x 4 heads x 96 x 64, bf16); past that length the (L, M) scores would dominate memory. `sparse`
    is the same mask as blocks, where that is less to compute; a CPU then goes by these, at any length.
    `attend_plainly` is the same in two lines.
    """
    if q.device.type == "cpu":
        if sparse is not None:
            return _SparseAttention.apply(q, k, v, sparse)
        if max(q.shape[2], k.shape[2]) <= MASKED_LENGTH:
            return _BlockAttention.apply(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The literal version that `attend` is tested against."""
    return attention_shares(q, k, mask) @ v


def attention_shares(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """What each position takes of each that it sees, (B, H, L, M): rows sum to 1. q, k, mask: as in `attend`."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def masked_scores(length: int) -> int:
    """How many scores a CPU computes for a causal mask of (L, L) that it is given whole, for one head."""
    if length > MASKED_LENGTH:
        return length**2
    blocks = [_block(start, length, length, True) for start in range(0, length, ATTENTION_BLOCK)]
    return sum((rows.stop - rows.start) * keys.stop for rows, keys in blocks)


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


class _SparseAttention(torch.autograd.Function):
    """Block after block: what one sees is put side by side, the shared rows first, and attended to as one sequence.

    What is computed and kept grows with the length times what a block sees, not with the square of the length. The
    copies are small enough to stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sparse: SparseBlocks) -> Tensor:  # type: ignore[override]
        out, shares = _like_heads(q), []
        keys, values = _Gathered(k, sparse), _Gathered(v, sparse)
        for block in sparse.blocks:
            bias = torch.zeros(block.mask.shape, dtype=q.dtype).masked_fill_(~block.mask, -torch.inf)
            rows, seen = _rows(q, block.queries), keys.of(block)
            scores = torch.baddbmm(bias, rows, seen.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
            p = scores.softmax(-1, dtype=q.dtype)
            _write(out, block.queries, torch.bmm(p, values.of(block)))
            shares.append(p)
        ctx.save_for_backward(q, k, v, *shares)
        ctx.sparse = sparse
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, *shares = ctx.saved_tensors
        sparse, scale = ctx.sparse, q.shape[-1] ** -0.5
        dq, dk, dv = _like_heads(q), _like_heads(k).zero_(), _like_heads(v).zero_()
        keys, values = _Gathered(k, sparse), _Gathered(v, sparse)
        # Every block adds to the shared keys' gradients, which 16 bits would round each time.
        shared_dk, shared_dv = (torch.zeros_like(x.shared, dtype=torch.float32) for x in (keys, values))
        for p, block in zip(shares, sparse.blocks, strict=True):
            rows, grads = _rows(q, block.queries), _rows(grad, block.queries)
            block_dv = torch.bmm(p.transpose(1, 2), grads)
            dp = torch.bmm(grads, values.of(block).transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            _write(dq, block.queries, torch.bmm(ds, keys.of(block)).mul_(scale))
            block_dk = torch.bmm(ds.transpose(1, 2), rows).mul_(scale)
            for whole, shared, part in ((dk, shared_dk, block_dk), (dv, shared_dv, block_dv)):
                shared += part[:, : sparse.shared]
                _write(whole, block.keys, part[:, sparse.shared :], add=True)
        for whole, shared in ((dk, shared_dk), (dv, shared_dv)):
            whole[:, :, : sparse.shared] = shared.unflatten(0, whole.shape[:2])
        return dq, dk, dv, None


class _Gathered:
    """The rows of keys or values (B, H, L, E) that a block sees, side by side in a buffer that all blocks share."""

    def __init__(self, x: Tensor, sparse: SparseBlocks):
        self.x, self.start = x, sparse.shared
        widest = max(block.mask.shape[1] for block in sparse.blocks)
        self.buffer = x.new_empty(x.shape[0] * x.shape[1], widest, x.shape[-1])
        self.shared = self.buffer[:, : self.start]
        self.shared.unflatten(0, x.shape[:2]).copy_(x[:, :, : self.start])

    def of(self, block: QueryBlock) -> Tensor:
        """(B * H, shared + keys, E), until the next is asked for."""
        place = self.start
        for run in block.keys:
            rows = self.x[:, :, run]
            end = place + rows.shape[2]
            self.buffer[:, place:end].unflatten(0, rows.shape[:2]).copy_(rows)
            place = end
        return self.buffer[:, :place]


def _like_heads(x: Tensor) -> Tensor:
    """An empty (B, H, L, E) in which the heads of a position lie side by side, as the layer wants them next."""
    b, h, length, e = x.shape
    return x.new_empty(b, length, h, e).transpose(1, 2)


def _rows(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """(B, H, L, E) -> (B * H, rows, E)"""
    pieces = [x[:, :, run] for run in runs]
    return (torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]).flatten(0, 1)


def _write(x: Tensor, runs: Sequence[slice], rows: Tensor, add: bool = False) -> None:
    """Put (B * H, rows, E) where `_rows` would take them from, or add them there."""
    start = 0
    for run in runs:
        place = x[:, :, run]
        piece = rows[:, start : start + place.shape[2]].unflatten(0, place.shape[:2])
        start += place.shape[2]
        if add:
            place += piece
        else:
            place.copy_(piece)
