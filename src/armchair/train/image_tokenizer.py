"""Stage 1: the image tokenizer on images, and the check of its codes before stage 2 (paper, section 2.1)."""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from armchair.data.loader import batches
from armchair.data.sources import Source
from armchair.errors import RequestError, WorkError
from armchair.image.autoencoder import Autoencoder, varied_crops
from armchair.image.network import ImageTokenizer, negative_log_likelihood
from armchair.image.pixels import square, stack, to_pil
from armchair.image.sheet import contact_sheet
from armchair.image.tokenizer import ImageTokenizerConfig
from armchair.runtime import generator, stream_seed
from armchair.train.optim import cosine
from armchair.train.perceptual import Perceptual, mean_pictures
from armchair.train.recipe import (
    AutoencoderTraining,
    DecoderTraining,
    DVAETraining,
    FitConfig,
    ImageTokenizerTraining,
    Recipe,
)


class CodeFigures(NamedTuple):
    """How well codes serve, over a set of images."""

    psnr: float  # dB, median over the images, of the round trip through the codes
    usage: float  # share of the codebook that occurs
    perplexity: float  # exp of the entropy of how often each code occurs


@torch.inference_mode()
def code_figures(model: ImageTokenizer, images: Tensor, batch_size: int = 64) -> CodeFigures:
    """images: (B, 3, R, R) in [0, 1]."""
    counts = torch.zeros(model.codebook_size, device=images.device)
    ratios = []
    for chunk in images.split(batch_size):
        codes = model.encode(chunk)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        ratios.append(psnr(model.decode(codes).float(), chunk))
    p = counts / counts.sum()
    entropy = -(p * p.clamp_min(1e-12).log()).sum()
    return CodeFigures(float(torch.cat(ratios).median()), float((counts > 0).float().mean()), math.exp(float(entropy)))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images in [0, 1], (B, 3, R, R) -> (B,), in dB; at most 100."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


class ImageStage:
    """What the stages that learn from pictures alone share: their batches."""

    name: str
    model: nn.Module

    def __init__(self, recipe: Recipe, config: FitConfig, source: Source, validation: Tensor, order_seed: int):
        self.recipe, self.config, self.source, self.order_seed = recipe, config, source, order_seed
        self.validation = validation  # (B, 3, R, R)

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Any, None, None]:
        return batches(
            self.source,
            self.recipe.data,
            batch_size=self.config.batch_size,
            seed=self.order_seed,
            start_step=start_step,
            rank=rank,
            world=world,
        )

    def parts(self, batch: Any, count: int) -> list[Any]:
        device = next(self.model.parameters()).device
        return [images.to(device) for images in batch[0].chunk(count)]


class RoundTripStage(ImageStage):
    """What the stages that train an image tokenizer share: the perceptual term, figures and sheets of round trips.

    Raises RequestError where the recipe asks for the perceptual term and the packages that it needs are missing.
    """

    config: ImageTokenizerTraining | DecoderTraining
    model: ImageTokenizer

    def __init__(
        self,
        recipe: Recipe,
        config: ImageTokenizerTraining | DecoderTraining,
        model: ImageTokenizer,
        source: Source,
        validation: Tensor,
        order_seed: int,
    ):
        super().__init__(recipe, config, source, validation, order_seed)
        self.model = model
        self.perceptual = Perceptual() if self.config.perceptual_weight else None

    def crops(self, batch: Tensor, step: int, part: int) -> Tensor:
        """What is looked at of a part of a batch, where the recipe has crops."""
        where = generator(self.recipe.seed, self.name, "crops", step, part, device=batch.device)
        return varied_crops(batch, self.config.crop, self.model.config.factor, where)

    def with_perceptual(
        self, loss: Tensor, figures: dict[str, Tensor], images: Tensor, mu: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss with the perceptual term, if any, and the figures with it. mu: of the density for `images`."""
        found: dict[str, Tensor | float] = {name: figure.detach() for name, figure in figures.items()}
        if self.perceptual is not None:
            distance = self.perceptual(images, mean_pictures(mu))
            loss, found["perceptual"] = loss + self.config.perceptual_weight * distance, distance.detach()
        return loss, found

    @torch.inference_mode()
    def validate(self, model: Any) -> dict[str, float]:
        """Round-trip figures, and bounds, in nats per pixel-channel (paper, appendix A.2).

        The hard bound is that of the codes as they are used: its KL to the uniform prior is ln K, as the choice has no
        entropy. A dVAE has the relaxed bound too, the trained one at tau's end.
        """
        images = self.validation.to(next(model.parameters()).device)
        positions = 3 * model.config.factor**2
        relaxed, hard = [], []
        for i, chunk in enumerate(images.split(64)):
            if isinstance(self.config, DVAETraining):
                noise = generator(self.recipe.seed, "validation", i, device=images.device)
                r = model.relaxed_loss(chunk, self.config.tau_end, 0.0, noise)
                relaxed.append((float(r.reconstruction) + float(r.kl) / positions) * len(chunk))
            hard.append(float(model.hard_loss(chunk, model.encode(chunk))) * len(chunk))
        figures = code_figures(model, images)
        hard_mean = sum(hard) / len(images)
        return {
            "loss": hard_mean,
            **figures._asdict(),
            **({"elbo_relaxed": -sum(relaxed) / len(images)} if relaxed else {}),
            "elbo_hard": -hard_mean - math.log(model.codebook_size) / positions,
        }

    @torch.inference_mode()
    def sheet(self, model: Any) -> Image.Image:
        """Sixteen held-out images, each above its round trip through the codes."""
        images = self.validation[:16].to(next(model.parameters()).device)
        return round_trips(images, model.decode(model.encode(images)))


class ImageTokenizerStage(RoundTripStage):
    """What `armchair.train.loop.fit` needs to train an image tokenizer."""

    name = "image_tokenizer"
    config: ImageTokenizerTraining

    def __init__(self, recipe: Recipe, model: ImageTokenizer, source: Source, validation: Tensor):
        super().__init__(recipe, recipe.image_tokenizer_training, model, source, validation, recipe.seed)
        self.seen: dict[int, tuple[Tensor, ...]] = {}  # by part of the batch, until the update is done
        if self.config.encoder_scale == 0:  # what does not learn needs no gradients, nor a share of their norm
            for name, p in model.named_parameters():
                if name.startswith(model.encoder_parts):
                    p.requires_grad_(False)

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Any, None, None]:
        if world > 1 and type(self.model).after_update is not ImageTokenizer.after_update:
            raise RequestError(f"a codebook of kind {self.model.config.kind} is moved by the whole batch: train the "
                               "image tokenizer in one process")  # fmt: skip
        return super().batches(start_step, rank, world)

    def settings(self, step: int) -> dict[str, float]:
        """What the schedules say at a step: temperature and KL weight of a dVAE; nothing for other kinds."""
        c = self.config
        if not isinstance(c, DVAETraining):
            return {}
        return {
            "tau": cosine(step, c.tau_steps, c.tau_start, c.tau_end),
            "kl_weight": cosine(step, c.kl_steps, c.kl_start, c.kl_weight),
        }

    def loss(self, batch: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = self.crops(batch, step, part)
        noise = generator(self.recipe.seed, self.name, step, part, device=batch.device)
        settings = self.settings(step)
        done = self.model.training_pass(batch, noise, settings)
        if done.seen:
            self.seen[part] = done.seen
        loss, figures = self.with_perceptual(done.loss, done.figures, batch, done.mu)
        return loss, {**figures, **settings}

    def after_update(self, step: int) -> None:
        """Let the tokenizer learn from what its codes were chosen for, all parts of the batch at once."""
        if not self.seen:
            return
        seen = [torch.cat(parts) for parts in zip(*(self.seen[part] for part in sorted(self.seen)), strict=True)]
        self.seen.clear()
        noise = generator(self.recipe.seed, self.name, "codebook", step, device=seen[0].device)
        self.model.after_update(seen, noise)


class DecoderStage(RoundTripStage):
    """What `armchair.train.loop.fit` needs to train a decoder on, with the codes as they are.

    All but the decoder's network keeps every bit: the codes of pictures, and their vectors, which a prior may have been
    trained on. The decoder sees the codes that it is given in use, which a dVAE's does not in stage 1.
    """

    name = "decoder"
    config: DecoderTraining

    def __init__(
        self, recipe: Recipe, config: DecoderTraining, model: ImageTokenizer, source: Source, validation: Tensor
    ):
        # Another order than stage 1 went through.
        super().__init__(recipe, config, model, source, validation, stream_seed(recipe.seed, self.name))
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("decoder."))

    def loss(self, batch: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = self.crops(batch, step, part)
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):  # the codes that stage 2 will see
            codes = self.model.codes_of(self.model.features(batch))
        mu, log_b = self.model.density(self.model.latent(codes))
        reconstruction = negative_log_likelihood(batch, mu, log_b)
        return self.with_perceptual(reconstruction, {"reconstruction": reconstruction}, batch, mu)


class AutoencoderStage(ImageStage):
    """What `armchair.train.loop.fit` needs for the start of a dVAE."""

    name = "autoencoder"
    model: Autoencoder

    def __init__(
        self, recipe: Recipe, config: AutoencoderTraining, model: Autoencoder, source: Source, validation: Tensor
    ):
        # Another order than the dVAE goes through afterwards.
        super().__init__(recipe, config, source, validation, stream_seed(recipe.seed, self.name))
        self.model = model

    def loss(self, batch: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        crops = self.model.crops(
            batch, generator(self.recipe.seed, self.name, "crops", step, part, device=batch.device)
        )
        noise = generator(self.recipe.seed, self.name, step, part, device=batch.device)
        return self.model.loss(crops, noise), {}

    def _validation_crops(self, model: Any) -> Tensor:
        crops = model.crops(self.validation, generator(self.recipe.seed, "validation", "crops"))
        return crops.to(next(model.parameters()).device)

    @torch.inference_mode()
    def validate(self, model: Any) -> dict[str, float]:
        images = self._validation_crops(model)
        noise = generator(self.recipe.seed, "validation", device=images.device)
        losses, ratios = [], []
        for chunk in images.split(64):
            losses.append(float(model.loss(chunk, noise)) * len(chunk))
            ratios.append(psnr(model.reconstruct(chunk).float(), chunk))
        return {"loss": sum(losses) / len(images), "psnr": float(torch.cat(ratios).median())}

    @torch.inference_mode()
    def sheet(self, model: Any) -> Image.Image:
        """Sixteen held-out images, each above its round trip through the numbers."""
        images = self._validation_crops(model)[:64]  # enough for the statistics of a batch
        return round_trips(images[:16], model.reconstruct(images)[:16])


def round_trips(images: Tensor, again: Tensor) -> Image.Image:
    """A sheet with each of `images` above what came `again`; both (B, 3, R, R) in [0, 1]."""
    columns = min(8, len(images))
    ordered = []
    for above, below in zip(images.split(columns), again.float().split(columns), strict=True):
        ordered += to_pil(above) + to_pil(below)
    return contact_sheet(ordered, None, columns=columns, scale=2)


# What to turn where codes collapse, by kind of image tokenizer.
COLLAPSE_REMEDIES = {
    "dvae": "lower image_tokenizer_training.kl_weight (now {training.kl_weight}) or lr (now {training.lr}), or give "
    "the run a start with autoencoder_training",
    "vq": "raise image_tokenizer.reseed (now {config.reseed}), or lower image_tokenizer.code_channels (now "
    "{config.code_channels}) or image_tokenizer_training.lr (now {training.lr})",
    "fsq": "lower image_tokenizer_training.lr (now {training.lr}), or spread the codes over more channels with fewer "
    "image_tokenizer.levels each",
}


def check_codes(figures: CodeFigures, training: ImageTokenizerTraining, config: ImageTokenizerConfig) -> None:
    """Raises WorkError, naming the knob to turn, for codes that no prior could draw good pictures from."""
    if figures.usage < training.min_usage or figures.perplexity < 2:
        remedy = COLLAPSE_REMEDIES[config.kind].format(training=training, config=config)
        raise WorkError(
            f"the codebook collapsed: {figures.usage:.1%} of {config.codebook_size} codes are used, perplexity "
            f"{figures.perplexity:.1f}; {remedy}"
        )
    if figures.psnr < training.min_psnr:
        raise WorkError(
            f"the round trip through the codes has {figures.psnr:.1f} dB, less than "
            f"image_tokenizer_training.min_psnr {training.min_psnr}; train longer (steps, now {training.steps}) or "
            f"use a finer grid (image_tokenizer.patch or n_groups)"
        )


def fixed_images(source: Source, count: int, resolution: int) -> Tensor:
    """The first `count` readable images of a source as centre squares, (B, 3, R, R)."""
    from armchair.image.pixels import BrokenSample

    found: list[np.ndarray] = []
    for i in range(len(source)):
        if len(found) == count:
            break
        try:
            found.append(square(source[i].image, resolution))
        except BrokenSample:
            continue
    if not found:
        raise WorkError("the validation data has no readable image")
    return stack(found)
