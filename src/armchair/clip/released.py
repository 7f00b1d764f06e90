"""Weights of the released CLIP models, as published by OpenAI and OpenCLIP, in this package's names."""

import re
from collections.abc import Mapping

from torch import Tensor

from armchair.clip.model import CLIPConfig, ImageTowerConfig, TextShape, TextTowerConfig
from armchair.errors import RequestError

_BLOCK = {
    "attn.in_proj_weight": "attention.qkv.weight",
    "attn.in_proj_bias": "attention.qkv.bias",
    "attn.out_proj": "attention.out",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}
_NAMES = {
    "logit_scale": "log_scale",
    "text_projection": "text.projection",
    "positional_embedding": "text.position",
    "token_embedding.weight": "text.embedding.weight",
    "ln_final": "text.norm",
    "visual.proj": "image.projection",
    "visual.class_embedding": "image.token",
    "visual.positional_embedding": "image.position",
    "visual.ln_pre": "image.input_norm",
    "visual.ln_post": "image.norm",
    "visual.attnpool.positional_embedding": "image.position",
    "visual.attnpool.q_proj": "image.query",
    "visual.attnpool.k_proj": "image.key",
    "visual.attnpool.v_proj": "image.value",
    "visual.attnpool.c_proj": "image.projection",
}
_IGNORED = ("input_resolution", "context_length", "vocab_size", "logit_bias", "attn_mask")


def config_of(weights: Mapping[str, Tensor], activation: str = "quick_gelu") -> tuple[CLIPConfig, TextShape]:
    """The sizes of the model that a released state dict is of, read off its shapes; heads are 64 wide, as in them all.

    `activation` cannot be read off: OpenAI's have `quick_gelu`, most of OpenCLIP's `gelu`. Raises RequestError for a
    state dict of another kind.
    """
    try:
        width = weights["ln_final.weight"].shape[0]
        embed_dim = weights["text_projection"].shape[1]
        length, vocab_size = weights["positional_embedding"].shape[0], weights["token_embedding.weight"].shape[0]
        if "visual.proj" in weights:
            patches = weights["visual.conv1.weight"]
            grid = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
            image = ImageTowerConfig(
                resolution=grid * patches.shape[-1],
                patch=patches.shape[-1],
                width=patches.shape[0],
                layers=(_count(weights, r"visual\.transformer\.resblocks\.(\d+)\."),),
                heads=patches.shape[0] // 64,
            )
        else:
            grid = round((weights["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
            stem = weights["visual.conv3.weight"].shape[0]
            image = ImageTowerConfig(
                resolution=32 * grid,
                width=stem,
                layers=tuple(_count(weights, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
                heads=stem * 32 // 64,
            )
        text = TextTowerConfig(
            width=width, layers=_count(weights, r"transformer\.resblocks\.(\d+)\."), heads=width // 64
        )
    except KeyError as error:
        raise RequestError(f"not the weights of a released CLIP: {error.args[0]} is missing") from None
    config = CLIPConfig(embed_dim=embed_dim, image=image, text=text, activation=activation)
    return config, TextShape(length=length, vocab_size=vocab_size)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `armchair.clip.model.CLIP` from a released one. Raises RequestError for an unknown name."""
    resnet = "visual.proj" not in weights
    starts, total = {}, 0  # where each stage of a ResNet begins among the blocks
    for stage in (1, 2, 3, 4) if resnet else ():
        starts[stage] = total
        total += _count(weights, rf"visual\.layer{stage}\.(\d+)\.")
    out = {}
    for name, w in weights.items():
        if name not in _IGNORED:
            out[_rename(name, resnet, starts)] = w.float() if w.is_floating_point() else w
    out["bias"] = weights["logit_bias"].float() if "logit_bias" in weights else out["log_scale"].new_tensor(-10.0)
    return out


def _rename(name: str, resnet: bool, starts: dict[int, int]) -> str:
    if m := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
        tower = "image" if m[1] else "text"
        return f"{tower}.blocks.{m[2]}.{_longest(m[3], _BLOCK, name)}"
    if m := re.fullmatch(r"visual\.layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)", name):
        block = f"image.blocks.{starts[int(m[1])] + int(m[2])}"
        part = {"conv": f"conv{m[4]}", "bn": f"norm{m[4]}", "downsample.": f"skip.{m[4].replace('-', '')}"}[m[3]]
        return f"{block}.{part}.{m[5]}"
    if resnet and (m := re.fullmatch(r"visual\.(conv|bn)(\d)\.(.+)", name)):
        return f"image.{'stem' if m[1] == 'conv' else 'stem_norms'}.{int(m[2]) - 1}.{m[3]}"
    if name == "visual.conv1.weight":
        return "image.patches.weight"
    return _longest(name, _NAMES, name)


def _longest(name: str, table: dict[str, str], whole: str) -> str:
    for start in sorted(table, key=len, reverse=True):
        if name == start or name.startswith(f"{start}."):
            return table[start] + name[len(start) :]
    raise RequestError(f"not the weights of a released CLIP: {whole} is unknown")


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m[1]) for name in weights if (m := re.match(pattern, name))]
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return max(found) + 1
