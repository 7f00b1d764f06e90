"""Losses that pull a picture and its caption together and push the other pairs of a batch apart.

Legend: B batch, E size of the shared space, M wrong captions a picture; all embeddings have length one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def same_captions(captions: Sequence[str]) -> Tensor:
    """(B, B) bool: which of B captions say the same. Two pictures of one caption are no mistake of each other."""
    numbers: dict[str, int] = {}
    kind = torch.tensor([numbers.setdefault(" ".join(c.lower().split()), len(numbers)) for c in captions])
    return kind[:, None] == kind


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, same: Tensor, wrong: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (Radford et al., 2021, figure 3), a mean in nats.

    images, texts: (B, E); same: (B, B) bool, the diagonal among it: targets are shared among captions that are the
    same. wrong: (B, M, E), captions that are false of their picture; each picture must prefer its own to all of them,
    those of the other pictures too (Yuksekgonul et al., "When and why vision-language models behave like
    bags-of-words", 2023).
    """
    targets = same.float() / same.sum(1, keepdim=True)
    logits = scale * images @ texts.T
    by_text = F.cross_entropy(logits.T, targets)
    if wrong is not None:
        logits = torch.cat([logits, scale * images @ wrong.flatten(0, 1).T], 1)
        targets = F.pad(targets, (0, wrong.shape[0] * wrong.shape[1]))
    return (F.cross_entropy(logits, targets) + by_text) / 2


def sigmoid_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, same: Tensor, wrong: Tensor | None = None
) -> Tensor:
    """Each pair judged by itself (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 1).

    Arguments as in `contrastive_loss`; a sum over the pairs of a picture, a mean over pictures, in nats. Wrong captions
    are paired with their own picture only.
    """
    logits = scale * images @ texts.T + bias
    loss = F.softplus(torch.where(same, -logits, logits)).sum()
    if wrong is not None:
        loss = loss + F.softplus(scale * torch.einsum("be,bme->bm", images, wrong) + bias).sum()
    return loss / len(images)


def retrieval_ranks(images: Tensor, texts: Tensor, same: Tensor, distractors: int = 100) -> Tensor:
    """Where each picture's own caption comes among `distractors` others, (B,) int64, 0 the best.

    images, texts: (B, E); same: (B, B) bool, the captions that are right for picture i too, and so no distractors of
    it. Those are the next ones after i, in a ring: the same in every run. Ties count against the picture.
    """
    scores = images @ texts.T
    own = scores.diagonal()
    ranks = torch.empty(len(images), dtype=torch.int64)
    for i in range(len(images)):
        ring = (torch.arange(1, len(images), device=scores.device) + i) % len(images)
        others = ring[~same[i, ring]][:distractors]
        ranks[i] = (scores[i, others] >= own[i]).sum()
    return ranks
