"""CLIP: an image tower and a text tower into one space, where a picture is near its caption (Radford et al., 2021).

"Learning Transferable Visual Models From Natural Language Supervision", section 2.4 and table 20. DALL·E ranks its
candidates with it (paper, section 2.6). The towers are those of the released models, so that their weights fit.

Legend: B batch, R resolution, S grid side, L text length, D width, E size of the shared space.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.clip.block import ACTIVATIONS, Block
from armchair.clip.captioner import Captioner, CaptionerConfig
from armchair.config import check_name
from armchair.errors import RequestError

MAX_LOGIT_SCALE = 100.0  # the similarity's factor is kept below, as in the paper, so that training stays stable


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """The image tower: one number of `layers` is a vision transformer, four are the stages of a ResNet.

    Defaults are those of ViT-B/32. A ResNet's `width` is that of its stem, 64 in RN50; `patch` is the transformer's.
    """

    resolution: int = 224
    patch: int = 32
    width: int = 768
    layers: tuple[int, ...] = (12,)
    heads: int = 12  # of the transformer, or of a ResNet's attention pooling (32 in RN50)

    def __post_init__(self) -> None:
        for name in ("resolution", "patch", "width", "heads"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if len(self.layers) not in (1, 4) or min(self.layers) < 1:
            raise RequestError(f"layers: expected one number (transformer) or four (ResNet), got {list(self.layers)}")
        if self.resolution % self.factor:
            raise RequestError(f"resolution {self.resolution} is not a multiple of {self.factor} pixels")
        if (self.width if self.is_transformer else 32 * self.width) % self.heads:
            raise RequestError(f"width {self.width} cannot be shared among {self.heads} heads")
        if not self.is_transformer and self.width % 2:
            raise RequestError(f"width: expected an even number for a ResNet, got {self.width}")

    @property
    def is_transformer(self) -> bool:
        return len(self.layers) == 1

    @property
    def factor(self) -> int:
        """Pixels that a position of the last grid covers on a side."""
        return self.patch if self.is_transformer else 32

    @property
    def grid(self) -> int:
        return self.resolution // self.factor


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The text tower; defaults are those of the released models but for vocabulary and length, which data decides."""

    width: int = 512
    layers: int = 12
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise RequestError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of the ranker."""

    kind: str = "clip"
    embed_dim: int = 512
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    activation: str = "quick_gelu"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of the pixels, as the released models have it
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    captioner: CaptionerConfig | None = None  # none: the cosine alone scores, as in CLIP

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ["clip"])
        if self.embed_dim < 1:
            raise RequestError(f"embed_dim: expected at least 1, got {self.embed_dim}")
        check_name("activation", self.activation, ACTIVATIONS)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise RequestError(f"{name}: expected three numbers, got {len(getattr(self, name))}")
        if self.captioner is None:
            return
        if not self.image.is_transformer:
            raise RequestError(
                "captioner: it reads the states of a vision transformer, and these are the layers of a ResNet; give "
                "image.layers one number, or leave the captioner out"
            )
        if (width := self.captioner.width_over(self.image.width)) % self.captioner.heads:
            raise RequestError(f"captioner: width {width} is not a multiple of heads {self.captioner.heads}")


@dataclass(frozen=True)
class TextShape:
    """What the text tokenizer decides: L positions, one of them for an end; V ids, of which the last is the end."""

    length: int
    vocab_size: int

    @classmethod
    def of_captions(cls, length: int, vocab_size: int) -> "TextShape":
        """For captions of `length` tokens out of `vocab_size`, filled up with a pad that is one past these: the end."""
        return cls(length=length + 1, vocab_size=vocab_size + 1)

    @property
    def end_id(self) -> int:
        return self.vocab_size - 1

    def with_end(self, captions: Tensor) -> Tensor:
        """Captions (B, L - 1) as `of_captions` takes them -> (B, L): a full one has its end too."""
        return F.pad(captions, (0, 1), value=self.end_id)


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (S * S, D), which positions start as; mean square 1/2.

    From half a wave over the grid to one of four positions, so that near positions are alike and every product of two
    tells how far apart they are (Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022, have them too).
    Positions drawn at random told of nothing, and no ranker of a thousand updates learned them from there.
    """
    quarter = -(-width // 4)
    angle = torch.arange(side)[:, None] / side * math.pi * (side / 2) ** torch.linspace(0, 1, quarter)  # (S, D / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], 2)
    return both.flatten(0, 1)[:, :width].contiguous()


class VisionTransformer(nn.Module):
    """Patches and one token of its own, whose last state is the picture's."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int, activation: str):
        super().__init__()
        c, scale = config, config.width**-0.5
        self.patches = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.token = nn.Parameter(scale * torch.randn(c.width))
        self.position = nn.Parameter(F.pad(waves(c.grid, c.width), (0, 0, 1, 0)))
        self.input_norm = nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, activation) for _ in range(c.layers[0]))
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Parameter(scale * torch.randn(c.width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, E)."""
        return self.norm(self._stream(pixels)[:, 0]) @ self.projection

    def states(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, 1 + S * S, D), the picture's own state first."""
        return self.norm(self._stream(pixels))

    def of_states(self, states: Tensor) -> Tensor:
        """What `forward` makes of pixels from their `states`: -> (B, E)."""
        return states[:, 0].contiguous() @ self.projection

    def _stream(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # (B, S * S, D)
        token = self.token.to(x.dtype).expand(len(x), 1, -1)
        x = self.input_norm(torch.cat([token, x], 1) + self.position)
        for block in self.blocks:
            x = block(x, causal=False)
        return x


class Bottleneck(nn.Module):
    """A ResNet's block; where it halves the picture, pixels are averaged first and not skipped."""

    def __init__(self, n_in: int, n_mid: int, stride: int):
        super().__init__()
        n_out = 4 * n_mid
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_mid, 1, bias=False), nn.BatchNorm2d(n_mid)
        self.conv2, self.norm2 = nn.Conv2d(n_mid, n_mid, 3, padding=1, bias=False), nn.BatchNorm2d(n_mid)
        self.conv3, self.norm3 = nn.Conv2d(n_mid, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.stride = stride
        self.skip: nn.Sequential | None = None
        if stride > 1 or n_in != n_out:
            self.skip = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        h = self.norm3(self.conv3(self._halved(h)))
        return F.relu(h + (x if self.skip is None else self.skip(self._halved(x))))

    def _halved(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class ResNet(nn.Module):
    """The modified ResNet: a stem of three convolutions, averages instead of strides, attention for pooling."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int):
        super().__init__()
        w = config.width
        stem = ((3, w // 2, 2), (w // 2, w // 2, 1), (w // 2, w, 1))
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride=s, padding=1, bias=False) for a, b, s in stem)
        self.stem_norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in stem)
        blocks, n_in = [], w
        for stage, depth in enumerate(config.layers):
            for i in range(depth):
                blocks.append(Bottleneck(n_in, w * 2**stage, 2 if stage and i == 0 else 1))
                n_in = 4 * w * 2**stage
        self.blocks = nn.ModuleList(blocks)
        self.position = nn.Parameter(torch.randn(config.grid**2 + 1, n_in) / math.sqrt(n_in))
        self.heads = config.heads
        self.query, self.key, self.value = (nn.Linear(n_in, n_in) for _ in range(3))
        self.projection = nn.Linear(n_in, embed_dim)
        for linear in (self.query, self.key, self.value, self.projection):
            nn.init.normal_(linear.weight, std=n_in**-0.5)
        for block in blocks:
            nn.init.zeros_(block.norm3.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, E)."""
        x = pixels
        for conv, norm in zip(self.stem, self.stem_norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)  # (B, S * S, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.position
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.query, x[:, :1]), (self.key, x), (self.value, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.projection(pooled.transpose(1, 2).flatten(1))


class TextTransformer(nn.Module):
    """A causal transformer; the state at the first end is the caption's."""

    def __init__(self, config: TextTowerConfig, shape: TextShape, embed_dim: int, activation: str):
        super().__init__()
        c = config
        self.end_id = shape.end_id
        self.embedding = nn.Embedding(shape.vocab_size, c.width)
        self.position = nn.Parameter(0.1 * torch.randn(shape.length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, activation) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Parameter(c.width**-0.5 * torch.randn(c.width, embed_dim))
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) with an end in each row -> (B, E)."""
        end = (tokens != self.end_id).long().cumprod(1).sum(1).clamp(max=tokens.shape[1] - 1)
        longest = int(end.max()) + 1  # attention is causal: nobody sees what comes after the longest caption
        x = self.embedding(tokens[:, :longest]) + self.position[:longest]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x[torch.arange(len(x), device=x.device), end]) @ self.projection


class CLIP(nn.Module):
    """The two towers and, where the config has one, a captioner that says what the image tower saw."""

    def __init__(self, config: CLIPConfig, shape: TextShape):
        super().__init__()
        c = config
        self.config, self.shape = config, shape
        if c.image.is_transformer:
            self.image: nn.Module = VisionTransformer(c.image, c.embed_dim, c.activation)
        else:
            self.image = ResNet(c.image, c.embed_dim)
        self.text = TextTransformer(c.text, shape, c.embed_dim, c.activation)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.bias = nn.Parameter(torch.tensor(-10.0))  # of the sigmoid loss: few pairs belong together
        self._initialise()
        self.captioner: Captioner | None = None
        if c.captioner is not None:  # last, so that the towers start as they would without
            self.captioner = Captioner(
                c.captioner,
                length=shape.length,
                vocab_size=shape.vocab_size,
                seen_width=c.image.width,
                activation=c.activation,
            )

    def _initialise(self) -> None:
        for tower, layers in ((self.image, self.config.image.layers[0]), (self.text, self.config.text.layers)):
            for block in tower.modules():
                if isinstance(block, Block):
                    width = block.mlp_in.in_features
                    into_stream = width**-0.5 * (2 * layers) ** -0.5
                    nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
                    nn.init.normal_(block.attention.out.weight, std=into_stream)
                    nn.init.normal_(block.mlp_in.weight, std=(2 * width) ** -0.5)
                    nn.init.normal_(block.mlp_out.weight, std=into_stream)
                    for linear in (block.attention.qkv, block.attention.out, block.mlp_in, block.mlp_out):
                        nn.init.zeros_(linear.bias)

    def is_hidden_matrix(self, name: str) -> bool:
        """Whether the named parameter is a matrix or kernel within the blocks."""
        return ".blocks." in name and name.endswith("weight") and "norm" not in name and "skip.1" not in name

    @property
    def scale(self) -> Tensor:
        """The factor of the similarity, the inverse of a temperature; 100 at most."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    @property
    def caption_weight(self) -> float:
        """What a bit a token of log2 p(caption | picture) counts beside the cosine; 0 without a captioner."""
        return 0.0 if self.config.captioner is None else self.config.captioner.weight

    def encode_images(self, images: Tensor) -> Tensor:
        """images: (B, 3, any, any) float in [0, 1] -> (B, E) float32 of length one; other sizes are resized."""
        return F.normalize(self.image(self._pixels(images)).float(), dim=-1)

    def image_states(self, images: Tensor) -> Tensor:
        """images: as for `encode_images` -> (B, 1 + S * S, D), the states that a captioner looks at.

        For a vision transformer only. `encode_states` makes of them what `encode_images` makes of the images.
        """
        assert isinstance(self.image, VisionTransformer)
        return self.image.states(self._pixels(images))

    def encode_states(self, states: Tensor) -> Tensor:
        """states: (B, 1 + S * S, D) of `image_states` -> (B, E) float32 of length one."""
        assert isinstance(self.image, VisionTransformer)
        return F.normalize(self.image.of_states(states).float(), dim=-1)

    def caption_log_prob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """log p(caption | picture), a mean over the caption's tokens and its end, in nats: (B,) float32.

        states: (B, 1 + S * S, D) of `image_states`; tokens: (B, L) int64, an end in each row.
        """
        assert self.captioner is not None
        log_p, counts = self.captioner(states, tokens)
        return log_p.sum(1) / counts

    def _pixels(self, images: Tensor) -> Tensor:
        size = self.config.image.resolution
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return (images - mean) / std

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, an end in each row -> (B, E) float32 of length one."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Every picture against every caption: (B, 3, R, R), (C, L) -> logits (B, C)."""
        return self.scale * self.encode_images(images) @ self.encode_text(tokens).T
