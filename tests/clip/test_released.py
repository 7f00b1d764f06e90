"""Released weights give what the published description says they do, computed here one head and one row at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from armchair.clip.model import CLIP, MAX_LOGIT_SCALE
from armchair.clip.released import config_of, renamed
from armchair.errors import RequestError
from released_weights import LENGTH, VOCAB, released

TOKENS = torch.tensor([[28, 3, 4, 29, 0, 0, 0], [28, 5, 6, 7, 8, 9, 29]])
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


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
