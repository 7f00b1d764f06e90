"""The ranker: CLIP on the same captioned images (paper, section 2.6; Radford et al., 2021), and its captioner."""

import functools
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from armchair.clip.contrast import contrastive_loss, retrieval_ranks, same_captions, sigmoid_loss
from armchair.clip.model import CLIP
from armchair.clip.negatives import NearMisses
from armchair.data.loader import all_captions, batches, caption_choices
from armchair.data.sources import DataConfig, Source
from armchair.errors import RequestError, WorkError
from armchair.image.pixels import BrokenSample, square, stack, to_pil
from armchair.image.sheet import contact_sheet
from armchair.runtime import stream_seed
from armchair.text.bpe import TextTokenizer
from armchair.train.recipe import RankerTraining, Recipe

DISTRACTORS = 100  # captions that a picture's own is found among, in validation
SHEET_COLUMNS = 8


class Pairs(NamedTuple):
    """Held-out pictures with a caption each."""

    images: Tensor  # (B, 3, R, R) in [0, 1]
    captions: list[str]


def fixed_pairs(source: Source, count: int, data: DataConfig) -> Pairs:
    """The first `count` readable pictures of a source as centre squares, each with its first caption."""
    images: list[np.ndarray] = []
    captions = []
    for i in range(len(source)):
        if len(images) == count:
            break
        try:
            sample = source[i]
            caption = caption_choices(source, i, sample, data)[0][0]
            images.append(square(sample.image, data.resolution))
            captions.append(caption)
        except BrokenSample:
            continue
    if len(images) < 2:
        raise WorkError("the ranker needs two held-out captioned pictures or more; give more in data.val")
    return Pairs(stack(images), captions)


class RankerStage:
    """What `armchair.train.loop.fit` needs to train a ranker."""

    name = "ranker"

    def __init__(
        self, recipe: Recipe, config: RankerTraining, model: CLIP, tokenizer: TextTokenizer, source: Source, val: Pairs
    ):
        self.recipe, self.config, self.model, self.source, self.val = recipe, config, model, source, val
        self.tokenizer = tokenizer

    @functools.cached_property
    def near_misses(self) -> NearMisses:
        """Reads every caption once, so only where there is something left to train."""
        captions = all_captions(self.source, self.recipe.text_tokenizer.captions) if self.config.near_misses else ()
        return NearMisses(self.config.near_misses, captions)

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Any, None, None]:
        """(images (B, 3, R, R), tokens (B, L), same (B, B), false tokens (B, M, L) or None) from `start_step` on."""
        if world > 1:
            raise RequestError("each caption is told from all others of the batch: train the ranker in one process")
        seed = self.recipe.seed
        found = batches(
            self.source,
            self.recipe.data,
            batch_size=self.config.batch_size,
            seed=stream_seed(seed, self.name),
            start_step=start_step,
        )
        try:
            for step, (images, captions) in enumerate(found, start=start_step):
                rng = np.random.Generator(np.random.PCG64(stream_seed(seed, "ranker captions", step)))
                yield images, self._tokens(captions, rng), same_captions(captions), self._false_tokens(captions, rng)
        finally:
            found.close()

    def parts(self, batch: Any, count: int) -> list[Any]:
        device = self.model.log_scale.device
        return [tuple(None if x is None else x.to(device) for x in batch)]

    def loss(self, batch: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        images, tokens, same, false = batch
        model = self.model
        pictures, states = _seen(model, images)
        texts = model.encode_text(tokens)
        wrong = None if false is None else model.encode_text(false.flatten(0, 1)).unflatten(0, false.shape[:2])
        loss = self._loss(model, pictures, texts, same, wrong)
        told: dict[str, Tensor | float] = {"scale": model.scale.detach()}
        if model.captioner is not None and states is not None:
            log_p, counts = model.captioner(states, tokens)
            captioning = -log_p.sum() / counts.sum()
            loss = loss + self.config.captioning_weight * captioning
            told["caption_bits"] = captioning.detach() / math.log(2)
        return loss, told

    def _loss(self, model: CLIP, pictures: Tensor, texts: Tensor, same: Tensor, wrong: Tensor | None = None) -> Tensor:
        if self.config.loss == "sigmoid":
            return sigmoid_loss(pictures, texts, model.scale, model.bias, same, wrong)
        return contrastive_loss(pictures, texts, model.scale, same, wrong)

    @torch.inference_mode()
    def validate(self, model: Any) -> dict[str, float]:
        """On held-out pairs: the contrastive loss of one batch after the other; how often a picture's own caption comes
        first, or among the first 5 and 10, of 101; and how often it is preferred to one that is nearly right. All of
        that by the cosine; where there is a captioner also its bits a token of the captions, and how often it, and the
        score of both, prefers the caption that is right."""
        device = model.log_scale.device
        images, tokens = self.val.images.to(device), self._tokens(self.val.captions).to(device)
        seen = [_seen(model, chunk) for chunk in images.split(64)]
        pictures = torch.cat([embedded for embedded, _ in seen])
        texts = torch.cat([model.encode_text(chunk) for chunk in tokens.split(64)])
        same = same_captions(self.val.captions).to(device)
        size = min(self.config.batch_size, len(images))
        losses = []
        for start in range(0, len(images) - size + 1, size):
            rows = slice(start, start + size)
            losses.append(float(self._loss(model, pictures[rows], texts[rows], same[rows, rows])))
        ranks = retrieval_ranks(pictures, texts, same, DISTRACTORS)
        figures = {"loss": float(np.mean(losses))}
        figures |= {f"recall_{k}": float((ranks < k).float().mean()) for k in (1, 5, 10)}
        rng = np.random.Generator(np.random.PCG64(stream_seed(self.recipe.seed, "ranker validation")))
        misses = [self.near_misses.of(caption, rng) for caption in self.val.captions]
        if able := [i for i, miss in enumerate(misses) if miss is not None]:
            false_tokens = self._tokens([misses[i] or "" for i in able]).to(device)
            false = model.encode_text(false_tokens)
            own, other = (pictures[able] * texts[able]).sum(1), (pictures[able] * false).sum(1)
            figures["near_misses_told"] = float((own > other).float().mean())
        if model.captioner is None:
            return figures
        states = torch.cat([states for _, states in seen if states is not None])
        bits, counts = _caption_bits(model, states, tokens)
        figures["caption_bits"] = float(bits.sum() / counts.sum())
        if able:
            false_bits, false_counts = _caption_bits(model, states[able], false_tokens)
            gain = false_bits / false_counts - (bits / counts)[able]
            figures["near_misses_told_captioner"] = float((gain > 0).float().mean())
            figures["near_misses_told_score"] = float((own - other + model.caption_weight * gain > 0).float().mean())
        return figures

    @torch.inference_mode()
    def sheet(self, model: Any) -> Image.Image | None:
        """For each of the recipe's prompts the held-out pictures that lie nearest to it, the nearest first."""
        prompts = self.recipe.drawing.prompts
        if not prompts:
            return None
        device = model.log_scale.device
        pictures = torch.cat([model.encode_images(chunk.to(device)) for chunk in self.val.images.split(64)])
        scores = model.encode_text(self._tokens(prompts).to(device)) @ pictures.T
        columns = min(SHEET_COLUMNS, len(pictures))
        best = scores.topk(columns, dim=1)
        images = [to_pil(self.val.images[i : i + 1])[0] for row in best.indices.tolist() for i in row]
        labels = [
            f"{prompt} {value:.2f}" if column == 0 else f"{value:.2f}"
            for prompt, row in zip(prompts, best.values.tolist(), strict=True)
            for column, value in enumerate(row)
        ]
        return contact_sheet(images, labels, columns=columns, scale=1)

    def _tokens(self, captions: Sequence[str], rng: np.random.Generator | None = None) -> Tensor:
        """(B, L); BPE dropout where `rng` is given."""
        config = self.recipe.text_tokenizer
        dropout = config.dropout if rng is not None else 0.0
        tokens = self.tokenizer.encode(
            captions, config.length, dropout=dropout, rng=rng, warn=not self.tokenizer.cut_count
        )
        return self.model.shape.with_end(torch.from_numpy(tokens))

    def _false_tokens(self, captions: Sequence[str], rng: np.random.Generator) -> Tensor | None:
        """(B, M, L); a caption of which nothing nearly right can be made gets another picture's."""
        if not self.near_misses.kinds:
            return None
        count = self.config.near_miss_count
        false = [
            self.near_misses.of(caption, rng) or captions[(i + 1) % len(captions)]
            for i, caption in enumerate(captions)
            for _ in range(count)
        ]
        return self._tokens(false, rng).unflatten(0, (-1, count))


def _seen(model: CLIP, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, 3, R, R) -> where pictures lie, (B, E), and the states that a captioner looks at, where there is one."""
    if model.captioner is None:
        return model.encode_images(images), None
    states = model.image_states(images)
    return model.encode_states(states), states


def _caption_bits(model: CLIP, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """-log2 p of captions, given what is seen of their pictures, and how many tokens they have: (B,) each."""
    assert model.captioner is not None
    found = [model.captioner(seen, said) for seen, said in zip(states.split(64), tokens.split(64), strict=True)]
    bits = torch.cat([-log_p.sum(1) for log_p, _ in found]) / math.log(2)
    return bits, torch.cat([counts for _, counts in found])
