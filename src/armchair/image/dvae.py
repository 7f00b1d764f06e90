"""The discrete VAE of DALL·E: an image becomes a grid of codes and back (paper, section 2.1 and appendix A).

The networks are in `armchair.image.network`; here is what is between them. Shapes: K codebook size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.config import check_name
from armchair.image.network import (
    ImageTokenizer,
    NetworkConfig,
    TrainingPass,
    conv,
    make_decoder,
    make_encoder,
    negative_log_likelihood,
)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(NetworkConfig):
    """Sizes of the dVAE; the defaults are the released model."""

    kind: str = "dvae"
    codebook_size: int = 8192

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ["dvae"])
        super().__post_init__()


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


class Relaxed(NamedTuple):
    """What one training pass gives; all are scalars, in nats."""

    loss: Tensor  # per pixel-channel: reconstruction + kl_weight / (3 factor^2) * kl
    reconstruction: Tensor  # -log likelihood per pixel-channel under the relaxed codes
    kl: Tensor  # KL(q || uniform) per code


class DVAE(ImageTokenizer):
    """Encoder to K logits a position, Gumbel-softmax relaxation, decoder to a logit-Laplace density."""

    encoder_parts = ("encoder.", "to_logits.")
    config: DVAEConfig

    def __init__(self, config: DVAEConfig):
        super().__init__(config)
        self.encoder, self.n_features = make_encoder(config)
        self.to_logits = conv(self.n_features, config.codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.n_init) / math.sqrt(config.n_init))
        self.decoder = make_decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def codes_of(self, features: Tensor) -> Tensor:
        return self._logits_of(features).argmax(-1)

    def latent(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    def logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, R, R) in [0, 1] -> unnormalised log q(z | image): (B, S, S, K)."""
        return self._logits_of(self.features(self._checked(images)))

    def _logits_of(self, features: Tensor) -> Tensor:
        # A 1x1 convolution written as a matrix product: K lies last, contiguous for the softmax.
        return F.linear(features, self.to_logits.weight[:, :, 0, 0], self.to_logits.bias)

    def training_pass(self, images: Tensor, generator: torch.Generator, settings: Mapping[str, float]) -> TrainingPass:
        """The relaxed evidence bound, negated, for one batch (paper, equation 1 and appendix A.2).

        settings: `tau` above 0, and `kl_weight`, which is beta, on the scale of the paper (6.6 at the end).
        """
        logits = self._logits_of(self.features(images))
        weights, kl = gumbel_relaxation(logits, settings["tau"], generator)
        mu, log_b = self.density(weights @ self.codebook)
        reconstruction = negative_log_likelihood(images, mu, log_b)
        loss = reconstruction + settings["kl_weight"] / (3 * self.config.factor**2) * kl.mean()
        return TrainingPass(loss, mu, {"reconstruction": reconstruction, "kl": kl.mean()})

    def relaxed_loss(self, images: Tensor, tau: float, kl_weight: float, generator: torch.Generator) -> Relaxed:
        """`training_pass` in three numbers."""
        done = self.training_pass(images, generator, {"tau": tau, "kl_weight": kl_weight})
        return Relaxed(done.loss, done.figures["reconstruction"], done.figures["kl"])
