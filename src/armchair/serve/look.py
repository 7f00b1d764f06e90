"""Looking inside a picture: its codes, how likely the model finds each, and which words each came from.

Legend: S grid side, N = S*S codes, T text length, W words of the caption.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from armchair.errors import RequestError
from armchair.sample.pipeline import Artist

MAX_ALONE = 300  # distinct codes that are drawn alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """codes (S, S); bits (S, S): -log2 p of each code given the caption and the codes before it, in float32.

    attention (layers, N, W + 2): what the position that predicts a code takes of each word, then of the rest of the
    caption (its start and its padding), then of the codes before it; means over the heads, and rows sum to 1.
    `alone`: a picture of R x R pixels in which each cell shows what its code looks like by itself; None where there are
    too many to draw.
    """

    codes: np.ndarray
    bits: np.ndarray
    words: list[str]
    attention: np.ndarray
    alone: Image.Image | None


@torch.inference_mode()
def look_inside(artist: Artist, codes: np.ndarray, prompt: str) -> Look:
    """What the artist's prior makes of codes (S, S) and a caption, every code being given (teacher forcing).

    Raises RequestError for codes that are not of this artist's model.
    """
    s, k, t = artist.grid, artist.image_tokenizer.codebook_size, artist.shape.text_length
    codes = np.asarray(codes)
    if codes.shape != (s, s) or codes.min() < 0 or codes.max() >= k:
        raise RequestError(f"codes: expected {s} x {s} of 0 to {k - 1}, which the model {artist.id.name} has")
    tokens = artist.text_tokenizer.encode([prompt], t, warn=False)
    words = artist.text_tokenizer.words(prompt, t)
    layers: list[Tensor] = []

    def watch(layer: int, shares: Tensor) -> None:
        of_codes = shares[0].float().mean(0)[t:]  # (N, L): the positions that predict codes
        text = of_codes[:, 1 : t + 1]
        parts = [text[:, places].sum(1) for _, places in words]
        before = of_codes[:, t + 1 :].sum(1)
        rest = 1 - before - sum(parts, torch.zeros_like(before))
        layers.append(torch.stack([*parts, rest, before], 1).cpu())

    given = torch.from_numpy(codes.astype(np.int64)).to(artist.device).flatten()[None]
    _, logits = artist.prior(torch.from_numpy(tokens).to(artist.device), given, watch=watch)
    p = logits[0].float().log_softmax(1).gather(1, given[0, :, None])[:, 0]
    return Look(
        codes=codes,
        bits=(-p / math.log(2)).reshape(s, s).cpu().numpy(),
        words=[word for word, _ in words],
        attention=torch.stack(layers).numpy(),
        alone=_alone(artist, codes),
    )


def _alone(artist: Artist, codes: np.ndarray) -> Image.Image | None:
    """In each cell the middle of a picture that has its code everywhere."""
    distinct, where = np.unique(codes, return_inverse=True)
    if len(distinct) > MAX_ALONE:
        return None
    s, cell = artist.grid, artist.resolution // artist.grid
    middle = s // 2 * cell
    sheet = np.zeros((artist.resolution, artist.resolution, 3), np.uint8)
    pictures = artist.decode(np.broadcast_to(distinct[:, None, None], (len(distinct), s, s)))
    patches = [np.asarray(im)[middle : middle + cell, middle : middle + cell] for im in pictures]
    for place, index in enumerate(where.flatten()):
        y, x = place // s * cell, place % s * cell
        sheet[y : y + cell, x : x + cell] = patches[index]
    return Image.fromarray(sheet)
