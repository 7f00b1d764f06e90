"""A start for the dVAE: the same encoder and decoder, talking through a few noisy numbers instead of codes.

A dVAE that starts at random has to learn three things at once: what to say about a patch, how to draw from what
was said, and which of K codes says it; with a small budget most codes are never told apart. Here the first two
are learned without codes. A position's features go through C numbers, whitened and with Gaussian noise added,
which bounds what they carry to C / 2 * ln(1 + 1 / noise^2) nats as K codes bound it to ln K. Under noise, what is
said gathers in clusters; `quantise` finds K of them with k-means, and they become the codes of a dVAE that draws
nearly as well from its first update on. (A codebook that starts from k-means: Lancucki et al., "Robust Training of
Vector Quantized Bottleneck Models", 2020.)

Where most of a picture is plain, most of the work on it teaches nothing. So training may look at crops instead, taken
where pixels vary, and k-means counts what recurs by the root of how often it does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.image.clusters import distinct, kmeans
from armchair.image.dvae import DVAE
from armchair.image.network import unmap_pixels

WHITE_EPS = 1e-5


class Quantised(NamedTuple):
    """What k-means found."""

    error: float  # mean squared distance of a point to its centre, summed over the channels
    noise: float  # mean squared length of the noise that the decoder is used to


class Autoencoder(nn.Module):
    """`dvae` without its codes. Only the encoder, the decoder and the two maps between them are trained here.

    channels: numbers a position; noise: standard deviation of the noise, where the numbers have 1; crop: side of the
    crops that it is trained on, in pixels, a multiple of the dVAE's factor. None: whole pictures.
    """

    def __init__(self, dvae: DVAE, channels: int, noise: float, crop: int | None = None):
        super().__init__()
        self.noise, self.crop = noise, crop
        self.dvae = dvae
        for p in (dvae.codebook, *dvae.to_logits.parameters()):
            p.requires_grad_(False)
        self.down = nn.Linear(dvae.n_features, channels, bias=False)
        self.up = nn.Linear(channels, dvae.config.n_init)

    def crops(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What is looked at of images (B, 3, R, R) in [0, 1]: a crop of each, (B, 3, crop, crop), or all of it."""
        return varied_crops(images, self.crop, self.dvae.config.factor, generator)

    def numbers(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) in [0, 1] -> (B, S, S, C) float32; a channel has mean 0 and variance 1 in the batch.

        R is the side of the crops where there are any: the numbers of whole pictures have another mean and variance.
        """
        z = self.down(self.dvae.features(images)).float()
        return F.batch_norm(z.flatten(0, 2), None, None, training=True, eps=WHITE_EPS).view_as(z)

    def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """-log likelihood per pixel-channel, in nats, through the noisy channel."""
        z = self.numbers(images)
        noise = torch.empty_like(z).normal_(generator=generator)
        return self.dvae.reconstruction_loss(images, self.up(z + self.noise * noise))

    def reconstruct(self, images: Tensor) -> Tensor:
        """The round trip without noise, (B, 3, R, R) float in [0, 1]."""
        mu, _ = self.dvae.density(self.up(self.numbers(images)))
        return unmap_pixels(torch.sigmoid(mu))

    @torch.no_grad()
    def quantise(self, images: Tensor, generator: torch.Generator, sharpness: float = 4.0) -> Quantised:
        """Give the dVAE its codes: clusters of the numbers of `images`, (B, 3, R, R).

        Code k stands for centre c_k: its embedding is what the decoder was used to get for c_k, and its logit is
        -sharpness * |z - c_k|^2 / (2 noise^2) up to a constant, which is linear in the features.
        """
        dvae = self.dvae

        def raw(images: Tensor) -> Tensor:
            return torch.cat([self.down(dvae.features(chunk)).float() for chunk in images.split(64)]).flatten(0, 2)

        seen = raw(self.crops(images, generator))  # what the decoder is used to
        mean, std = seen.mean(0), (seen.var(0, correction=0) + WHITE_EPS).sqrt()
        points, counts = distinct((raw(images) - mean) / std)
        centres, error = kmeans(points, dvae.codebook_size, generator, counts.sqrt())
        scale = sharpness / self.noise**2
        weight = scale * (centres / std) @ self.down.weight
        bias = -scale * (centres / std) @ mean - scale / 2 * centres.square().sum(-1)
        dvae.to_logits.weight.copy_(weight[:, :, None, None])
        dvae.to_logits.bias.copy_(bias)  # type: ignore[union-attr]
        dvae.codebook.copy_(self.up(centres))
        return Quantised(error, centres.shape[1] * self.noise**2)


def varied_crops(images: Tensor, side: int | None, step: int, generator: torch.Generator) -> Tensor:
    """(B, 3, R, R) -> (B, 3, side, side), a crop of each image that holds a cell in which pixels vary.

    Without a side, the whole images. Cells, and so the crops, lie on a grid of `step` pixels, a divisor of side and R.
    A cell is drawn with a chance in proportion to its widest range of values, any cell where all are plain; a crop
    around it likewise.
    """
    if side is None:
        return images
    batch, _, height, width = images.shape
    ranges = F.max_pool2d(images, step) + F.max_pool2d(-images, step)
    chances = ranges.amax(1).flatten(1) + 1e-6
    cell = torch.multinomial(chances, 1, generator=generator)[:, 0]
    columns, reach = width // step, side // step
    within = torch.randint(reach, (2, batch), generator=generator, device=images.device)
    top = (cell // columns - within[0]).clamp(0, height // step - reach) * step
    left = (cell % columns - within[1]).clamp(0, columns - reach) * step
    corners = zip(top.tolist(), left.tolist(), strict=True)
    cut = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(cut)
