"""What all image tokenizers share: the networks on both sides of the codes, the density of pixels, and the interface.

They are those of DALL·E's discrete VAE (paper, section 2.1 and appendix A), whatever the bottleneck between them, so
that comparing two kinds of tokenizer compares their bottlenecks and nothing else.

Shapes: B batch, R resolution, S grid side, K codebook size, C channels.
Images are float (B, 3, R, R) in [0, 1] at every public function; the pixel map to (0.1, 0.9) stays inside.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.errors import RequestError
from armchair.image.clusters import distinct_rows

PIXEL_EPS = 0.1  # epsilon of the pixel map: keeps logit(x) finite and well scaled
WHITE_EPS = 1e-5
WHITE_DECAY = 0.98


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes of encoder and decoder; the defaults are the released dVAE. `factor` = pixels a code covers on a side.

    Each kind of image tokenizer has a config of its own that adds its `kind`, and what its bottleneck is like.
    """

    kind: str = ""
    resolution: int = 256
    n_hid: int = 256  # width of the outermost group; the others are x2, x4, x8
    n_init: int = 128  # channels of a code's embedding, the decoder's first layer
    n_groups: int = 4  # groups of residual blocks, with a factor 2 between neighbours
    n_blocks: int = 2  # residual blocks a group
    patch: int = 1  # pixel-unshuffle before the first convolution; 1 is the released model
    stem_kernel: int = 7
    encoder_kernel: int = 3  # of the encoder's blocks; with 1, and a stem of 1, a code knows its own patch alone
    min_log_scale: float = -4.0  # floor of ln b; exp(-4) is about one grey level, finer is not in 8-bit data

    def __post_init__(self) -> None:
        for name in ("resolution", "codebook_size", "n_hid", "n_init", "n_groups", "n_blocks", "patch"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.codebook_size < 2:
            raise RequestError(f"codebook_size: expected at least 2, got {self.codebook_size}")
        if self.n_hid % 4:
            raise RequestError(f"n_hid: expected a multiple of 4 (bottleneck width), got {self.n_hid}")
        for name in ("stem_kernel", "encoder_kernel"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise RequestError(f"{name}: expected an odd number from 1 on, got {getattr(self, name)}")
        if self.resolution % self.factor:
            raise RequestError(
                f"resolution {self.resolution} is not a multiple of patch x 2^(n_groups-1) = {self.factor}"
            )

    @property
    def codebook_size(self) -> int:
        """K, how many codes there are."""
        raise NotImplementedError

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (self.n_groups - 1)

    @property
    def grid(self) -> int:
        return self.resolution // self.factor

    @property
    def own_patch(self) -> bool:
        """Whether a code depends on the pixels that it covers alone."""
        return self.stem_kernel == self.encoder_kernel == self.n_groups == 1


def map_pixels(images: Tensor) -> Tensor:
    """phi: [0, 1] -> [0.1, 0.9], the support on which the logit-Laplace density lives (appendix A.3)."""
    return (1 - 2 * PIXEL_EPS) * images + PIXEL_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((mapped - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


def logit_laplace_log_prob(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """log f(x | mu, b) of the logit-Laplace density on (0, 1), elementwise (paper, appendix A.3, equation 2).

    f(x | mu, b) = 1 / (2 b x (1 - x)) * exp(-|logit(x) - mu| / b).
    """
    return (
        -math.log(2.0) - log_b - torch.log(x) - torch.log1p(-x) - (torch.logit(x) - mu).abs() * torch.exp(-log_b)
    )


class Block(nn.Module):
    """Pre-activation bottleneck residual block, its branch scaled by 1 / (number of blocks)^2 (appendix A.2)."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        n_mid = n_out // 4
        widths = (n_in, n_mid, n_mid, n_mid, n_out)
        self.convs = nn.ModuleList(
            conv(a, b, k) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)
        )
        self.skip = conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for c in self.convs:
            h = c(F.relu(h))
        return self.skip(x) + self.gain * h


def conv(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    c = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
    nn.init.normal_(c.weight, std=1 / math.sqrt(n_in * kernel**2))
    nn.init.zeros_(c.bias)  # type: ignore[arg-type]
    return c


class Numbers(nn.Module):
    """Features down to a few numbers a place, whitened: in training over the batch, in use by what training saw lately.

    Without whitening, what places differ by is small beside what they have in common, and all pictures start with the
    same few codes. (Batch normalisation: Ioffe and Szegedy, 2015.)
    """

    mean: Tensor  # (C,) of what the map gives
    std: Tensor

    def __init__(self, n_features: int, channels: int):
        super().__init__()
        self.map = nn.Linear(n_features, channels, bias=False)
        nn.init.normal_(self.map.weight, std=1 / math.sqrt(n_features))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def raw(self, features: Tensor) -> Tensor:
        """(..., n_features) -> (..., C), in 32 bits under autocast too: near codes must stay apart."""
        with torch.autocast(features.device.type, enabled=False):
            return self.map(features.float())

    def forward(self, features: Tensor) -> Tensor:
        """(..., n_features) -> (..., C), as in use."""
        return (self.raw(features) - self.mean) / self.std

    def over_batch(self, raw: Tensor) -> Tensor:
        """What `raw` gave of a whole batch, (..., C), whitened over it."""
        return F.batch_norm(raw.flatten(0, -2), None, None, training=True, eps=WHITE_EPS).view_as(raw)

    @torch.no_grad()
    def follow(self, raw: Tensor, decay: float = WHITE_DECAY) -> None:
        """Let mean and standard deviation go towards those of `raw`, (M, C)."""
        self.mean.lerp_(raw.mean(0), 1 - decay)
        self.std.lerp_((raw.var(0, correction=0) + WHITE_EPS).sqrt(), 1 - decay)


def make_encoder(config: NetworkConfig) -> tuple[nn.Sequential, int]:
    """Mapped pixels, folded by `patch` -> features; and how many channels those have."""
    c = config
    gain = 1 / (c.n_groups * c.n_blocks) ** 2
    kernels = (c.encoder_kernel, c.encoder_kernel, c.encoder_kernel, 1)
    layers: list[nn.Module] = [conv(3 * c.patch**2, c.n_hid, c.stem_kernel)]
    n_in = c.n_hid
    for g in range(c.n_groups):
        if g > 0:
            layers.append(nn.MaxPool2d(2))
        for _ in range(c.n_blocks):
            layers.append(Block(n_in, c.n_hid * 2**g, kernels, gain))
            n_in = c.n_hid * 2**g
    return nn.Sequential(*layers, nn.ReLU()), n_in


def make_decoder(config: NetworkConfig) -> nn.Sequential:
    """Embeddings of codes, `n_init` channels -> mu and the raw scale of the pixels' density, folded by `patch`."""
    c = config
    gain = 1 / (c.n_groups * c.n_blocks) ** 2
    layers: list[nn.Module] = []
    n_in = c.n_init
    for g in reversed(range(c.n_groups)):
        if g < c.n_groups - 1:
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        for _ in range(c.n_blocks):
            layers.append(Block(n_in, c.n_hid * 2**g, (1, 3, 3, 3), gain))
            n_in = c.n_hid * 2**g
    return nn.Sequential(*layers, nn.ReLU(), conv(n_in, 6 * c.patch**2, 1))


class TrainingPass(NamedTuple):
    """What one training pass over a batch gives."""

    loss: Tensor  # scalar, nats per pixel-channel
    mu: Tensor  # (B, 3, R, R), the mean of the pixels' density under the codes as training has them
    figures: dict[str, Tensor]  # scalars to log beside the loss
    seen: tuple[Tensor, ...] = ()  # what `after_update` learns from, each (positions, ...)


class ImageTokenizer(nn.Module):
    """Encoder, bottleneck, decoder to a logit-Laplace density. A kind of tokenizer is a subclass in a file of its own.

    A subclass makes `encoder`, `n_features` and `decoder` with `make_encoder` and `make_decoder`, and its bottleneck,
    and defines `codes_of`, `latent` and `training_pass`.
    """

    # How the names begin of the parameters that say which code it is; `encoder_scale` slows those down.
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.",)
    # Training pictures that `start` wants to see before the first update.
    start_images: ClassVar[int] = 0
    encoder: nn.Sequential
    decoder: nn.Sequential
    n_features: int

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config

    # What stage 2 and drawing ask of an image tokenizer.

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def grid(self) -> int:
        return self.config.grid

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def code_vectors(self) -> Tensor:
        """(K, n_init), a vector a code; codes that look alike have vectors that are alike."""
        device = next(self.parameters()).device
        return self.latent(torch.arange(self.codebook_size, device=device)).detach()

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) float in [0, 1] -> codes: (B, S, S) int64."""
        images = self._checked(images)
        if self.config.own_patch and images.device.type == "cpu":
            return self._encode_patches(images)
        return self.codes_of(self.features(images))

    def _encode_patches(self, images: Tensor) -> Tensor:
        """`encode` where a code depends on its own patch alone: each distinct patch is looked at once.

        In flat drawings five patches in six occur elsewhere in the batch, and K logits are most of the work.
        """
        patches = F.pixel_unshuffle(images, self.config.patch).permute(0, 2, 3, 1)  # (B, S, S, 3 patch^2)
        flat = patches.flatten(0, 2)
        found = distinct_rows(flat)
        few = F.pixel_shuffle(flat[found.first][:, :, None, None], self.config.patch)
        codes = self.codes_of(self.features(few)).flatten()
        return codes[found.which].view(patches.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (B, S, S) int64 in [0, K) -> images: (B, 3, R, R) float in [0, 1]."""
        mu, _ = self.density(self.latent(codes))
        return unmap_pixels(torch.sigmoid(mu))

    # What a kind defines.

    def codes_of(self, features: Tensor) -> Tensor:
        """features: (B, S, S, n_features) -> codes (B, S, S) int64."""
        raise NotImplementedError

    def latent(self, codes: Tensor) -> Tensor:
        """codes (...) int64 -> what the decoder gets for them, (..., n_init)."""
        raise NotImplementedError

    def training_pass(self, images: Tensor, generator: torch.Generator, settings: Mapping[str, float]) -> TrainingPass:
        """One pass forward.

        images: (B, 3, R, R) in [0, 1], whole or crops; settings: what the schedules say for now, by name.
        """
        raise NotImplementedError

    # What a kind may define.

    def start(self, images: Tensor, generator: torch.Generator) -> None:
        """Called once, before the first update, with `start_images` training pictures (B, 3, R, R) if not 0."""

    def after_update(self, seen: Sequence[Tensor], generator: torch.Generator) -> None:
        """Called after each update with what the passes over its batch gave as `seen`, those of all parts together."""

    # The networks.

    def _checked(self, images: Tensor) -> Tensor:
        side = self.config.resolution
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise RequestError(f"images: expected (B, 3, {side}, {side}), got {tuple(images.shape)}")
        return images

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) in [0, 1] -> the encoder's last features, (B, S, S, n_features).

        R may be that of crops: the network is convolutional.
        """
        x = F.pixel_unshuffle(map_pixels(images), self.config.patch)
        h = self.encoder(x.contiguous(memory_format=torch.channels_last))
        return h.permute(0, 2, 3, 1)  # (B, S, S, C)

    def density(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent: (B, S, S, n_init) -> mu and ln b of the pixels' density, each (B, 3, R, R) float32."""
        maps = self.decoder(latent.permute(0, 3, 1, 2))
        maps = F.pixel_shuffle(maps.float(), self.config.patch)
        mu, raw = maps.chunk(2, dim=1)
        floor = self.config.min_log_scale
        return mu, floor + F.softplus(raw - floor)

    def hard_loss(self, images: Tensor, codes: Tensor) -> Tensor:
        """-log likelihood per pixel-channel, in nats, under given codes (B, S, S)."""
        return self.reconstruction_loss(images, self.latent(codes))

    def reconstruction_loss(self, images: Tensor, latent: Tensor) -> Tensor:
        return negative_log_likelihood(images, *self.density(latent))


def negative_log_likelihood(images: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Of images in [0, 1], per pixel-channel in nats; all are (B, 3, R, R)."""
    return -logit_laplace_log_prob(map_pixels(images), mu, log_b).mean()
