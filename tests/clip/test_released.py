"""Released weights give what the published description says they do, computed here one head and one row at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from armchair.clip.model import CLIP, MAX_LOGIT_SCALE
from armchair.clip.released import config_of, renamed
from armchair.errors import RequestError

LENGTH, VOCAB, EMBED = 7, 30, 24
TOKENS = torch.tensor([[28, 3, 4, 29, 0, 0, 0], [28, 5, 6, 7, 8, 9, 29]])
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def released(resnet: bool, layers: tuple[int, ...], width: int = 128) -> dict[str, Tensor]:
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
    put("token_embedding.weight", VOCAB, 64, scale=0.5)
    put("text_projection", 64, EMBED)
    norm("ln_final", 64)
    for i in range(2):
        block(f"transformer.resblocks.{i}", 64)
    w["logit_scale"] = torch.tensor(2.5)
    return w


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(T, D) queries and (M, D) keys, heads of 64, one head and one query at a time."""
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(0, q.shape[1], 64):
            seen = slice(0, i + 1 if causal else len(k))
            p = (k[seen, h : h + 64] @ q[i, h : h + 64] / 8).softmax(0)
            heads.append(p @ v[seen, h : h + 64])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def transform(x: Tensor, w: dict[str, Tensor], start: str, layers: int, causal: bool) -> Tensor:
    for i in range(layers):
        b = f"{start}resblocks.{i}"
        h = layer_norm(x, w, f"{b}.ln_1")
        q, k, v = (h @ w[f"{b}.attn.in_proj_weight"].T + w[f"{b}.attn.in_proj_bias"]).chunk(3, -1)
        a = attention(q, k, v, causal)
        x = x + a @ w[f"{b}.attn.out_proj.weight"].T + w[f"{b}.attn.out_proj.bias"]
        h = layer_norm(x, w, f"{b}.ln_2") @ w[f"{b}.mlp.c_fc.weight"].T + w[f"{b}.mlp.c_fc.bias"]
        x = x + (h / (1 + (-1.702 * h).exp())) @ w[f"{b}.mlp.c_proj.weight"].T + w[f"{b}.mlp.c_proj.bias"]
    return x


def see(image: Tensor, w: dict[str, Tensor], layers: tuple[int, ...]) -> Tensor:
    x = ((image - MEAN) / STD)[None]
    if len(layers) == 1:
        patches = F.conv2d(x, w["visual.conv1.weight"], stride=16)[0].flatten(1).T
        tokens = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
        tokens = transform(layer_norm(tokens, w, "visual.ln_pre"), w, "visual.transformer.", layers[0], False)
        return layer_norm(tokens[0], w, "visual.ln_post") @ w["visual.proj"]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gain, shift = (
            w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    for i in (1, 2, 3):
        x = norm(F.conv2d(x, w[f"visual.conv{i}.weight"], stride=2 if i == 1 else 1, padding=1), f"visual.bn{i}").relu()
    x = F.avg_pool2d(x, 2)
    for stage, depth in enumerate(layers, start=1):
        for i in range(depth):
            b, stride = f"visual.layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            h = norm(F.conv2d(x, w[f"{b}.conv1.weight"]), f"{b}.bn1").relu()
            h = norm(F.conv2d(h, w[f"{b}.conv2.weight"], padding=1), f"{b}.bn2").relu()
            h = norm(F.conv2d(F.avg_pool2d(h, stride), w[f"{b}.conv3.weight"]), f"{b}.bn3")
            if f"{b}.downsample.0.weight" in w:
                x = norm(F.conv2d(F.avg_pool2d(x, stride), w[f"{b}.downsample.0.weight"]), f"{b}.downsample.1")
            x = (x + h).relu()
    tokens = x[0].flatten(1).T
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + w["visual.attnpool.positional_embedding"]
    q, k, v = (
        tokens @ w[f"visual.attnpool.{n}.weight"].T + w[f"visual.attnpool.{n}.bias"]
        for n in ("q_proj", "k_proj", "v_proj")
    )
    pooled = attention(q[:1], k, v, False)[0]
    return pooled @ w["visual.attnpool.c_proj.weight"].T + w["visual.attnpool.c_proj.bias"]


def say(tokens: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = transform(x, w, "transformer.", 2, True)
    return layer_norm(x, w, "ln_final")[int(tokens.argmax())] @ w["text_projection"]


@pytest.mark.parametrize("layers", [(2,), (1, 2, 1, 1)])
def test_released_weights_give_the_published_logits(layers):
    weights = released(len(layers) == 4, layers, 128 if len(layers) == 1 else 16)
    config, shape = config_of(weights)
    assert config.image.layers == layers and config.image.resolution == 64
    assert (shape.length, shape.vocab_size) == (LENGTH, VOCAB)
    model = CLIP(config, shape).eval()
    model.load_state_dict(renamed(weights))
    images = tiny.pictures(3, 64)
    with torch.no_grad():
        found = model(images, TOKENS)
        pictures = torch.stack([see(image, weights, layers) for image in images])
        texts = torch.stack([say(row, weights) for row in TOKENS])
        cosines = F.normalize(pictures, dim=1) @ F.normalize(texts, dim=1).T
        expected = weights["logit_scale"].exp() * cosines
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_scale_over_a_hundred_is_clamped():
    weights = {**released(False, (1,)), "logit_scale": torch.tensor(9.0)}
    model = CLIP(*config_of(weights))
    model.load_state_dict(renamed(weights))
    assert float(model.scale.detach()) == MAX_LOGIT_SCALE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("ln_final.weight"), "ln_final.weight is missing"),
        (lambda w: w.update({"visual.layer9.weight": torch.zeros(1)}), "visual.layer9.weight is unknown"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("transformer")], "transformer.resblocks.0. is missing"),
    ],
)
def test_other_weights_are_refused(change, message):
    weights = released(False, (1,))
    change(weights)
    with pytest.raises(RequestError, match=f"not the weights of a released CLIP: {message}"):
        config_of(weights)
        renamed(weights)
