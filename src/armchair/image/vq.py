"""VQ: a position's code is the nearest of K points, and the points follow what the encoder says.

The vector-quantised autoencoder (van den Oord et al., "Neural Discrete Representation Learning", 2017) between the
networks of the dVAE, with its codebook as a moving average, and codes of few channels on the unit sphere (Yu et al.,
"Vector-quantized Image Modeling with Improved VQGAN", 2022): a position's features go down to `code_channels` numbers,
which are looked up and go up again to what the decoder gets.

The quantiser is written here rather than taken from a package, though tests compare it with one: what is random comes
from a generator that is given, the codebook moves once an update, whatever parts the batch is computed in and in
whatever threads, its sums have 32 bits under autocast too, and drawing needs none of it.

Shapes: B batch, S grid side, K codebook size, C code channels, M positions of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.config import check_name
from armchair.errors import RequestError
from armchair.image.clusters import distinct, kmeans, nearest_centres
from armchair.image.network import (
    ImageTokenizer,
    NetworkConfig,
    Numbers,
    TrainingPass,
    make_decoder,
    make_encoder,
    negative_log_likelihood,
)

TINY = 1e-12  # a share that is nobody's


@dataclass(frozen=True, kw_only=True)
class VQConfig(NetworkConfig):
    """Sizes of the networks, and how the codebook learns."""

    kind: str = "vq"
    codebook_size: int = 8192
    code_channels: int = 8  # numbers that a code is looked up by
    normalise: bool = True  # they lie on the unit sphere
    decay: float = 0.99  # of the moving average that the codebook is
    reseed: float = 0.03  # a code chosen less often than this share of an even one starts anew; 0: none does
    commitment_weight: float = 0.25  # of the squared distance between what the encoder says and its code

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ["vq"])
        super().__post_init__()
        if self.code_channels < 1:
            raise RequestError(f"code_channels: expected at least 1, got {self.code_channels}")
        if self.normalise and self.code_channels < 2:
            raise RequestError("code_channels: on a sphere at least 2 are needed, got 1; or set normalise to false")
        for name in ("decay", "reseed"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"{name}: expected 0 or more and less than 1, got {getattr(self, name)}")
        if not self.commitment_weight >= 0:
            raise RequestError(f"commitment_weight: expected 0 or more, got {self.commitment_weight}")


class VQ(ImageTokenizer):
    """`codebook` holds the points, (K, C); `shares` and `sums` are the moving averages that it is made of.

    The codebook is a parameter, though no gradient moves it, so that the average of the weights has its average too.
    """

    encoder_parts = ("encoder.", "down.")
    start_images = 1024
    config: VQConfig
    shares: Tensor  # (K,) how often each code is chosen; they sum to about 1
    sums: Tensor  # (K, C) the mean of the points that chose it, times its share

    def __init__(self, config: VQConfig):
        super().__init__(config)
        k, channels = config.codebook_size, config.code_channels
        self.encoder, self.n_features = make_encoder(config)
        self.down = Numbers(self.n_features, channels)
        self.codebook = nn.Parameter(self._placed(torch.randn(k, channels)), requires_grad=False)
        self.register_buffer("shares", torch.full((k,), 1 / k))
        self.register_buffer("sums", self.codebook.detach() / k)
        self.up = nn.Linear(channels, config.n_init)
        self.decoder = make_decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def codes_of(self, features: Tensor) -> Tensor:
        points = self._placed(self.down(features))
        return self._nearest(points.flatten(0, -2)).view(points.shape[:-1])

    def latent(self, codes: Tensor) -> Tensor:
        return self.up(F.embedding(codes, self.codebook))

    def training_pass(self, images: Tensor, generator: torch.Generator, settings: Mapping[str, float]) -> TrainingPass:
        """-log likelihood per pixel-channel, and the commitment; gradients go straight through the look-up."""
        raw = self.down.raw(self.features(images))
        points = self._placed(self.down.over_batch(raw))
        flat = points.detach().flatten(0, 2)
        codes = self._nearest(flat)
        chosen = F.embedding(codes, self.codebook.detach()).view_as(points)
        mu, log_b = self.density(self.up(points + (chosen - points).detach()))
        reconstruction = negative_log_likelihood(images, mu, log_b)
        commitment = (points - chosen).square().sum(-1).mean()
        loss = reconstruction + self.config.commitment_weight * commitment
        figures = {"reconstruction": reconstruction, "commitment": commitment}
        return TrainingPass(loss, mu, figures, (raw.detach().flatten(0, 2), flat, codes))

    @torch.no_grad()
    def start(self, images: Tensor, generator: torch.Generator) -> None:
        """The codes begin as clusters of what the encoder says at its start, as far apart as the pictures are."""
        said = torch.cat([self.down.raw(self.features(chunk)).flatten(0, 2) for chunk in images.split(64)])
        self.down.follow(said, decay=0.0)
        points, counts = distinct(self._placed((said - self.down.mean) / self.down.std))
        centres, _ = kmeans(points, self.codebook_size, generator, counts.sqrt())
        self.codebook.copy_(self._placed(centres))
        self.shares.fill_(1 / self.codebook_size)
        self.sums.copy_(self.codebook / self.codebook_size)

    def after_update(self, seen: Sequence[Tensor], generator: torch.Generator) -> None:
        raw, points, codes = seen
        self.down.follow(raw)
        self.move_codebook(points, codes, generator)

    @torch.no_grad()
    def move_codebook(self, points: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Towards what was said. points: (M, C), where the encoder was in a batch; codes: (M,), those that it chose.

        A code that is hardly chosen is put where a point of the batch is, which is drawn in proportion to its squared
        distance to its code, as k-means++ draws its centres: of pictures that are mostly plain, most points are right
        already.
        """
        c, k = self.config, self.codebook_size
        one = 1 / len(points)
        shares = torch.bincount(codes, minlength=k).to(points) * one
        sums = torch.zeros_like(self.sums).index_add_(0, codes, points) * one
        self.shares.lerp_(shares, 1 - c.decay)
        self.sums.lerp_(sums, 1 - c.decay)
        means = self.sums / self.shares.clamp_min(TINY)[:, None]
        self.codebook.copy_(torch.where((self.shares > TINY)[:, None], self._placed(means), self.codebook))
        if len(dead := (self.shares < c.reseed / k).nonzero()[:, 0]):
            dead = dead[: len(points)]
            wrong = (points - F.embedding(codes, self.codebook)).square().sum(-1) + TINY
            taken = torch.multinomial(wrong, len(dead), generator=generator)
            self.codebook[dead] = points[taken]
            self.shares[dead] = 1 / k
            self.sums[dead] = points[taken] / k

    def _placed(self, points: Tensor) -> Tensor:
        return F.normalize(points, dim=-1) if self.config.normalise else points

    def _nearest(self, points: Tensor) -> Tensor:
        """(M, C) -> (M,) int64."""
        with torch.autocast(points.device.type, enabled=False):
            return nearest_centres(points, self.codebook)[0]
