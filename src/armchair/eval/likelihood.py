"""How well the prior predicts captions and codes it has not seen, and those that it has."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.eval.figures import Cell, Figure, Section, Table, bootstrap, mean_figure
from armchair.eval.pairs import Context, Pairs
from armchair.sample.generate import read_prompts
from armchair.sample.pipeline import Artist

BATCH = 32
LN2 = float(np.log(2))


def likelihood(context: Context) -> Section:
    held_text, held_image = _bits(context, context.held_out)
    rows: list[tuple[Cell, ...]] = [("held out", mean_figure(held_text), mean_figure(held_image))]
    note = "Give --train for the same on what the model learned from: the gap between the two is its overfitting."
    if context.train is not None:
        seen_text, seen_image = _bits(context, context.train)
        rows.append(("training", mean_figure(seen_text), mean_figure(seen_image)))
        rows.append(("gap", _gap(held_text, seen_text), _gap(held_image, seen_image)))
        note = "The gap, held out less training, is the overfitting."
    length, count = context.artist.prior.shape.image_length, len(context.held_out)
    return Section(
        key="likelihood",
        title="Likelihood",
        protocol=(
            f"-log2 p a token, float32, a mean over the tokens of a picture ({length} codes; text positions up to the "
            f"caption's length, pads counted, as in training) and then over {count} pictures with their first caption. "
            f"{note}"
        ),
        tables=[Table(title="Bits a token", columns=("", "bits a text token", "bits an image token"), rows=rows)],
    )


def _bits(context: Context, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    codes = context.artist.encode(context.pil(pairs.images))
    text, image = token_nats(context.artist, pairs.captions, codes)
    return text.mean(1).cpu().numpy() / LN2, image.mean(1).cpu().numpy() / LN2


@torch.inference_mode()
def token_nats(artist: Artist, captions: Sequence[str], codes: np.ndarray) -> tuple[Tensor, Tensor]:
    """-ln p of each text token, (B, T), and of each code, (B, N), of pictures with codes (B, S, S)."""
    prior = artist.prior
    tokens = torch.from_numpy(artist.text_tokenizer.encode(captions, prior.shape.text_length)).to(artist.device)
    grids = torch.from_numpy(codes).flatten(1).to(artist.device)
    text: list[Tensor] = []
    image: list[Tensor] = []
    for t, c in zip(tokens.split(BATCH), grids.split(BATCH), strict=True):
        text_logits, image_logits = prior(t, c)
        text.append(F.cross_entropy(text_logits.float().transpose(1, 2), t, reduction="none"))
        image.append(F.cross_entropy(image_logits.float().transpose(1, 2), c, reduction="none"))
    return torch.cat(text), torch.cat(image)


@torch.inference_mode()
def drawn_nats(artist: Artist, captions: Sequence[str], codes: np.ndarray, weights: str) -> Tensor:
    """-ln p of each code, (B, N), as it would be drawn: one after the other, with weights in that form."""
    decoder = artist.decoder(weights)
    tokens = torch.from_numpy(artist.text_tokenizer.encode(captions, decoder.shape.text_length)).to(artist.device)
    grids = torch.from_numpy(codes).flatten(1).to(artist.device)
    found: list[Tensor] = []
    for t, c in zip(tokens.split(BATCH), grids.split(BATCH), strict=True):
        prompts = read_prompts(decoder, t)
        cache = decoder.start(prompts)
        steps = [decoder.decode_step(c[:, j], j, cache) for j in range(c.shape[1] - 1)]
        logits = torch.stack([prompts.logits, *steps], 2)  # (B, K, N)
        found.append(F.cross_entropy(logits, c, reduction="none"))
    return torch.cat(found)


def _gap(a: np.ndarray, b: np.ndarray) -> Figure:
    rng = np.random.Generator(np.random.PCG64(1))

    def resampled(i: np.ndarray) -> float:
        return float(a[i].mean() - b[rng.integers(len(b), size=len(b))].mean())

    return Figure(value=float(a.mean() - b.mean()), interval=bootstrap(len(a), resampled), count=min(len(a), len(b)))
