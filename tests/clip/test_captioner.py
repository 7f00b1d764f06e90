import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from armchair.clip.captioner import Captioner, CaptionerConfig
from armchair.clip.model import CLIP, TextShape
from armchair.errors import RequestError
from armchair.train.optim import make_optimizer, parameter_groups
from armchair.train.recipe import FitConfig

END, BEGIN = 19, 20
TOKENS = torch.tensor([[3, 5, END, END, END, END], [7, 1, 2, 4, 6, END], [END, END, END, END, END, END]])


def model(**changes) -> CLIP:
    return tiny.clip(captioner=tiny.CAPTIONER, **changes)


def states_of(model: CLIP, count: int = 3) -> Tensor:
    with torch.no_grad():
        return model.image_states(tiny.pictures(count, model.config.image.resolution))


def dense(x: Tensor, linear: nn.Linear) -> Tensor:
    return linear.weight @ x + linear.bias


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def look(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    size = len(query) // heads
    found = []
    for h in range(0, len(query), size):
        scores = torch.stack([query[h : h + size] @ k[h : h + size] for k in keys]) / math.sqrt(size)
        found.append(sum(p * v[h : h + size] for p, v in zip(scores.softmax(0), values, strict=True)))
    return torch.cat(found)


def literal(captioner: Captioner, seen: Tensor, tokens: list[int]) -> list[float]:
    """log p of each token, one position and one head at a time; every position is computed anew for each token."""
    found = []
    for t, token in enumerate(tokens):
        before = [BEGIN, *tokens[:t]]
        stream = [captioner.embedding.weight[k] + captioner.position[i] for i, k in enumerate(before)]
        for block in captioner.blocks:
            qkv = [dense(norm(x, block.attention_norm), block.attention.qkv).chunk(3) for x in stream]
            for i in range(len(stream)):
                keys, values = [k for _, k, _ in qkv[: i + 1]], [v for _, _, v in qkv[: i + 1]]
                stream[i] = stream[i] + dense(look(qkv[i][0], keys, values, 3), block.attention.out)
                query = dense(norm(stream[i], block.cross_norm), block.cross.query)
                keys, values = ([dense(s, layer) for s in seen] for layer in (block.cross.key, block.cross.value))
                stream[i] = stream[i] + dense(look(query, keys, values, 3), block.cross.out)
                h = dense(norm(stream[i], block.mlp_norm), block.mlp_in)
                stream[i] = stream[i] + dense(h * torch.sigmoid(1.702 * h), block.mlp_out)
        found.append(float(dense(norm(stream[-1], captioner.norm), captioner.head).log_softmax(0)[token]))
    return found


@torch.no_grad()
def test_log_p_is_that_of_a_literal_captioner():
    m = model()
    states = states_of(m)
    found, counts = m.captioner(states, TOKENS)
    assert counts.tolist() == [3, 6, 1] and found.shape == (3, 6)
    for row, said in enumerate(([3, 5, END], [7, 1, 2, 4, 6, END], [END])):
        expected = literal(m.captioner, states[row], said)
        torch.testing.assert_close(found[row], torch.tensor(expected + [0.0] * (6 - len(said))), rtol=1e-4, atol=1e-4)
        mean = m.caption_log_prob(states, TOKENS)[row]
        assert float(mean) == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@torch.no_grad()
def test_a_token_changes_what_comes_after_it_and_nothing_before():
    m = model()
    states = states_of(m)
    before, _ = m.captioner(states, TOKENS)
    for k in range(5):
        other = TOKENS.clone()
        other[1, k] = 9
        after, _ = m.captioner(states, other)
        torch.testing.assert_close(after[1, :k], before[1, :k])
        assert (after[1, k:] - before[1, k:]).abs().min() > 1e-4


@torch.no_grad()
def test_what_comes_after_the_end_does_not_count():
    m = model()
    states = states_of(m)
    noise = TOKENS.clone()
    noise[0, 3:] = torch.tensor([1, END, 3])
    torch.testing.assert_close(m.caption_log_prob(states, noise), m.caption_log_prob(states, TOKENS))


@torch.no_grad()
def test_a_caption_is_as_likely_alone_as_beside_a_longer_one():
    m = model()
    states = states_of(m)
    together = m.caption_log_prob(states, TOKENS)
    for row in range(3):
        alone = m.caption_log_prob(states[row : row + 1], TOKENS[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1])
    assert len({round(float(x), 3) for x in m.caption_log_prob(states, TOKENS[:1].expand(3, -1))}) == 3  # pictures tell


def test_in_training_the_numbers_and_gradients_are_those_of_the_library_kernel(monkeypatch):
    m = model().train()
    images = tiny.pictures(3, 16)

    def gradients() -> list[Tensor]:
        m.zero_grad()
        loss = -m.caption_log_prob(m.image_states(images), TOKENS).sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in m.parameters() if p.grad is not None)]

    ours = gradients()
    kernel = lambda q, k, v, mask, causal: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
    monkeypatch.setattr("armchair.clip.block.attend", kernel)
    theirs = gradients()
    captioners = len(list(m.captioner.parameters()))
    assert len(ours) > captioners + 20  # the image tower learns from captions too
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_at_the_start_every_token_is_as_likely_as_any_other():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = CLIP(tiny.clip_config(captioner=tiny.CAPTIONER), TextShape(length=6, vocab_size=20))
        torch.manual_seed(0)
        plain = CLIP(tiny.clip_config(), TextShape(length=6, vocab_size=20))
    log_p = m.caption_log_prob(states_of(m), TOKENS)
    torch.testing.assert_close(log_p, torch.full((3,), -math.log(20)))
    for name, w in plain.state_dict().items():  # the towers start as they do without a captioner
        assert torch.equal(m.state_dict()[name], w)


@torch.no_grad()
def test_the_cosine_is_what_it_is_without_a_captioner():
    m, plain = model(), tiny.clip()
    images = tiny.pictures(4, 16)
    with_states = m.encode_states(m.image_states(images))
    assert torch.equal(m.encode_images(images), plain.encode_images(images))
    torch.testing.assert_close(with_states, m.encode_images(images))
    assert plain.captioner is None and plain.caption_weight == 0 and m.caption_weight == 0.5


@pytest.mark.parametrize("matrix_scale", [None, 3.0])
def test_its_matrices_are_trained_as_those_of_the_towers(matrix_scale):
    m = model()
    names = {id(p): name for name, p in m.named_parameters()}
    groups = parameter_groups(m, 0.1, matrix_scale=matrix_scale)
    found = {names[id(p)]: g for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    hidden = {"attention.qkv": 3, "attention.out": 1, "mlp_in": 1, "mlp_out": 1}
    hidden |= {f"cross.{part}": 1 for part in ("query", "key", "value", "out")}
    for name, group in found.items():
        if not name.startswith("captioner."):
            continue
        part = name.removeprefix("captioner.").removesuffix(".weight").split(".", 2)[-1]
        if name.endswith(".weight") and part in hidden and name.startswith("captioner.blocks."):
            expected = (0.1, 1.0, 0) if matrix_scale is None else (0.1, 3.0, hidden[part])
        else:
            expected = (0.1 if name == "captioner.head.weight" else 0.0, 1.0, 0)
        assert (group["weight_decay"], group["lr_scale"], group["matrices"]) == expected, name


def test_its_width_is_that_of_the_image_tower_unless_said():
    config = CaptionerConfig(layers=1, heads=2)
    with torch.device("meta"):
        m = CLIP(tiny.clip_config(captioner=config), TextShape(length=6, vocab_size=20))
    assert m.captioner is not None and m.captioner.head.in_features == 16
    assert model().captioner.head.in_features == 24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptionerConfig(heads=0), "heads: expected at least 1, got 0"),
        (lambda: CaptionerConfig(width=0), "width: expected at least 1, or null"),
        (lambda: CaptionerConfig(weight=-0.1), "weight: expected 0 or more, got -0.1"),
        (lambda: tiny.clip_config(captioner=CaptionerConfig(heads=5)), "captioner: width 16 is not a multiple"),
        (lambda: tiny.clip_config(True, captioner=CaptionerConfig()), "captioner: it reads .* layers of a ResNet"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_a_captioner_learns_which_of_two_colours_is_on_the_left():
    """What tells them apart is the order of words and of places; all four words are in each caption."""
    left, right, red, blue = 1, 2, 3, 4
    g = tiny.seeded(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny.clip_config(activation="gelu", captioner=CaptionerConfig(layers=2, heads=2))
        m = CLIP(config, TextShape(length=6, vocab_size=20))
    training = FitConfig(steps=150, batch_size=32, lr=4e-3, matrix_lr=0.02, beta2=0.98, eps=1e-6, precision="fp32")
    optimizer = make_optimizer(m, training, torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = training.lr * group["lr_scale"]

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, true captions `COLOUR SIDE COLOUR`, and the same with the side turned round."""
        is_red = torch.rand(count, generator=g) < 0.5
        colours = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # blue, red
        halves = torch.stack([colours[is_red.long()], colours[1 - is_red.long()]], 2)  # (count, 3, 2)
        images = halves.repeat_interleave(8, 2)[:, :, None].expand(-1, -1, 16, -1).clone()
        images += 0.1 * torch.rand(images.shape, generator=g)
        first_red = torch.rand(count, generator=g) < 0.5
        side = torch.where(first_red == is_red, left, right)
        first, second = torch.where(first_red, red, blue), torch.where(first_red, blue, red)
        ends = torch.full((count, 3), END)
        true = torch.cat([torch.stack([first, side, second], 1), ends], 1)
        return images.clamp(0, 1), true, torch.where(true == left, right, torch.where(true == right, left, true))

    for _ in range(training.steps):
        images, true, _ = batch(training.batch_size)
        optimizer.zero_grad()
        (-m.caption_log_prob(m.image_states(images), true).mean()).backward()
        optimizer.step()
    images, true, turned = batch(200)
    with torch.no_grad():
        states = m.image_states(images)
        told = m.caption_log_prob(states, true) > m.caption_log_prob(states, turned)
    assert float(told.float().mean()) > 0.95
