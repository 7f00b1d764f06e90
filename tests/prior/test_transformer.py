import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS, stream_mask
from armchair.prior.sequence import StreamShape, null_text, stream_loss, text_input_ids
from armchair.prior.transformer import Dropout, Prior, PriorConfig, lookalikes, with_words_before
from armchair.train.muon import MuonAdamW
from armchair.train.optim import parameter_groups

layers = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)
grids = st.integers(1, 7)
text_lengths = st.integers(1, 6)
seeds = st.integers(0, 999)
blocks = st.sampled_from(list(tiny.OPTIONS.values()))


def cached_image_logits(model: Prior, text: Tensor, codes: Tensor) -> Tensor:
    """(B, N, K), one token after the other."""
    prompts = model.prefill(text)
    cache = model.start(prompts)
    logits = [prompts.logits]
    for j in range(codes.shape[1] - 1):
        logits.append(model.decode_step(codes[:, j], j, cache))
    return torch.stack(logits, 1)


def assert_cache_agrees(patterns: list[str], grid: int, text_length: int, seed: int, **options: Any) -> None:
    stream = tiny.shape(grid, text_length)
    model = tiny.prior(stream, *patterns, seed=seed, **options)
    text, codes = tiny.texts(2, stream, seed), tiny.codes(2, stream, seed)
    with torch.no_grad():
        whole = model(text, codes)[1]
        stepwise = cached_image_logits(model.folded(), text, codes)
    assert whole.shape == (2, grid**2, stream.codebook_size)
    assert float(whole.std()) > 0.1  # the weights are not blank
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(patterns=layers, grid=grids, text_length=text_lengths, seed=seeds, options=blocks)
def test_cached_and_uncached_logits_agree(patterns, grid, text_length, seed, options):
    assert_cache_agrees(patterns, grid, text_length, seed, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [6, 12])  # below and above the 11 x 11 window
def test_cached_and_uncached_logits_agree_for_each_pattern(pattern, grid):
    assert_cache_agrees([pattern, pattern], grid, 3, 7)


@settings(max_examples=40)
@given(patterns=layers, grid=st.integers(2, 6), text_length=text_lengths, seed=seeds, options=blocks, data=st.data())
def test_a_later_token_never_changes_an_earlier_logit(patterns, grid, text_length, seed, options, data):
    stream = tiny.shape(grid, text_length)
    model = tiny.prior(stream, *patterns, seed=seed, **options)
    text, codes = tiny.texts(1, stream, seed), tiny.codes(1, stream, seed)
    at = data.draw(st.integers(0, stream.length - 1))
    changed_text, changed_codes = text.clone(), codes.clone()
    if at < text_length:
        changed_text[0, at] = (text[0, at] + 1) % (stream.text_vocab_size + 1)
    else:
        changed_codes[0, at - text_length] = (codes[0, at - text_length] + 1) % stream.codebook_size
    with torch.no_grad():
        before_text, before_image = model(text, codes)
        after_text, after_image = model(changed_text, changed_codes)
    torch.testing.assert_close(after_text[:, : at + 1], before_text[:, : at + 1])
    torch.testing.assert_close(
        after_image[:, : max(0, at - text_length + 1)], before_image[:, : max(0, at - text_length + 1)]
    )
    if at < text_length:  # every image token sees all of the text
        assert ((after_image - before_image).abs().amax(-1) > 1e-6).all()
    elif at < stream.length - 1:  # and the token after it sees it
        assert (
            after_image[:, at - text_length + 1] - before_image[:, at - text_length + 1]
        ).abs().max() > 1e-6
    else:  # nothing comes after the last one
        assert torch.equal(after_image, before_image)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_image_token_sees_all_text_in_one_layer(pattern):
    stream = tiny.shape(4, 5)
    model = tiny.prior(stream, pattern)
    text, codes = torch.arange(5)[None], tiny.codes(1, stream)  # five tokens, five rows of the table
    image = model(text, codes)[1]
    for j in range(stream.image_length):
        model.zero_grad()
        image[0, j].square().sum().backward(retain_graph=True)
        assert (model.text_embedding.weight.grad[:5].abs().amax(1) > 1e-6).all()


def test_text_logits_never_see_the_image():
    stream = tiny.shape()
    model = tiny.prior(stream, "full", "convolutional")
    text = tiny.texts(1, stream)
    with torch.no_grad():
        assert torch.equal(model(text, tiny.codes(1, stream, 1))[0], model(text, tiny.codes(1, stream, 2))[0])


def test_a_row_does_not_depend_on_its_neighbours():
    stream = tiny.shape()
    model = tiny.prior(stream, "row", "column")
    text, codes = tiny.texts(3, stream), tiny.codes(3, stream)
    with torch.no_grad():
        for whole, alone in zip(model(text, codes), model(text[1:2], codes[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], alone)


def test_each_position_has_its_own_pad():
    stream = tiny.shape(text_length=4, vocab=11)
    text = torch.tensor([[3, 11, 11, 11], [11, 11, 0, 10]])
    assert text_input_ids(text, stream).tolist() == [[15, 3, 12, 13, 14], [15, 11, 12, 0, 10]]
    assert torch.equal(null_text(2, stream), torch.full((2, 4), 11))
    ids = text_input_ids(null_text(1, stream), stream)
    assert len(ids.unique()) == 5 and int(ids.max()) < tiny.prior(stream, "row").text_embedding.num_embeddings


def dropout(features: float = 0.0, codes: float = 0.0, seed: int = 0) -> Dropout:
    return Dropout(features=features, codes=codes, generator=torch.Generator().manual_seed(seed))


def test_codes_that_are_left_out_are_not_seen():
    stream = tiny.shape(4, 3)
    model, text = tiny.prior(stream, "full"), tiny.texts(2, stream)
    one, other = tiny.codes(2, stream, 1), tiny.codes(2, stream, 2)
    with torch.no_grad():
        unseen = [model(text, codes, dropout(codes=1.0))[1] for codes in (one, other)]
        seen = [model(text, codes, dropout(codes=0.0))[1] for codes in (one, other)]
        assert torch.equal(*unseen) and not torch.equal(*seen)
        assert torch.equal(seen[0], model(text, one)[1])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_is_left_out_is_as_often_as_asked_and_keeps_the_mean(share):
    left = dropout(features=share, codes=share)
    x = torch.full((100, 50, 8), 3.0)
    features, codes = left.of_features(x), left.of_codes(x)
    for y in (features, codes):
        assert abs(float((y == 0).float().mean()) - share) < 0.03
    assert abs(float(features.mean()) - 3) < 0.1
    assert ((codes == 0).all(2) | (codes == 3).all(2)).all()  # a code as a whole, or not at all


def test_lookalikes_are_the_nearest_codes_and_not_the_code_itself():
    codebook = torch.tensor([[0.0, 0], [0, 1], [0, 3], [9, 9], [9, 8]])
    assert lookalikes(codebook, 2).tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    assert lookalikes(codebook, 6).shape == (5, 4)  # no more than there are


def noise(share: float, table: Tensor) -> Dropout:
    return Dropout(features=0.0, codes=0.0, noise=share, lookalikes=table, generator=tiny.seeded(1))


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_so_many_codes_are_seen_as_one_that_looks_like_them(share):
    table = torch.stack([(torch.arange(50) + n) % 50 for n in (1, 2, 3)], 1)
    codes = torch.randint(50, (100, 64), generator=tiny.seeded())
    seen = noise(share, table).of_tokens(codes)
    moved = (seen - codes) % 50
    assert abs(float((moved > 0).float().mean()) - share) < 0.02
    assert moved.unique().tolist() == [0, 1, 2, 3]
    shares = moved[moved > 0].bincount()[1:] / (moved > 0).sum()
    assert (shares - 1 / 3).abs().max() < 0.05


def test_noise_is_of_what_is_seen_and_not_of_what_is_asked_for():
    stream = tiny.shape(4, 3)
    model, text, codes = tiny.prior(stream, "full"), tiny.texts(2, stream), tiny.codes(2, stream)
    table = (torch.arange(stream.codebook_size) + 1)[:, None] % stream.codebook_size
    before = codes.clone()
    with torch.no_grad():
        blurred = model(text, codes, noise(1 - 1e-9, table))[1]
        assert torch.equal(blurred, model(text, table[codes, 0])[1])  # every code seen as its neighbour
    assert torch.equal(codes, before)


def test_dropout_is_a_function_of_its_generator():
    stream = tiny.shape(4, 3)
    model, text, codes = tiny.prior(stream, "full"), tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.no_grad():
        first, again, other = (model(text, codes, dropout(0.3, 0.3, seed))[1] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pads_are_attended_to():
    stream = tiny.shape(text_length=4, vocab=11)
    model = tiny.prior(stream, "row")
    text, codes = torch.tensor([[3, 11, 11, 11]]), tiny.codes(1, stream)
    with torch.no_grad():
        before = model(text, codes)[1]
        model.text_embedding.weight[11 + 3] += torch.randn(
            16, generator=tiny.seeded()
        )  # the last position's pad
        assert ((model(text, codes)[1] - before).abs().amax(-1) > 1e-6).all()


def test_heads_that_two_axes_cannot_share_are_refused():
    with pytest.raises(RequestError, match="heads of 6"):
        tiny.prior(tiny.shape(), "full", width=12, rotary=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_conv": 1}, "text_conv: 1 is the word alone; take 0 for none, or at least 2"),
        ({"text_conv": -1}, "text_conv: expected at least 0, got -1"),
        ({"rotary_share": 0.0}, "rotary_share: expected more than 0 and at most 1, got 0.0"),
        ({"rotary_share": 1.5}, "rotary_share: expected more than 0 and at most 1, got 1.5"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        PriorConfig(**options)


def test_a_word_has_those_before_it_in_its_vector_and_no_others():
    x, gains = torch.randn(2, 5, 3, generator=tiny.seeded()), torch.randn(3, 3, generator=tiny.seeded(1))
    found = with_words_before(x, gains)
    torch.testing.assert_close(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1], x[:, 1] + gains[0] * x[:, 0])
    torch.testing.assert_close(found[:, 4], x[:, 4] + gains[0] * x[:, 3] + gains[1] * x[:, 2] + gains[2] * x[:, 1])
    assert torch.equal(with_words_before(x[:, :2], gains), found[:, :2])  # a caption shorter than what is looked at


# What the blocks are.


def literal(model: Prior, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The whole stream by the formulas, from the weights and their names alone; nothing turns."""
    w, config, stream = dict(model.named_parameters()), model.config, model.shape
    size, t = config.d_model // config.n_head, stream.text_length

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rms":
            return rms(x, w[f"{name}.weight"])
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    places = w["row_embedding.weight"][:, None] + w["column_embedding.weight"][None]
    image = w["image_embedding.weight"][codes[:, :-1]] + places.flatten(0, 1)[:-1]
    words = w["text_embedding.weight"][text_input_ids(text, stream)] + w["text_position.weight"]
    if config.text_conv:
        plain = words.clone()
        for position in range(t + 1):
            for back in range(1, min(config.text_conv - 1, position) + 1):
                words[:, position] = words[:, position] + w["text_conv"][back - 1] * plain[:, position - back]
    x = torch.cat([words, image], 1)
    for i, pattern in enumerate(config.patterns):
        block = f"blocks.{i}"
        q, k, v = linear(f"{block}.attention.qkv", norm(f"{block}.attention_norm", x)).chunk(3, -1)
        mask, heads = stream_mask(pattern, t, stream.grid), []
        for h in range(config.n_head):
            own = slice(h * size, (h + 1) * size)
            a, b = q[..., own], k[..., own]
            if config.qk_norm:
                a = rms(a, w[f"{block}.attention.query_norm.weight"])
                b = rms(b, w[f"{block}.attention.key_norm.weight"])
            scores = (a @ b.transpose(1, 2) / math.sqrt(size)).masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., own])
        x = x + linear(f"{block}.attention.out", torch.cat(heads, -1))
        hidden = linear(f"{block}.mlp_in", norm(f"{block}.mlp_norm", x))
        if config.mlp == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = gate * gate.sigmoid() * value
        else:
            hidden = F.gelu(hidden)
        x = x + linear(f"{block}.mlp_out", hidden)
    x = norm("norm", x)
    head = w["image_embedding.weight"] * 256 / config.d_model if config.tied else w["image_head.weight"]
    return linear("text_head", x[:, :t]), F.linear(x[:, t:], head, w["image_head.bias"])


UNTURNED = {name: options for name, options in tiny.OPTIONS.items() if not options.get("rotary")}


@pytest.mark.parametrize("options", [*UNTURNED.values(), {"text_conv": 3}], ids=[*UNTURNED, "text_conv"])
def test_the_blocks_are_the_formulas(options):
    stream = tiny.shape()
    model = tiny.prior(stream, *PATTERNS, **options)
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.no_grad():
        for found, expected in zip(model(text, codes), literal(model, text, codes), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert float(expected.std()) > 0.1


def test_the_defaults_have_the_names_and_the_start_that_they_always_had():
    model = tiny.prior(tiny.shape(), "full", "row", blank=True)
    tables = ["text_embedding", "text_position", "image_embedding", "row_embedding", "column_embedding"]
    layers = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp_in", "mlp_out"]
    both = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers] + ["norm", "text_head", "image_head"]
    names = [f"{table}.weight" for table in tables] + [f"{b}.{kind}" for b in both for kind in ("weight", "bias")]
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == names
    first = {
        "text_embedding": [-0.107247494161129, -0.07959707826375961],
        "image_embedding": [0.1276141256093979, -0.04210490360856056],
        "column_embedding": [-0.04641932621598244, -0.024849986657500267],
        "blocks.1.attention.qkv": [0.06336135417222977, 0.056302398443222046],
        "blocks.1.mlp_in": [0.5434964299201965, 0.3676118552684784],
    }
    for name, numbers in first.items():
        assert model.get_parameter(f"{name}.weight")[0, :2].tolist() == pytest.approx(numbers, rel=1e-5), name


@pytest.mark.parametrize("width", [192, 256, 512, 1024, 3968])
def test_a_gated_block_has_as_many_parameters_as_a_plain_one(width):
    stream, count = tiny.shape(), {}
    for mlp in ("gelu", "swiglu"):
        config = PriorConfig(d_model=width, n_layer=1, n_head=2, mlp=mlp)
        with torch.device("meta"):
            count[mlp] = sum(p.numel() for p in Prior(config, stream).blocks[0].parameters())
        assert config.hidden % 8 == 0
    assert count["swiglu"] == pytest.approx(count["gelu"], rel=0.005)


def test_normalised_queries_and_keys_do_not_grow_with_their_weights():
    """What qk_norm is for: attention cannot become sharp by weights that grow without end."""
    stream = tiny.shape()
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    for qk_norm in (False, True):
        model = tiny.prior(stream, "full", qk_norm=qk_norm)
        shares: list[Tensor] = []
        with torch.no_grad():
            for _ in range(2):
                model(text, codes, watch=lambda layer, share, told=shares: told.append(share))
                qkv = model.blocks[0].attention.qkv
                qkv.weight[:32], qkv.bias[:32] = 50 * qkv.weight[:32], 50 * qkv.bias[:32]
        assert torch.allclose(*shares, atol=1e-4) == qk_norm


def test_a_tied_table_is_one_table():
    stream = tiny.shape()
    tied, plain = (tiny.prior(stream, "full", tied=tied) for tied in (True, False))
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, plain)]
    assert counts[1] - counts[0] == plain.image_head.weight.numel()
    assert plain.state_dict().keys() - tied.state_dict().keys() == {"image_head.weight"}
    text, codes = tiny.texts(1, stream), torch.zeros(1, stream.image_length).long()
    logits = tied(text, codes)[1]
    logits[0, 0, 5].backward()  # of a code that is nowhere in the picture
    assert tied.image_embedding.weight.grad[5].any() and not tied.image_embedding.weight.grad[6].any()
    folded = tied.folded()
    assert not folded.config.tied
    with torch.no_grad():
        torch.testing.assert_close(folded(text, codes)[1], logits)


def test_a_tied_table_and_computed_vectors_are_refused_together():
    with pytest.raises(RequestError, match="tied: code_features makes vectors .* take one of the two") as error:
        PriorConfig(tied=True, code_features=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qk_norm", "all"])
def test_a_loss_goes_back_through_every_weight_in_16_bits_too(dtype, name):
    stream = tiny.shape()
    model = tiny.prior(stream, "full", "row", width=32, **tiny.OPTIONS[name])
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        stream_loss(*model(text, codes), text, codes).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any(), name


def test_a_larger_grid_is_gone_through_by_blocks_and_gives_the_same():
    stream = tiny.shape(grid=24, text_length=4)
    model = tiny.prior(stream, "row", "column", rotary=True)
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)

    def found() -> list[Tensor]:
        model.zero_grad()
        logits = model(text, codes)
        stream_loss(*logits, text, codes).loss.backward()
        return [*logits, *(p.grad.clone() for p in model.parameters())]

    assert None not in model.sparse.values()
    blocked = found()
    model.sparse = {"row": None, "column": None}
    for a, b in zip(blocked, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Initialisation, loss and training.


@pytest.mark.parametrize("name", [name for name, options in tiny.OPTIONS.items() if not options.get("tied")])
def test_the_first_logits_are_uniform_and_the_first_loss_is_ln_v(name):
    stream = tiny.shape(vocab=11, codebook=13)
    model = tiny.prior(stream, *PATTERNS, blank=True, **tiny.OPTIONS[name])
    text, codes = tiny.texts(3, stream), tiny.codes(3, stream)
    text_logits, image_logits = model(text, codes)
    assert text_logits.shape == (3, 5, 12) and not text_logits.any() and not image_logits.any()
    loss = stream_loss(text_logits, image_logits, text, codes)
    assert loss.text.item() == pytest.approx(math.log(12), rel=1e-6)
    assert loss.image.item() == pytest.approx(math.log(13), rel=1e-6)
    assert loss.loss.item() == pytest.approx(math.log(12) / 8 + math.log(13) * 7 / 8, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20)
@given(
    rows=st.integers(1, 4), stream_seed=seeds, vocab=st.sampled_from([1, 30, 3000]), weight=st.floats(0, 1)
)
def test_the_loss_is_the_plain_cross_entropy(dtype, rows, stream_seed, vocab, weight):
    g = tiny.seeded(stream_seed)
    stream = tiny.shape(6, 50, vocab, 1 + 2 * vocab)  # 200 rows of 3000 make more than one block
    text, codes = tiny.texts(rows, stream, stream_seed), tiny.codes(rows, stream, stream_seed)
    start = [
        (3 * torch.randn(rows, n, v, generator=g)).to(dtype)
        for n, v in ((stream.text_length, vocab + 1), (stream.image_length, stream.codebook_size))
    ]
    ours, plain = [[x.clone().requires_grad_() for x in start] for _ in range(2)]
    loss = stream_loss(*ours, text, codes, weight)
    plain_text, plain_image = (
        F.cross_entropy(x.float().flatten(0, 1), y.flatten())
        for x, y in zip(plain, (text, codes), strict=True)
    )
    plain_loss = weight * plain_text + (1 - weight) * plain_image
    for a, b in zip(loss, (plain_loss, plain_text, plain_image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    loss.loss.backward()
    plain_loss.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(ours, plain, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max() + 1e-12


def test_with_a_tied_table_the_first_loss_is_nearly_ln_v():
    stream = tiny.shape(codebook=300)
    model = tiny.prior(stream, "full", width=256, blank=True, tied=True)
    text, codes = tiny.texts(3, stream), tiny.codes(3, stream)
    assert stream_loss(*model(text, codes), text, codes).image.item() == pytest.approx(math.log(300), abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.05, 0.5])
def test_the_smoothed_loss_is_the_cross_entropy_with_a_spread_target(dtype, smoothing):
    """Of image tokens only; what is told of them is as without."""
    stream = tiny.shape(6, 50, 30, 3000)  # 108 rows of 3000 make more than one block
    text, codes = tiny.texts(3, stream), tiny.codes(3, stream)
    g = tiny.seeded()
    sizes = ((stream.text_length, 31), (stream.image_length, 3000))
    start = [(3 * torch.randn(3, n, v, generator=g)).to(dtype) for n, v in sizes]
    ours, plain = [[x.clone().requires_grad_() for x in start] for _ in range(2)]
    found = stream_loss(*ours, text, codes, 0.25, label_smoothing=smoothing)
    text_loss = F.cross_entropy(plain[0].float().flatten(0, 1), text.flatten())
    target = smoothing / 3000 + (1 - smoothing) * F.one_hot(codes, 3000)
    image_loss = -(target * plain[1].float().log_softmax(-1)).sum(-1).mean()
    expected = 0.25 * text_loss + 0.75 * image_loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
    unsmoothed = stream_loss(*start, text, codes)
    assert torch.equal(found.image, unsmoothed.image) and torch.equal(found.text.detach(), unsmoothed.text)
    found.loss.backward()
    expected.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(ours, plain, strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max() + 1e-12


def test_text_weighs_an_eighth():
    text_logits, image_logits = torch.zeros(1, 2, 4), torch.zeros(1, 9, 16)
    loss = stream_loss(text_logits, image_logits, torch.zeros(1, 2).long(), torch.zeros(1, 9).long())
    assert loss.loss.item() == pytest.approx(math.log(4) / 8 + 7 * math.log(16) / 8)


def test_the_default_layers_are_the_papers():
    config = PriorConfig()
    expected = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, 65)]
    expected[-1] = "convolutional"
    assert list(config.patterns) == expected
    assert (config.d_model, config.n_layer, config.n_head) == (3968, 64, 62)


def test_the_default_has_twelve_billion_parameters():
    stream = StreamShape(text_vocab_size=16384, text_length=256, codebook_size=8192, grid=32)
    with torch.device("meta"):
        one = Prior(PriorConfig(n_layer=1), stream)
    block = sum(p.numel() for p in one.blocks[0].parameters())
    total = sum(p.numel() for p in one.parameters()) + 63 * block
    assert 12.0e9 < total < 12.5e9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 10, "n_head": 4}, "d_model 10 is not a multiple of n_head 4"),
        ({"n_layer": 0}, "n_layer: expected at least 1, got 0"),
        ({"code_features": -1}, "code_features: expected at least 0, got -1"),
        ({"norm": "rmsnorm"}, "norm: unknown 'rmsnorm': .*'rms'"),
        ({"mlp": "swish"}, "mlp: unknown 'swish': .*'swiglu'"),
        ({"attention": ()}, "attention: expected at least one pattern"),
        ({"attention": ("roww",)}, "roww.*'row'"),
        ({"last_attention": "ful"}, "ful.*'full'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        PriorConfig(**fields)


def test_a_batch_can_be_learnt_by_heart():
    stream = tiny.shape()
    model = tiny.prior(stream, "row", "column", width=32, blank=True)
    text, codes = tiny.texts(4, stream), tiny.codes(4, stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = stream_loss(*model(text, codes), text, codes)
        loss.loss.backward()
        optimizer.step()
    assert loss.image.item() < 0.1 < math.log(13) / 10
    with torch.no_grad():
        assert torch.equal(model(text, codes)[1].argmax(-1), codes)


def change_after_steps(
    width: int, scaled: bool, matrix_scale: float | None = None, **options: Any
) -> dict[str, float]:
    """Root mean square change of the logits and of the stream before the heads, after a few updates."""
    stream = tiny.shape(vocab=40, codebook=40)
    model = tiny.prior(stream, "full", "full", width=width, blank=True, **options)
    text, codes = tiny.texts(16, stream), tiny.codes(16, stream)
    groups = parameter_groups(model, 0.0, matrix_scale=matrix_scale)
    optimizer = MuonAdamW([{**g, "lr": 2e-3 * (g["lr_scale"] if scaled else 1)} for g in groups])
    streams = []
    model.norm.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0].detach()))
    first = model(text, codes)[1].detach()
    for _ in range(8):
        optimizer.zero_grad()
        stream_loss(*model(text, codes), text, codes).loss.backward()
        optimizer.step()
    last = model(text, codes)[1].detach()
    return {
        "logits": (last - first).square().mean().sqrt().item(),
        "activations": (streams[-1] - streams[0]).square().mean().sqrt().item(),
    }


@pytest.mark.parametrize("options", ["paper", "all"])
@pytest.mark.parametrize("matrix_scale", [None, 10.0])
def test_one_step_size_serves_every_width(matrix_scale, options):
    scaled = [change_after_steps(width, True, matrix_scale, **tiny.OPTIONS[options]) for width in (64, 128, 256)]
    for what in ("logits", "activations"):
        changes = [s[what] for s in scaled]
        assert max(changes) < 2 * min(changes)
    plain = [change_after_steps(width, False)["logits"] for width in (64, 128, 256)]
    assert max(plain) > 2 * min(plain)


def test_folding_leaves_the_model_as_it_was():
    model = tiny.prior(tiny.shape(), "full", features=7)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    folded = model.folded()
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in folded.parameters())
    assert not torch.equal(folded.image_head.weight, model.image_head.weight)


def test_a_folded_model_is_the_same_model():
    stream = tiny.shape()
    model = tiny.prior(stream, "full", "row", features=7)
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    folded = model.folded()
    assert folded.config.code_features == 0 and folded.folded() is folded
    assert not [name for name in folded.state_dict() if name.startswith("code_")]
    with torch.no_grad():
        for whole, plain in zip(model(text, codes), folded(text, codes), strict=True):
            torch.testing.assert_close(plain, whole)
        stepwise = cached_image_logits(folded, text, codes)
        torch.testing.assert_close(stepwise, model(text, codes)[1], rtol=1e-4, atol=1e-4)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_the_vectors_of_codes_do_not_depend_on_the_codebooks_place_and_scale():
    stream = tiny.shape()
    book = tiny.code_vectors(stream)
    images = []
    for scaled in (book, 3 * book - 7):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Prior(tiny.prior(stream, "full", features=7).config, stream, scaled)
        tiny.randomise(model) if not images else model.load_state_dict(images[0][0])
        with torch.no_grad():
            images.append((model.state_dict(), model(tiny.texts(1, stream), tiny.codes(1, stream))[1]))
    assert float(images[0][1].std()) > 0.1
    torch.testing.assert_close(images[1][1], images[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codebook", [None, torch.zeros(5, 3)])
def test_code_features_need_a_vector_for_each_code(codebook):
    config = tiny.prior(tiny.shape(), "full", features=7).config
    with pytest.raises(RequestError, match="code_features: the image tokenizer has no vector for each"):
        Prior(config, tiny.shape(), codebook)


def test_with_code_features_what_is_learned_of_a_code_holds_for_those_that_look_like_it():
    """A caption asks for a colour and a form, a code is one of each, and one pair a colour is only seen unasked."""
    stream = StreamShape(text_vocab_size=12, text_length=2, codebook_size=36, grid=2)
    colour, form = torch.arange(36) // 6, torch.arange(36) % 6
    book = torch.stack([colour, form], 1).float()
    text, codes = torch.stack([colour, 6 + form], 1), torch.arange(36)[:, None].expand(36, 4)
    kept = (colour + form) % 6 == 3
    said, shown = torch.cat([text[~kept], null_text(36, stream)]), torch.cat([codes[~kept], codes])
    unseen_loss = {}
    for features in (0, 32):
        model = tiny.prior(stream, "full", width=32, features=features, blank=True, codebook=book)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            stream_loss(*model(said, shown), said, shown).loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = model(text, codes)[1][:, 0]
        assert (logits.argmax(-1) == codes[:, 0])[~kept].all()
        unseen_loss[features] = float(F.cross_entropy(logits[kept], codes[kept, 0]))
    assert unseen_loss[32] < 0.6 * unseen_loss[0]
