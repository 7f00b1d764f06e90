"""Models small enough for a test: milliseconds to build and run."""

import math
from collections.abc import Callable, Generator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from armchair.clip.captioner import CaptionerConfig
from armchair.clip.model import CLIP, CLIPConfig, ImageTowerConfig, TextShape, TextTowerConfig
from armchair.image.dvae import DVAE, DVAEConfig
from armchair.image.fsq import FSQ, FSQConfig
from armchair.image.vq import VQ, VQConfig
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior, PriorConfig
from armchair.sample.generate import Decoder, candidate_uniforms, draw_codes
from armchair.sample.next_token import Settings


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Sizes of an image tokenizer of 16 x 16 pixels and 4 x 4 codes.
NETWORK = {"resolution": 16, "patch": 2, "n_groups": 2, "n_blocks": 1, "n_hid": 8, "n_init": 8, "stem_kernel": 3}


def dvae(seed: int = 0, **sizes: Any) -> DVAE:
    config = DVAEConfig(**{**NETWORK, "codebook_size": 32, "min_log_scale": -3.0, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DVAE(config).eval()


def vq(seed: int = 0, **sizes: Any) -> VQ:
    config = VQConfig(**{**NETWORK, "codebook_size": 32, "code_channels": 4, "min_log_scale": -3.0, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQ(config).eval()


def fsq(seed: int = 0, **sizes: Any) -> FSQ:
    config = FSQConfig(**{**NETWORK, "levels": (8, 4), "min_log_scale": -3.0, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FSQ(config).eval()


def pictures(count: int, resolution: int, seed: int = 0) -> Tensor:
    """(count, 3, R, R) in [0, 1]: each half one colour and half another, cut at its own column."""
    g = seeded(seed)
    colours = torch.rand(count, 2, 3, 1, 1, generator=g)
    cut = torch.randint(resolution // 4, 3 * resolution // 4, (count, 1, 1, 1), generator=g)
    return torch.where(
        torch.arange(resolution).expand(count, 3, resolution, -1) < cut, colours[:, 0], colours[:, 1]
    )


def shape(grid: int = 4, text_length: int = 5, vocab: int = 11, codebook: int = 13) -> StreamShape:
    return StreamShape(text_vocab_size=vocab, text_length=text_length, codebook_size=codebook, grid=grid)


# What a block can be beside the paper's: each alone, and together with what a caption and a head can be.
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "rotary": {"rotary": True},
    "rms": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied": True},
    "all": {
        "text_conv": 4, "rotary": True, "rotary_share": 0.5, "norm": "rms", "mlp": "swiglu", "qk_norm": True,
        "tied": True,
    },
}  # fmt: skip


def prior(
    stream: StreamShape,
    *patterns: str,
    width: int = 16,
    features: int = 0,
    codebook: Tensor | None = None,
    seed: int = 0,
    blank: bool = False,
    **options: Any,
) -> Prior:
    """A prior with one layer a pattern, options as in OPTIONS. Weights that start at zero are random unless `blank`."""
    config = PriorConfig(
        d_model=width,
        n_layer=len(patterns),
        n_head=2,
        attention=patterns,
        last_attention=None,
        code_features=features,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Prior(config, stream, code_vectors(stream) if codebook is None else codebook).eval()
        if not blank:
            randomise(model)
    return model


def clip_config(resnet: bool = False, **changes: Any) -> CLIPConfig:
    """A ranker of 16 x 16 pictures, or of 32 x 32 with a ResNet."""
    vit = ImageTowerConfig(resolution=16, patch=4, width=16, layers=(2,), heads=2)
    image = ImageTowerConfig(resolution=32, width=4, layers=(1, 2, 1, 1), heads=4) if resnet else vit
    text = TextTowerConfig(width=16, layers=2, heads=2)
    return CLIPConfig(**{"embed_dim": 12, "image": image, "text": text, **changes})


CAPTIONER = CaptionerConfig(width=24, layers=2, heads=3, weight=0.5)


def clip(seed: int = 0, resnet: bool = False, shape: TextShape | None = None, **changes: Any) -> CLIP:
    """Its towers are the same with a captioner and without."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(clip_config(resnet, **changes), shape or TextShape(length=6, vocab_size=20)).eval()
        for p in model.parameters():  # zeros and ones too are random
            if p.ndim == 1:
                p.data += 0.2 * torch.randn_like(p)
    if model.captioner is not None:
        model.load_state_dict(clip(seed, resnet, shape, **{**changes, "captioner": None}).state_dict(), strict=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            randomise(model.captioner)
    return model


def code_vectors(stream: StreamShape, seed: int = 0) -> Tensor:
    """(K, 3), an image tokenizer's vectors of its codes."""
    return 5 + 2 * torch.randn(stream.codebook_size, 3, generator=seeded(seed))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
        else:
            std = 0.7 if "embedding" in name or "position" in name else 1 / math.sqrt(p.shape[1])
            p.copy_(std * torch.randn_like(p))


def off_distribution(draws: Callable[[Prior], Decoder]) -> float:
    """The largest difference of shares of a picture's only code, of 4,000 drawn by what `draws` makes of a model."""
    stream, n = shape(grid=1, text_length=2, codebook=6), 4000
    model, text = prior(stream, "full", seed=1), texts(1, stream)
    with torch.no_grad():
        p = model(text, torch.zeros(1, 1).long())[1][0, 0].softmax(-1)
    drawn = draw_codes(draws(model), text, [0] * n, candidate_uniforms(0, range(n), 1), Settings())
    return float((drawn.flatten().bincount(minlength=6) / n - p).abs().max())


def texts(count: int, stream: StreamShape, seed: int = 0) -> Tensor:
    """(count, T) text tokens, pads among them."""
    return torch.randint(stream.text_vocab_size + 1, (count, stream.text_length), generator=seeded(seed))


def codes(count: int, stream: StreamShape, seed: int = 0) -> Tensor:
    """(count, N) codes."""
    return torch.randint(stream.codebook_size, (count, stream.image_length), generator=seeded(seed + 1))


class ToyStage:
    """A small network learns to rotate vectors; the batch of step `poison` is infinite."""

    name = "toy"

    def __init__(self, poison: int | None = None, batch_size: int = 8):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.poison, self.batch_size = poison, batch_size
        self.closed = False
        self.validated: list[float] = []

    def batches(self, start_step: int, rank: int = 0, world: int = 1) -> Generator[Tensor, None, None]:
        step = start_step
        try:
            while True:
                x = torch.randn(self.batch_size, 4, generator=seeded(step))
                yield x / 0 if step == self.poison else x
                step += 1
        finally:
            self.closed = True

    def parts(self, batch: Tensor, count: int) -> list[Tensor]:
        return list(batch.chunk(count))

    def loss(self, batch: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = (self.model(batch) - batch.roll(1, dims=1)).square().mean()
        return loss, {"doubled": 2 * loss.detach()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        x = torch.randn(32, 4, generator=seeded(-1))
        with torch.no_grad():
            self.validated.append((model(x) - x.roll(1, dims=1)).square().mean().item())
        return {"loss": self.validated[-1]}

    def sheet(self, model: nn.Module) -> Image.Image:
        return Image.new("RGB", (2, 2))
