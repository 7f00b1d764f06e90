"""A captioner: how likely a caption is of a picture, log p(caption | picture), word after word.

A causal transformer over the caption that looks at every state of the image tower, trained beside the contrastive loss
(Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", 2022). A cosine has one vector for all of a
picture and gets by on which words occur; to say the next word of "a red circle left of" one has to have seen which of
the two is where (Tschannen et al., "Image Captioners Are Scalable Vision Learners Too", 2023).

Legend: B batch, L text length, T the longest caption of the batch and its end, D width, M positions of a picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.clip.block import ACTIVATIONS, Attention, CrossAttention
from armchair.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """Sizes of the captioner, and what it counts in a score."""

    width: int | None = None  # none: that of the image tower
    layers: int = 6
    heads: int = 12
    weight: float = 1.0  # what a bit a token of log2 p(caption | picture) counts beside the cosine

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width is not None and self.width < 1:
            raise RequestError(f"width: expected at least 1, or null for that of the image tower, got {self.width}")
        if not self.weight >= 0:
            raise RequestError(f"weight: expected 0 or more, got {self.weight}")

    def width_over(self, image_width: int) -> int:
        """The width where that of the image tower is `image_width`."""
        return image_width if self.width is None else self.width


class CaptionBlock(nn.Module):
    """Pre-norm: attention to the words before, attention to the picture, and an MLP."""

    def __init__(self, width: int, heads: int, seen_width: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads, seen_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), causal=True)
        x = x + self.cross(self.cross_norm(x), seen)
        return x + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))


class Captioner(nn.Module):
    """Of `vocab_size` ids the last is the end, which fills a caption up to `length`; one more begins it.

    Starts as the prior does: words and positions N(0, 0.1²), hidden matrices N(0, 1/fan-in), projections back to the
    stream and the head zero, so that every token is as likely as any other and every block the identity.
    """

    def __init__(self, config: CaptionerConfig, *, length: int, vocab_size: int, seen_width: int, activation: str):
        super().__init__()
        width = config.width_over(seen_width)
        self.begin_id, self.end_id = vocab_size, vocab_size - 1
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            CaptionBlock(width, config.heads, seen_width, activation) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.1)
        into_stream = ("attention.out", "cross.out", "mlp_out", "head")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.0 if name.endswith(into_stream) else module.in_features**-0.5
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log p of each token of a caption after those before it, given the picture.

        seen: (B, M, the image tower's width); tokens: (B, L) with an end in each row. Gives (B, T) float32 in nats,
        zero after a caption's first end, and (B,) int64: how many tokens each caption has, its end among them.
        """
        counts = (tokens != self.end_id).long().cumprod(1).sum(1).clamp(max=tokens.shape[1] - 1) + 1
        longest = int(counts.max())  # attention is causal: nobody sees what comes after the longest caption
        said = tokens[:, :longest]
        x = self.embedding(F.pad(said[:, :-1], (1, 0), value=self.begin_id)) + self.position[:longest]
        for block in self.blocks:
            x = block(x, seen)
        logits = self.head(self.norm(x)).float()
        log_p = -F.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="none").view_as(said)
        there = torch.arange(longest, device=said.device) < counts[:, None]
        return log_p * there, counts
