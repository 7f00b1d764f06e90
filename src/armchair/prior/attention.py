"""Which image token may look at which: row, column, convolutional and full (paper, section 2.2, figure 11).

Legend: S grid side, N = S*S image tokens in raster order, T text length. All patterns are causal, and every
image token sees the whole text. Image tokens are counted by raster index j = row * S + column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.attention import QueryBlock, SparseBlocks, masked_scores
from armchair.config import nearest
from armchair.errors import RequestError

PATTERNS = ("full", "row", "column", "convolutional")
CONV_REACH = 5  # an 11 x 11 neighbourhood reaches 5 rows up and 5 columns to each side
BLOCK_QUERIES = 64  # about as many queries of a sparse pattern are computed together
LEAST_SAVED = 0.6  # of the scores, for which gathering what a block of a sparse pattern sees is worth it


def check_pattern(pattern: str) -> None:
    if pattern not in PATTERNS:
        raise RequestError(f"unknown attention pattern {pattern!r}: {nearest(pattern, PATTERNS)}")


def sees(pattern: str, query: Tensor, key: Tensor, grid: int) -> Tensor:
    """Whether image token `query` may attend to image token `key` (raster indices, broadcast together).

    row: the last S tokens and itself, which reaches back to the token right above. column: the same column at
    and above it. convolutional: offsets dy * S + dx with 0 <= dy <= 5, |dx| <= 5, wrapping around the grid's
    sides as the row pattern does. full: all that came before.
    """
    check_pattern(pattern)
    back = query - key
    causal = back >= 0
    if pattern == "row":
        return causal & (back <= grid)
    if pattern == "column":
        return causal & (back % grid == 0)
    if pattern == "convolutional":
        # The nearest multiple of S leaves the smallest |dx|; where S < 11 a second dy can be in reach too.
        near = torch.zeros_like(causal)
        for dy in range(CONV_REACH + 1):
            near |= (back - dy * grid).abs() <= CONV_REACH
        return causal & near
    return causal


def stream_mask(pattern: str, text_length: int, grid: int) -> Tensor:
    """(L, L) bool over the stream of `sequence.py`, True where the row's position may see the column's.

    Position 0 is BOS, 1..T the text, T+1+j image token j; L = T + N, as the last image token is never an
    input.
    """
    check_pattern(pattern)
    length = text_length + grid**2
    position = torch.arange(length)
    mask = position[:, None] >= position[None, :]
    first = text_length + 1
    j = torch.arange(length - first)
    mask[first:, first:] = sees(pattern, j[:, None], j[None, :], grid)
    return mask


def stream_blocks(pattern: str, text_length: int, grid: int, queries: int = BLOCK_QUERIES) -> SparseBlocks:
    """`stream_mask` as blocks of about so many queries each, with the text and what these see of the image.

    The text is a block by itself. Columns of the image come several at a time, where they are short; of the other
    patterns a block is a run of the raster, and its keys begin where what its first query sees begins.
    """
    mask = stream_mask(pattern, text_length, grid)
    length, first = len(mask), text_length + 1
    positions = torch.arange(length)
    runs: list[tuple[tuple[slice, ...], tuple[slice, ...]]] = [((slice(0, first),), ())]
    if pattern == "column":
        columns = [slice(first + c, length, grid) for c in range(min(grid, length - first))]
        together = max(1, queries // grid)
        groups = [tuple(columns[i : i + together]) for i in range(0, len(columns), together)]
        runs += [(group, group) for group in groups]
    else:
        reach = {"row": grid, "convolutional": CONV_REACH * (grid + 1)}.get(pattern, length)
        for start in range(first, length, queries):
            end = min(start + queries, length)
            runs.append(((slice(start, end),), (slice(max(first, start - reach), end),)))
    blocks = []
    for rows, keys in runs:
        query = torch.cat([positions[run] for run in rows])
        key = torch.cat([positions[:first], *(positions[run] for run in keys)])
        blocks.append(QueryBlock(rows, keys, mask[query[:, None], key]))
    return SparseBlocks(first, tuple(blocks))


def quicker_blocks(pattern: str, text_length: int, grid: int) -> SparseBlocks | None:
    """`stream_blocks` where they are enough less to compute than the masked whole, which small grids are quicker with.

    A row of a small grid sees most of what came before, and a convolution nearly all; blocks then save few scores and
    cost copies of the keys.
    """
    if pattern == "full":
        return None
    blocks = stream_blocks(pattern, text_length, grid)
    return blocks if blocks.scores <= (1 - LEAST_SAVED) * masked_scores(text_length + grid**2) else None


def rotary_angles(grid: int, size: int, share: float = 1.0) -> Tensor:
    """(N, size / 2): how far pairs of numbers of a head of `size` turn for each place of the grid.

    The first half turns with the row and the second with the column, at speeds from 1 down to 1/32 of a radian a step
    (Su et al., "RoFormer", 2021, on two axes), so that the product of a query and a key depends on how far apart their
    places are. With a `share` below 1 so many of the pairs do, and the others, which come last, do not turn (Black et
    al., "GPT-NeoX-20B", 2022): what is matched by them is matched from every place alike.
    """
    speeds = torch.logspace(0, -1.5, max(1, round(share * (size // 4))))
    row, column = torch.arange(grid**2).div(grid, rounding_mode="floor"), torch.arange(grid**2) % grid
    angles = torch.cat([row[:, None] * speeds, column[:, None] * speeds], 1)
    return F.pad(angles, (0, size // 2 - angles.shape[1]))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (x_i, x_(i + E/2)) by angles (..., E/2), which go with the last but one dimension of x (..., L, E)."""
    return _Turn.apply(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


class _Turn(torch.autograd.Function):
    """Its gradient turns back, and needs nothing of x."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by the cosines and sines of the angles, without a gradient."""
    a, b = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


class ImageKeys:
    """Where one layer keeps the keys of the image tokens while drawing, and which of them token j sees.

    A sparse layer keeps only what can still be seen: the last S+1 tokens for row, the last 5S+6 for
    convolutional (both as a ring), all of them, column by column, for column. With `everything` the first two keep all
    as well, so that tokens may be put in ahead of their time and again as others; what a token sees then comes in the
    order that the ring has it in, for the same sums.
    """

    def __init__(self, pattern: str, grid: int, everything: bool = False):
        check_pattern(pattern)
        self.pattern, self.grid = pattern, grid
        n = grid**2
        self.ring = {"row": min(n, grid + 1), "convolutional": min(n, CONV_REACH * (grid + 1) + 1)}.get(pattern, n)
        self.size = n if everything else self.ring

    def slot(self, j: int) -> int:
        """The slot that token j's key is written to."""
        if self.pattern == "column":
            return (j % self.grid) * self.grid + j // self.grid
        return j % self.size

    def visible(self, j: int) -> slice | Tensor:
        """The slots that token j attends to, its own among them; their order does not matter to attention."""
        if self.pattern == "column":
            start = (j % self.grid) * self.grid
            return slice(start, start + j // self.grid + 1)
        keys = torch.arange(max(0, j + 1 - self.ring), j + 1)
        if self.pattern == "convolutional":
            keys = keys[sees(self.pattern, torch.tensor(j), keys, self.grid)]
        if len(keys) == j + 1:
            return slice(0, j + 1)
        if len(keys) == self.ring:
            return slice(0, self.ring) if self.size == self.ring else keys[(keys % self.ring).argsort()]
        return keys % self.size
