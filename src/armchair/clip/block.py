"""What the transformers of both towers and of the captioner are made of (Radford et al., 2021, section 2.4).

Legend: B batch, H heads, T positions, M positions that are looked at, D width, E size of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.attention import attend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # of the released models
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(_attended(q, k, v, causal))


class CrossAttention(nn.Module):
    """Attention to another sequence, all of it, of `seen_width` numbers a position."""

    def __init__(self, width: int, heads: int, seen_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(seen_width, width), nn.Linear(seen_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x: (B, T, D), seen: (B, M, seen_width) -> (B, T, D)."""
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        return self.out(_attended(q, k, v, causal=False))


def _attended(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q: (B, H, T, E), k and v: (B, H, M, E) -> (B, T, H * E)."""
    if q.requires_grad and q.device.type == "cpu":  # in training, where the fused kernel is slow
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        a = attend(q, k, v, mask.tril() if causal else mask, causal)
    else:
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return a.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attention(self.attention_norm(x), causal)
        return x + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))
