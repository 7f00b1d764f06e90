"""Stage 2: the transformer over text and image tokens, on codes computed ahead (paper, section 2.2)."""

import itertools
import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from armchair.data.loader import Order, draw_caption, share_of_batch
from armchair.data.token_cache import TokenCache
from armchair.image.network import ImageTokenizer
from armchair.image.pixels import to_pil
from armchair.image.sheet import contact_sheet
from armchair.prior.sequence import stream_loss_of_states
from armchair.prior.thinning import Thinned, thinned
from armchair.prior.transformer import Dropout, Prior, lookalikes
from armchair.runtime import generator, stream_seed
from armchair.sample.engine import Engine, default_weights
from armchair.sample.generate import candidate_uniforms, draw_codes
from armchair.sample.next_token import Settings
from armchair.shapes.accuracy import Accuracy, judge
from armchair.shapes.captions import prompts
from armchair.shapes.world import COUNTS
from armchair.text.bpe import TextTokenizer
from armchair.train.recipe import Recipe

logger = logging.getLogger(__name__)

SHEET_CANDIDATES = 4
ACCURACIES = {"val": "accuracy", "held-form-colour": "accuracy_held"}  # of splits of the shapes world
LOOKALIKES = 6  # codes that one can be taken for, under `code_noise`


class PriorStage:
    """What `armchair.train.loop.fit` needs to train a prior."""

    name = "prior"

    def __init__(
        self,
        recipe: Recipe,
        model: Prior,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        cache: TokenCache,
        validation: TokenCache,
    ):
        self.recipe, self.model, self.config = recipe, model, recipe.prior_training
        self.text_tokenizer, self.image_tokenizer = text_tokenizer, image_tokenizer
        self.cache, self.validation = cache, validation
        equal = bool((cache.weights == cache.weights[0]).all())
        self.order = Order(len(cache) if equal else cache.weights, recipe.seed)
        self.lookalikes = lookalikes(image_tokenizer.code_vectors, LOOKALIKES) if self.config.code_noise else None

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Any, None, None]:
        """(text tokens (B / world, T), codes (B / world, N)) from `start_step` on."""
        mine = share_of_batch(self.config.batch_size, rank, world)
        for step in itertools.count(start_step):
            yield tuple(x[mine] for x in self._batch(step))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        size, config = self.config.batch_size, self.recipe.text_tokenizer
        rng = np.random.Generator(np.random.PCG64(stream_seed(self.recipe.seed, "captions", step)))
        images = self.order.indices(step * size, size)
        codes = self.cache.codes(images, rng.integers(self.cache.views, size=size))
        captions = [draw_caption(self.cache.captions[i], rng) for i in images]
        # Cut captions are said once a run, not in every batch.
        tokens = self.text_tokenizer.encode(
            captions, config.length, dropout=config.dropout, rng=rng, warn=not self.text_tokenizer.cut_count
        )
        tokens[rng.random(size) < self.config.caption_dropout] = self.text_tokenizer.pad_id
        return torch.from_numpy(tokens), codes

    def parts(self, batch: Any, count: int) -> list[Any]:
        text, codes = (x.to(self.model.device).chunk(count) for x in batch)
        return list(zip(text, codes, strict=True))

    def loss(self, batch: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        text, codes = batch
        part_of = self._thinned(codes, step, part)
        places, weights = (None, None) if part_of is None else part_of
        states = self.model.states(text, codes, self._dropout(step, part, codes.device), places=places)
        targets = codes if places is None else codes.gather(1, places)
        weight, smoothing = self.config.text_weight, self.config.label_smoothing
        loss = stream_loss_of_states(states, self.model.heads(), text, targets, weight, smoothing, weights)
        return loss.loss, _figures(loss.text.detach(), loss.image.detach())

    def _thinned(self, codes: Tensor, step: int, part: int) -> Thinned | None:
        """The part of the pictures (B, N) that an update looks at; none: all."""
        config, shape = self.config, self.model.shape
        if step >= round(config.thinned * config.steps):
            return None
        own = generator(self.recipe.seed, self.name, "thinned", step, part, device=codes.device)
        return thinned(codes, shape.grid, min(config.thinned_codes, shape.image_length), own)

    def _dropout(self, step: int, part: int, device: torch.device) -> Dropout | None:
        config = self.config
        if not (config.dropout or config.code_dropout or config.code_noise):
            return None
        own = generator(self.recipe.seed, self.name, "dropout", step, part, device=device)
        return Dropout(
            features=config.dropout,
            codes=config.code_dropout,
            noise=config.code_noise,
            lookalikes=None if self.lookalikes is None else self.lookalikes.to(device),
            generator=own,
        )

    @torch.inference_mode()
    def validate(self, model: Any) -> dict[str, float]:
        """Cross-entropies on held-out pairs, whole captions, neither dropout nor smoothing."""
        device = model.device
        count = min(len(self.validation), 512)
        sums = np.zeros(3)
        for start in range(0, count, 64):
            images = np.arange(start, min(start + 64, count))
            codes = self.validation.codes(images, np.zeros_like(images)).to(device)
            captions = [self.validation.captions[i][0][0] for i in images]
            tokens = self.text_tokenizer.encode(captions, self.recipe.text_tokenizer.length)
            text = torch.from_numpy(tokens).to(device)
            states = model.states(text, codes)
            loss = stream_loss_of_states(states, model.heads(), text, codes, self.config.text_weight)
            sums += len(images) * np.array([float(part) for part in loss])
        loss_all, text_loss, image_loss = sums / count
        figures = {"loss": float(loss_all), **_figures(float(text_loss), float(image_loss))}
        if self.config.accuracy_prompts:
            for split, name in ACCURACIES.items():
                for objects in COUNTS[split]:
                    figures[f"{name}_{objects}"] = self._prompt_accuracy(model, split, objects)
        return figures

    def _prompt_accuracy(self, model: Any, split: str, objects: int) -> float:
        """Share of drawings of a split's prompts of the shapes world that show all that was asked for."""
        wanted = prompts(self.config.accuracy_prompts, split=split, objects=objects)
        uniforms = candidate_uniforms(0, range(len(wanted)), model.shape.image_length)
        _, images = self._draw(model, [p.text for p in wanted], uniforms)
        return Accuracy.of(judge(p, image) for p, image in zip(wanted, images, strict=True)).whole

    @torch.inference_mode()
    def sheet(self, model: Any) -> Image.Image | None:
        """The recipe's prompts, always with the same seeds. Warns when the pictures hold suspiciously few codes."""
        if not self.recipe.drawing.prompts:
            return None
        texts = [p for p in self.recipe.drawing.prompts for _ in range(SHEET_CANDIDATES)]
        uniforms = candidate_uniforms(0, range(SHEET_CANDIDATES), model.shape.image_length)
        codes, images = self._draw(model, texts, uniforms.repeat(len(texts) // SHEET_CANDIDATES, 1))
        self._warn_of_collapse(codes)
        labels = [text if i % SHEET_CANDIDATES == 0 else "" for i, text in enumerate(texts)]
        return contact_sheet(images, labels, columns=2 * SHEET_CANDIDATES, scale=2)

    def _draw(self, model: Any, texts: Sequence[str], uniforms: Tensor) -> tuple[Tensor, list[Image.Image]]:
        """One picture a text, with the recipe's settings: its codes (len(texts), N), and itself."""
        drawing = self.recipe.drawing
        settings = Settings(**{field.name: getattr(drawing, field.name) for field in fields(Settings)})
        different = list(dict.fromkeys(texts))  # a text is read once for all of its pictures
        tokens = torch.from_numpy(self.text_tokenizer.encode(different, self.recipe.text_tokenizer.length))
        device = next(self.image_tokenizer.parameters()).device
        with torch.autocast(device.type, enabled=False):  # as a bundle draws, and its engine has precisions of its own
            decoder = Engine(model.folded(), default_weights(model.config)) if device.type == "cpu" else model
            codes = draw_codes(decoder, tokens, [different.index(t) for t in texts], uniforms, settings)
            images = [self.image_tokenizer.decode(chunk.to(device)).float() for chunk in codes.split(64)]
        return codes, [image for chunk in images for image in to_pil(chunk)]

    def _warn_of_collapse(self, codes: Tensor) -> None:
        drawn = float(np.median([len(c.unique()) for c in codes]))
        count = min(64, len(self.cache))
        real = self.cache.codes(np.arange(count), np.zeros(count, dtype=np.int64))
        usual = float(np.median([len(c.unique()) for c in real]))
        if drawn < min(self.config.collapse_codes, usual / 2):
            logger.warning(
                "the drawings hold %.0f distinct codes each, real pictures %.0f: the prior has collapsed or has "
                "only just begun; look at the sheet", drawn, usual,
            )  # fmt: skip


def _figures(text: Any, image: Any) -> dict[str, Any]:
    bit = math.log(2)
    return {"loss_text": text, "loss_image": image, "bits_text": text / bit, "bits_image": image / bit}
