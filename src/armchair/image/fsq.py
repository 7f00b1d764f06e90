"""FSQ: a position's code is a few numbers, each rounded to one of few levels (Mentzer et al., 2023).

"Finite Scalar Quantization: VQ-VAE Made Simple" between the networks of the dVAE. A position's features go down to a
number a channel, a tanh bounds it, and it is rounded; there is no codebook to learn, and none that could collapse.
A code is the number that the levels are the digits of, the first channel's the lowest.

Shapes: B batch, S grid side, K codebook size, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armchair.config import check_name
from armchair.errors import RequestError
from armchair.image.network import (
    ImageTokenizer,
    NetworkConfig,
    Numbers,
    TrainingPass,
    make_decoder,
    make_encoder,
    negative_log_likelihood,
)

REACH = 1e-3  # by how much the tanh goes beyond the outermost levels, as a share: what is at them still has a gradient


@dataclass(frozen=True, kw_only=True)
class FSQConfig(NetworkConfig):
    """Sizes of the networks, and the levels."""

    kind: str = "fsq"
    levels: tuple[int, ...] = (16, 8, 8, 8)  # of each channel; their product is the number of codes

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ["fsq"])
        if not self.levels or min(self.levels) < 3:
            raise RequestError(f"levels: expected one number or more, each at least 3, got {list(self.levels)}")
        super().__post_init__()

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)


class FSQ(ImageTokenizer):
    """`down` makes the numbers, and `up` what the decoder gets of their levels."""

    encoder_parts = ("encoder.", "down.")
    start_images = 1024
    config: FSQConfig

    def __init__(self, config: FSQConfig):
        super().__init__(config)
        self.encoder, self.n_features = make_encoder(config)
        self.down = Numbers(self.n_features, len(config.levels))
        self.up = nn.Linear(len(config.levels), config.n_init)
        self.decoder = make_decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def codes_of(self, features: Tensor) -> Tensor:
        return codes_from_digits(bounded(self.down(features), self.config.levels).round().long(), self.config.levels)

    def latent(self, codes: Tensor) -> Tensor:
        return self.up(scaled(digits_from_codes(codes, self.config.levels).float(), self.config.levels))

    def training_pass(self, images: Tensor, generator: torch.Generator, settings: Mapping[str, float]) -> TrainingPass:
        """-log likelihood per pixel-channel; gradients go straight through the rounding."""
        raw = self.down.raw(self.features(images))
        near = bounded(self.down.over_batch(raw), self.config.levels)
        digits = near + (near.round() - near).detach()
        mu, log_b = self.density(self.up(scaled(digits, self.config.levels)))
        loss = negative_log_likelihood(images, mu, log_b)
        return TrainingPass(loss, mu, {"reconstruction": loss}, (raw.detach().flatten(0, 2),))

    def start(self, images: Tensor, generator: torch.Generator) -> None:
        with torch.no_grad():
            said = [self.down.raw(self.features(chunk)).flatten(0, 2) for chunk in images.split(64)]
        self.down.follow(torch.cat(said), decay=0.0)

    def after_update(self, seen: Sequence[Tensor], generator: torch.Generator) -> None:
        (raw,) = seen
        self.down.follow(raw)


def bounded(numbers: Tensor, levels: tuple[int, ...]) -> Tensor:
    """(..., C) -> the same, channel i between 0 and L_i - 1 and a little beyond, 0 going to the middle digit.

    With an even number of levels the middle digit is the upper of two, so that 0 is rounded to one and not torn apart.
    """
    count = torch.tensor(levels, device=numbers.device)
    half = (count - 1) * (1 + REACH) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0)
    return half * torch.tanh(numbers + torch.atanh(offset / half)) - offset + count // 2


def scaled(digits: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Digits (..., C) -> what they stand for, between -1 and 1, the middle digit at 0."""
    middle = torch.tensor([count // 2 for count in levels], device=digits.device)
    return (digits - middle) / middle


def codes_from_digits(digits: Tensor, levels: tuple[int, ...]) -> Tensor:
    """(..., C) int64, channel i from 0 to L_i - 1 -> (...) int64."""
    return (digits * _places(levels, digits)).sum(-1)


def digits_from_codes(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The inverse of `codes_from_digits`."""
    return codes[..., None] // _places(levels, codes) % torch.tensor(levels, device=codes.device)


def _places(levels: tuple[int, ...], like: Tensor) -> Tensor:
    """What a digit of each channel is worth."""
    return torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=like.device)
