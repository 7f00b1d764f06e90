"""Random weights in the names of the released CLIP models."""

import torch
from torch import Tensor

import tiny

LENGTH, VOCAB, EMBED = 7, 30, 24


def released(resnet: bool, layers: tuple[int, ...], width: int = 128, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Random weights in the released names: 64 x 64 pixels, patches of 16; text width 64."""
    g = tiny.seeded(3)
    w: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float | None = None) -> None:
        w[name] = torch.randn(*shape, generator=g) * (scale or 1 / max(1, shape[-1]) ** 0.5)

    def norm(name: str, n: int, batch: bool = False) -> None:
        w[f"{name}.weight"] = 1 + 0.3 * torch.randn(n, generator=g)
        w[f"{name}.bias"] = 0.3 * torch.randn(n, generator=g)
        if batch:
            w[f"{name}.running_mean"] = 0.3 * torch.randn(n, generator=g)
            w[f"{name}.running_var"] = 0.5 + torch.rand(n, generator=g)
            w[f"{name}.num_batches_tracked"] = torch.tensor(5)

    def linear(name: str, n_in: int, n_out: int) -> None:
        put(f"{name}.weight", n_out, n_in)
        put(f"{name}.bias", n_out, scale=0.1)

    def block(start: str, n: int) -> None:
        put(f"{start}.attn.in_proj_weight", 3 * n, n)
        put(f"{start}.attn.in_proj_bias", 3 * n, scale=0.1)
        linear(f"{start}.attn.out_proj", n, n)
        linear(f"{start}.mlp.c_fc", n, 4 * n)
        linear(f"{start}.mlp.c_proj", 4 * n, n)
        norm(f"{start}.ln_1", n)
        norm(f"{start}.ln_2", n)

    if resnet:
        stem = ((3, width // 2), (width // 2, width // 2), (width // 2, width))
        for i, (a, b) in enumerate(stem, start=1):
            put(f"visual.conv{i}.weight", b, a, 3, 3, scale=(9 * a) ** -0.5)
            norm(f"visual.bn{i}", b, batch=True)
        n_in = width
        for stage, depth in enumerate(layers):
            for i in range(depth):
                start, mid = f"visual.layer{stage + 1}.{i}", width * 2**stage
                put(f"{start}.conv1.weight", mid, n_in, 1, 1, scale=n_in**-0.5)
                put(f"{start}.conv2.weight", mid, mid, 3, 3, scale=(9 * mid) ** -0.5)
                put(f"{start}.conv3.weight", 4 * mid, mid, 1, 1, scale=mid**-0.5)
                for k, n in ((1, mid), (2, mid), (3, 4 * mid)):
                    norm(f"{start}.bn{k}", n, batch=True)
                if i == 0:
                    put(f"{start}.downsample.0.weight", 4 * mid, n_in, 1, 1, scale=n_in**-0.5)
                    norm(f"{start}.downsample.1", 4 * mid, batch=True)
                n_in = 4 * mid
        put("visual.attnpool.positional_embedding", 5, n_in)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"visual.attnpool.{name}", n_in, n_in)
        linear("visual.attnpool.c_proj", n_in, EMBED)
    else:
        put("visual.conv1.weight", width, 3, 16, 16, scale=0.05)
        put("visual.class_embedding", width)
        put("visual.positional_embedding", 17, width, scale=0.5)
        put("visual.proj", width, EMBED)
        norm("visual.ln_pre", width)
        norm("visual.ln_post", width)
        for i in range(layers[0]):
            block(f"visual.transformer.resblocks.{i}", width)
    put("positional_embedding", LENGTH, 64, scale=0.5)
    put("token_embedding.weight", vocab, 64, scale=0.5)
    put("text_projection", 64, EMBED)
    norm("ln_final", 64)
    for i in range(2):
        block(f"transformer.resblocks.{i}", 64)
    w["logit_scale"] = torch.tensor(2.5)
    return w
