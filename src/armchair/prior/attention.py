"""Which image token may look at which: row, column, convolutional and full (paper, section 2.2, figure 11).

Legend: S grid side, N = S*S image tokens in raster order, T text length. All patterns are causal, and every
image token sees the whole text. Image tokens are counted by raster index j = row * S + column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.config import nearest
from armchair.errors import RequestError

PATTERNS = ("full", "row", "column", "convolutional")
CONV_REACH = 5  # an 11 x 11 neighbourhood reaches 5 rows up and 5 columns to each side


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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over a whole stream. q, k, v: (B, H, L, E); mask: (L, L) bool, True where a key is seen.

    On a CPU and at the lengths of small grids the plain products take a third of the time that PyTorch's fused
    kernel takes forward and backward (13 against 42 ms at 64 x 4 heads x 96 x 64, bf16); past that length the
    (L, L) scores would dominate memory.
    """
    if q.device.type == "cpu" and q.shape[2] <= 512:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
        return scores.softmax(-1, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ImageKeys:
    """Where one layer keeps the keys of the image tokens while drawing, and which of them token j sees.

    A sparse layer keeps only what can still be seen: the last S+1 tokens for row, the last 5S+6 for
    convolutional (both as a ring), all of them, column by column, for column.
    """

    def __init__(self, pattern: str, grid: int):
        check_pattern(pattern)
        self.pattern, self.grid = pattern, grid
        n = grid**2
        self.size = {"row": min(n, grid + 1), "convolutional": min(n, CONV_REACH * (grid + 1) + 1)}.get(pattern, n)

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
        if self.pattern == "convolutional":
            keys = torch.arange(max(0, j + 1 - self.size), j + 1)
            keys = keys[sees(self.pattern, torch.tensor(j), keys, self.grid)]
            if len(keys) < min(j + 1, self.size):
                return keys % self.size
        return slice(0, min(j + 1, self.size))
