"""The discrete VAE of DALL·E: an image becomes a grid of codes and back (paper, section 2.1 and appendix A).

Shapes: B batch, R resolution, S grid side, K codebook size, C channels.
Images are float (B, 3, R, R) in [0, 1] at every public function; the pixel map to (0.1, 0.9) stays inside.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.config import check_name
from armchair.errors import RequestError

PIXEL_EPS = 0.1  # epsilon of the pixel map: keeps logit(x) finite and well scaled


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Sizes of the dVAE; the defaults are the released model. `factor` = pixels a code covers on a side."""

    kind: str = "dvae"
    resolution: int = 256
    codebook_size: int = 8192
    n_hid: int = 256  # width of the outermost group; the others are x2, x4, x8
    n_init: int = 128  # channels of a code's embedding, the decoder's first layer
    n_groups: int = 4  # groups of residual blocks, with a factor 2 between neighbours
    n_blocks: int = 2  # residual blocks a group
    patch: int = 1  # pixel-unshuffle before the first convolution; 1 is the released model
    stem_kernel: int = 7
    encoder_kernel: int = 3  # of the encoder's blocks; with 1, and a stem of 1, a code knows its own patch alone
    min_log_scale: float = -4.0  # floor of ln b; exp(-4) is about one grey level, finer is not in 8-bit data

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ["dvae"])
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


def gumbel_relaxation(logits: Tensor, tau: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Relaxed one-hot codes and their cost (paper, section 2.1).

    logits: (..., K) -> weights: (..., K), weights_i proportional to exp((log q_i + g_i) / tau) with Gumbel
    noise g, and kl: (...) float32, KL(q || uniform) in nats. Differentiable in logits through both.
    """
    weights, kl = _GumbelRelaxation.apply(logits.flatten(0, -2), tau, generator)
    return weights.unflatten(0, logits.shape[:-1]), kl.unflatten(0, logits.shape[:-1])


class _GumbelRelaxation(torch.autograd.Function):
    """The relaxation by blocks of rows that stay in the cache.

    With K = 4096 a batch has tens of millions of probabilities, and on a CPU the plain formula is bound by
    walking over them a dozen times in memory; this took a training step from 1.2 s to 0.3 s.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tau: float, generator: torch.Generator):  # type: ignore[override]
        weights = torch.empty_like(logits)
        kl = torch.empty(len(logits), device=logits.device)
        for rows in _row_blocks(logits):
            log_q = logits[rows].float().log_softmax(-1)
            kl[rows] = (log_q.exp() * log_q).sum(-1)
            noise = torch.empty_like(log_q).uniform_(generator=generator)
            noise.log_().neg_().log_()  # minus a Gumbel variate; far cheaper than exponential_() on a CPU
            weights[rows] = log_q.sub_(noise).div_(tau).softmax(-1).to(weights.dtype)
        ctx.save_for_backward(logits, weights, kl)
        ctx.tau = tau
        return weights, kl + math.log(logits.shape[-1])

    @staticmethod
    def backward(ctx, grad_weights: Tensor, grad_kl: Tensor):  # type: ignore[override]
        logits, weights, kl = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            w, g = weights[rows].float(), grad_weights[rows].float()
            d = (g - (g * w).sum(-1, keepdim=True)).mul_(w).div_(ctx.tau)
            log_q = logits[rows].float().log_softmax(-1)
            d += log_q.exp().mul_(log_q - kl[rows, None]).mul_(grad_kl[rows, None])
            grad[rows] = d.to(grad.dtype)
        return grad, None, None


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(1, 2**19 // x.shape[-1]) if x.device.type == "cpu" else len(x)
    return [slice(i, i + rows) for i in range(0, len(x), rows)]


class DistinctRows(NamedTuple):
    """Of M rows, N of them different."""

    first: Tensor  # (N,) where each occurs first
    which: Tensor  # (M,) the number of each row among the N
    counts: Tensor  # (N,) how often each occurs


def distinct_rows(rows: Tensor) -> DistinctRows:
    """rows: (M, C), compared bit by bit as opaque values, which numpy sorts many times faster than torch rows."""
    x = rows.contiguous().numpy(force=True)
    opaque = x.view(f"V{x.itemsize * x.shape[1]}")[:, 0]
    _, *found = np.unique(opaque, return_index=True, return_inverse=True, return_counts=True)
    return DistinctRows(*(torch.from_numpy(f).to(rows.device) for f in found))


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


class Relaxed(NamedTuple):
    """What one training pass gives; all are scalars, in nats."""

    loss: Tensor  # per pixel-channel: reconstruction + kl_weight / (3 factor^2) * kl
    reconstruction: Tensor  # -log likelihood per pixel-channel under the relaxed codes
    kl: Tensor  # KL(q || uniform) per code


class DVAE(nn.Module):
    """Encoder to K logits a position, Gumbel-softmax relaxation, decoder to a logit-Laplace density."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = c = config
        gain = 1 / (c.n_groups * c.n_blocks) ** 2
        widths = [c.n_hid * 2**g for g in range(c.n_groups)]

        kernels = (c.encoder_kernel, c.encoder_kernel, c.encoder_kernel, 1)
        encoder: list[nn.Module] = [conv(3 * c.patch**2, c.n_hid, c.stem_kernel)]
        n_in = c.n_hid
        for g, width in enumerate(widths):
            if g > 0:
                encoder.append(nn.MaxPool2d(2))
            for _ in range(c.n_blocks):
                encoder.append(Block(n_in, width, kernels, gain))
                n_in = width
        self.encoder = nn.Sequential(*encoder, nn.ReLU())
        self.n_features = n_in
        self.to_logits = conv(n_in, c.codebook_size, 1)

        self.codebook = nn.Parameter(torch.randn(c.codebook_size, c.n_init) / math.sqrt(c.n_init))
        decoder: list[nn.Module] = []
        n_in = c.n_init
        for g, width in enumerate(reversed(widths)):
            if g > 0:
                decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(c.n_blocks):
                decoder.append(Block(n_in, width, (1, 3, 3, 3), gain))
                n_in = width
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), conv(n_in, 6 * c.patch**2, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # What every image tokenizer offers.

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
        """(K, C), a vector a code; codes that look alike have vectors that are alike."""
        return self.codebook.detach()

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) float in [0, 1] -> codes: (B, S, S) int64, the argmax of the logits."""
        if self.config.own_patch and images.device.type == "cpu":
            return self._encode_patches(self._checked(images))
        return self.logits(images).argmax(-1)

    def _encode_patches(self, images: Tensor) -> Tensor:
        """`encode` where a code depends on its own patch alone: each distinct patch is looked at once.

        In flat drawings five patches in six occur elsewhere in the batch, and K logits are most of the work.
        """
        patches = F.pixel_unshuffle(images, self.config.patch).permute(0, 2, 3, 1)  # (B, S, S, 3 patch^2)
        flat = patches.flatten(0, 2)
        found = distinct_rows(flat)
        few = F.pixel_shuffle(flat[found.first][:, :, None, None], self.config.patch)
        codes = self._logits(few).argmax(-1).flatten()
        return codes[found.which].view(patches.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (B, S, S) int64 in [0, K) -> images: (B, 3, R, R) float in [0, 1]."""
        mu, _ = self.density(F.embedding(codes, self.codebook))
        return unmap_pixels(torch.sigmoid(mu))

    # The model itself.

    def logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) in [0, 1] -> unnormalised log q(z | image): (B, S, S, K)."""
        return self._logits(self._checked(images))

    def _checked(self, images: Tensor) -> Tensor:
        side = self.config.resolution
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise RequestError(f"images: expected (B, 3, {side}, {side}), got {tuple(images.shape)}")
        return images

    def _logits(self, images: Tensor) -> Tensor:
        """Of pictures of any side: the network is convolutional."""
        # A 1x1 convolution written as a matrix product: K lies last, contiguous for the softmax.
        return F.linear(self.features(images), self.to_logits.weight[:, :, 0, 0], self.to_logits.bias)

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) in [0, 1] -> the encoder's last features, (B, S, S, n_features)."""
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

    def relaxed_loss(self, images: Tensor, tau: float, kl_weight: float, generator: torch.Generator) -> Relaxed:
        """The relaxed evidence bound, negated, for one batch (paper, equation 1 and appendix A.2).

        images: (B, 3, R, R) in [0, 1], whole or crops; tau > 0; kl_weight is beta, on the scale of the paper (6.6 at
        the end).
        """
        weights, kl = gumbel_relaxation(self._logits(images), tau, generator)
        reconstruction = self.reconstruction_loss(images, weights @ self.codebook)
        loss = reconstruction + kl_weight / (3 * self.config.factor**2) * kl.mean()
        return Relaxed(loss, reconstruction, kl.mean())

    def hard_loss(self, images: Tensor, codes: Tensor) -> Tensor:
        """-log likelihood per pixel-channel, in nats, under given codes (B, S, S)."""
        return self.reconstruction_loss(images, F.embedding(codes, self.codebook))

    def reconstruction_loss(self, images: Tensor, latent: Tensor) -> Tensor:
        mu, log_b = self.density(latent)
        return -logit_laplace_log_prob(map_pixels(images), mu, log_b).mean()
