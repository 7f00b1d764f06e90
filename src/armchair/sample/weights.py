"""A prior's weights as drawing multiplies with them, in 32 bits or with the matrices in eight.

Legend: T text length, K codebook, D width, H heads.

The engine packs these, and an exported bundle holds them, so that both draw the same codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from armchair.bundle import Bundle
from armchair.config import check_name, from_dict
from armchair.errors import BundleError, RequestError
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior, PriorConfig
from armchair.runtime import unfilled

FORMATS = ("int8",)  # that bundles are exported in
INT8_MOST = 127
TINY = torch.tensor(1e-14)  # the step of zeros


def whole_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) float32 -> whole numbers from -127 to 127 (..., C), still float32, and their step, (..., 1)."""
    step = torch.add(TINY, x.abs().amax(-1, keepdim=True), alpha=1 / INT8_MOST)
    return x.div(step).round_(), step


def in_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) float32 -> the same whole numbers as int8, and their step, (..., 1)."""
    whole, step = whole_numbers(x)
    return whole.to(torch.int8), step


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What bundle.json says of a bundle that was exported: the form of its prior, and the bundle that it came from."""

    format: str
    name: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_name("format", self.format, FORMATS)


def exported(bundle: Bundle) -> Exported | None:
    """Of a bundle that was trained, None. Raises BundleError for an export that this version does not know."""
    if "exported" not in bundle.info:
        return None
    try:
        return from_dict(Exported, bundle.info["exported"], "exported")
    except RequestError as error:
        raise BundleError(f"{bundle.path}: bundle.json: {error}") from None


@dataclass(frozen=True, kw_only=True)
class DrawingWeights:
    """Tensors by the names that they have in a folded `Prior`; queries have their scale, 1 / sqrt(D / H), in them.

    Where queries are normalised, it is their gain that has it.

    A matrix in eight bits is whole numbers, int8 (out, in), and has its step beside it, `NAME.step`, float32 (out,).
    """

    config: PriorConfig  # folded
    shape: StreamShape
    tensors: Mapping[str, Tensor]


def matrices(config: PriorConfig) -> list[str]:
    """The names of all that drawing multiplies with, which is what eight bits are for."""
    parts = ("attention.qkv", "attention.out", "mlp_in", "mlp_out")
    return [*(f"blocks.{i}.{part}" for i in range(config.n_layer) for part in parts), "image_head"]


def drawing_weights(prior: Prior) -> DrawingWeights:
    """The weights of a prior, in 32 bits; what is not changed is shared with it."""
    prior = prior.folded()
    tensors = _scaled(prior.state_dict(), prior.config, (prior.config.d_model // prior.config.n_head) ** -0.5)
    return DrawingWeights(config=prior.config, shape=prior.shape, tensors=tensors)


def rounded(weights: DrawingWeights) -> DrawingWeights:
    """The same with the matrices in eight bits, as the engine rounds them."""
    tensors = dict(weights.tensors)
    for name in matrices(weights.config):
        codes, step = in_eight_bits(tensors[f"{name}.weight"])
        tensors |= {f"{name}.weight": codes, f"{name}.step": step[:, 0]}
    return replace(weights, tensors=tensors)


def read_rounded(tensors: Mapping[str, Tensor], config: PriorConfig, shape: StreamShape) -> DrawingWeights:
    """Matrices in eight bits as they were stored, for a recipe's config; no number is copied.

    Raises RequestError for a tensor that is missing, left over, or of another shape or type.
    """
    config = config.folded()
    expected = _sizes(config, shape)
    whole = {f"{name}.weight" for name in matrices(config)}
    expected |= {f"{name}.step": expected[f"{name}.bias"] for name in matrices(config)}
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise RequestError(f"{wrong[0]} is {'missing' if wrong[0] in expected else 'not known'}")
    for name, size in expected.items():
        w = tensors[name]
        if tuple(w.shape) != size:
            raise RequestError(f"{name}: expected the shape {size}, got {tuple(w.shape)}")
        if w.dtype != torch.int8 if name in whole else not w.is_floating_point():
            wanted = "whole numbers of eight bits" if name in whole else "floating point"
            raise RequestError(f"{name}: expected {wanted}, got {w.dtype}")
    return DrawingWeights(config=config, shape=shape, tensors=tensors)


def prior_of(weights: DrawingWeights) -> Prior:
    """A prior in 32 bits that computes with these weights, for all that is not drawing on a CPU."""
    tensors = {name: w.float() for name, w in weights.tensors.items()}
    for name in matrices(weights.config):
        if (step := tensors.pop(f"{name}.step", None)) is not None:
            tensors[f"{name}.weight"] *= step[:, None]
    config = weights.config
    with unfilled():
        prior = Prior(config, weights.shape)
    prior.load_state_dict(_scaled(tensors, config, (config.d_model // config.n_head) ** 0.5))
    return prior.eval().requires_grad_(False)


def _scaled(tensors: Mapping[str, Tensor], config: PriorConfig, scale: float) -> dict[str, Tensor]:
    """The same with the queries times `scale`: a third of what qkv gives, or the gain that they are normalised to."""
    factors = torch.ones(3 * config.d_model)
    factors[: config.d_model] = scale
    found = dict(tensors)
    for i in range(config.n_layer):
        attention = f"blocks.{i}.attention"
        if config.qk_norm:
            found[f"{attention}.query_norm.weight"] = found[f"{attention}.query_norm.weight"] * scale
            continue
        found[f"{attention}.qkv.weight"] = found[f"{attention}.qkv.weight"] * factors[:, None]
        found[f"{attention}.qkv.bias"] = found[f"{attention}.qkv.bias"] * factors
    return found


def _sizes(config: PriorConfig, shape: StreamShape) -> dict[str, tuple[int, ...]]:
    """The shapes of a folded prior's tensors. Made without one: that would fill as many numbers as it has."""
    d, texts = config.d_model, shape.text_vocab_size
    tables = {"text_embedding": texts + shape.text_length + 1, "text_position": shape.text_length + 1}
    tables |= {"image_embedding": shape.codebook_size, "row_embedding": shape.grid, "column_embedding": shape.grid}
    sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, d) for name, rows in tables.items()}
    if config.text_conv:
        sizes["text_conv"] = (config.text_conv - 1, d)
    linear, norms = {"text_head": (texts + 1, d), "image_head": (shape.codebook_size, d)}, ["norm"]
    gains: dict[str, tuple[int, ...]] = {}
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        linear |= {f"{block}.attention.qkv": (3 * d, d), f"{block}.attention.out": (d, d)}
        linear |= {f"{block}.mlp_in": (config.hidden_inputs, d), f"{block}.mlp_out": (d, config.hidden)}
        norms += [f"{block}.attention_norm", f"{block}.mlp_norm"]
        if config.qk_norm:
            gains |= {f"{block}.attention.{name}_norm.weight": (d // config.n_head,) for name in ("query", "key")}
    for name, size in linear.items():
        sizes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    parts = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return sizes | gains | {f"{name}.{part}": (d,) for name in norms for part in parts}
