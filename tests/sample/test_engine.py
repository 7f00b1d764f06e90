from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS
from armchair.prior.sequence import null_text
from armchair.prior.transformer import MLPS, PromptCache
from armchair.sample import native
from armchair.sample.engine import (
    ACTIVATIONS,
    WEIGHTS,
    Cache,
    Engine,
    FusedCache,
    Places,
    blocked_products,
    default_weights,
    exact_products,
    norm_of_rows,
    pack,
)
from armchair.sample.generate import (
    FREE,
    MicroBatch,
    candidate_uniforms,
    draw_codes,
    draw_codes_uncached,
    draw_micro_batch,
    read_prompts,
)
from armchair.sample.next_token import Settings
from armchair.sample.weights import in_eight_bits

STREAM = tiny.shape(grid=4, text_length=4, codebook=17)
HERE = [weights for weights in WEIGHTS if weights != "int8" or exact_products()]
options = st.sampled_from(list(tiny.OPTIONS.values()))


@pytest.fixture(params=["compiled", "products", "fused"], scope="module")
def either_attention(request):
    """With the compiled step; and by PyTorch, as on a processor where the one attention is quicker, or the other."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled":
            if native.library() is None:
                pytest.skip("the compiled step was not built here, or is not for this processor")
        else:
            patch.setattr("armchair.sample.native.library", lambda: None)
            patch.setattr("armchair.sample.engine.fused_attention", lambda: request.param == "fused")
        yield


ATTENTION = pytest.mark.usefixtures("either_attention")


def forced_logits(decoder, text, codes):
    """(B, N, K): logits of every code, given those before it."""
    cache = decoder.start(prompts := decoder.prefill(text))
    steps = [decoder.decode_step(codes[:, j], j, cache) for j in range(codes.shape[1] - 1)]
    return torch.stack([prompts.logits, *steps], 1)


# Against the literal decoder and the whole stream at once.


@settings(max_examples=25)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    grid=st.integers(1, 6),
    text_length=st.integers(1, 5),
    rows=st.integers(1, 5),
    options=options,
    seed=st.integers(0, 999),
)
def test_32_bit_weights_give_the_logits_of_the_whole_stream(patterns, grid, text_length, rows, options, seed):
    assert_follows(patterns, grid, text_length, rows, options, seed)


@pytest.mark.parametrize("name", tiny.OPTIONS)
def test_whatever_its_blocks_are(name):
    assert_follows(PATTERNS, 4, 3, 3, tiny.OPTIONS[name], 1)


def assert_follows(patterns, grid, text_length, rows, options, seed):
    """Of the engine and of the literal decoder, to the logits of the whole stream at once."""
    stream = tiny.shape(grid, text_length)
    model = tiny.prior(stream, *patterns, **options, seed=seed)
    text, codes = tiny.texts(rows, stream, seed), tiny.codes(rows, stream, seed)
    with torch.inference_mode():
        expected = model(text, codes)[1]
        for decoder in (Engine(model), model.folded()):
            found = forced_logits(decoder, text, codes)
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < 1e-5 * max(10, expected.abs().max())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_on_a_grid_wider_than_the_window(pattern):
    stream = tiny.shape(grid=13, text_length=3)
    model = tiny.prior(stream, pattern, seed=2)
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.inference_mode():
        assert (forced_logits(Engine(model), text, codes) - model(text, codes)[1]).abs().max() < 1e-4


@ATTENTION
@pytest.mark.parametrize("weights", HERE)
@pytest.mark.parametrize(
    ("pattern", "options"), [*((p, "paper") for p in PATTERNS), *(("full", o) for o in tiny.OPTIONS if o != "paper")]
)
def test_fewer_bits_move_the_distribution_little(weights, pattern, options):
    stream = tiny.shape(grid=4, text_length=4, codebook=17)
    model = tiny.prior(stream, pattern, pattern, width=64, seed=3, **tiny.OPTIONS[options])
    if model.config.tied:  # random vectors of that size would be surer than any model is
        model.image_embedding.weight.data.mul_(0.05)
    text, codes = tiny.texts(32, stream), tiny.codes(32, stream)
    with torch.inference_mode():
        p = model(text, codes)[1].log_softmax(-1)
        q = forced_logits(Engine(model, weights), text, codes).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert divergence < 2e-3 * -(p.exp() * p).sum(-1).mean()


def test_codes_that_look_alike_are_folded_in():
    model = tiny.prior(STREAM, "full", features=8, seed=1)
    text, codes = tiny.texts(2, STREAM), tiny.codes(2, STREAM)
    with torch.inference_mode():
        assert (forced_logits(Engine(model), text, codes) - model(text, codes)[1]).abs().max() < 1e-4


def test_drawing_equals_the_literal_sampler():
    model = tiny.prior(STREAM, "full", "row", seed=5)
    text, uniforms = tiny.texts(3, STREAM), candidate_uniforms(0, range(3), STREAM.image_length)
    for chosen in (Settings(), Settings(guidance=2.0, min_p=0.1), Settings(temperature=0.0)):
        drawn = draw_codes(Engine(model), text, [0, 1, 2], uniforms, chosen)
        assert torch.equal(drawn, draw_codes_uncached(model, text, uniforms, chosen))


@ATTENTION
@pytest.mark.skipif("int8" not in HERE, reason="this processor does not add up eight-bit products exactly")
def test_eight_bit_drawings_follow_the_models_distribution():
    assert tiny.off_distribution(lambda model: Engine(model, "int8")) < 0.04


# Determinism.


@ATTENTION
@settings(max_examples=15)
@given(
    picked=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    weights=st.sampled_from(HERE),
    guidance=st.sampled_from([1.0, 2.5]),
    options=options,
)
def test_any_company_gives_the_same_codes(picked, weights, guidance, options):
    engine = Engine(tiny.prior(STREAM, "row", "convolutional", width=64, seed=3, **options), weights)
    text, chosen = tiny.texts(3, STREAM), Settings(guidance=guidance)

    def draw(candidates):
        uniforms = candidate_uniforms(1, candidates, STREAM.image_length)
        return draw_codes(engine, text, [c % 3 for c in candidates], uniforms, chosen)

    together = draw(picked)
    for i in {0, len(picked) // 2, len(picked) - 1}:
        assert torch.equal(draw(picked[i : i + 1])[0], together[i])


@ATTENTION
@pytest.mark.parametrize("patterns", [("full",), ("row",), ("column",), ("convolutional",), PATTERNS])
@pytest.mark.parametrize("options", ["paper", "rotary", "all"])
def test_several_tokens_at_once_give_the_bits_of_one_after_the_other(patterns, options):
    """After wrong guesses too, which left their keys behind."""
    stream = tiny.shape(grid=13, text_length=3)
    engine = Engine(tiny.prior(stream, *patterns, width=64, **tiny.OPTIONS[options], seed=4), HERE[-1])
    text, codes, wrong = tiny.texts(2, stream), tiny.codes(2, stream), tiny.codes(2, stream, seed=9)
    with torch.inference_mode():
        cache = engine.start(prompts := engine.prefill(text), ahead=True)
        found, j = [prompts.logits[:, None]], 0
        while j < 168:
            count = min(1 + j % 7, 168 - j)
            engine.decode_steps(wrong[:, j : min(j + 5, 168)], j, cache)
            found.append(engine.decode_steps(codes[:, j : j + count], j, cache))
            j += count
        assert torch.equal(torch.cat(found, 1), forced_logits(engine, text, codes))


@ATTENTION
@settings(max_examples=15)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2),
    grid=st.integers(1, 5),
    rows=st.integers(1, 3),
    ahead=st.integers(2, 30),
    chosen=st.sampled_from([Settings(), Settings(guidance=2.0, min_p=0.1), Settings(temperature=0.3)]),
    given=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_looking_ahead_draws_the_same_codes(patterns, grid, rows, ahead, chosen, given, seed):
    """However far, for rows that go together too; codes that are given stay; unfinished rows are shown as zeros."""
    stream = tiny.shape(grid, 4)
    engine = Engine(tiny.prior(stream, *patterns, width=64, seed=seed), HERE[-1])
    uniforms = candidate_uniforms(seed, range(rows), stream.image_length)
    codes = tiny.codes(rows, stream, seed)
    forced = torch.where(torch.rand(codes.shape, generator=tiny.seeded(seed)) < given, codes, FREE)
    prompts, null = read_prompts(engine, tiny.texts(rows, stream)), read_prompts(engine, null_text(1, stream))

    def parts(ahead):
        return list(draw_micro_batch(engine, MicroBatch(engine, prompts, null, uniforms, chosen, forced, ahead)))

    one_by_one, several = parts(1), parts(ahead)
    assert len(several) == grid and all(map(torch.equal, several, one_by_one))


def test_looking_ahead_takes_fewer_steps(monkeypatch):
    """Where the same code follows again and again, each pass brings all that it was given."""
    engine = Engine(tiny.prior(STREAM, "full", seed=3), HERE[-1])
    monkeypatch.setattr(engine, "_logits", lambda x: torch.eye(17)[torch.full((len(x),), 3)])
    passes = []
    steps = engine.decode_steps
    monkeypatch.setattr(engine, "decode_steps", lambda t, j, cache: passes.append(t.shape) or steps(t, j, cache))
    draw_codes(engine, tiny.texts(1, STREAM), [0], candidate_uniforms(0, [0], 16), Settings(temperature=0.0))
    assert passes == [(1, 1), (1, 8), (1, 6)]


def test_looking_ahead_in_vain_is_given_up(monkeypatch):
    """Where no code is like the one above or before, most steps are given no guess."""
    engine = Engine(tiny.prior(STREAM, "full", seed=3), HERE[-1])
    passes, steps = [], engine.decode_steps

    def climbing(tokens, j, cache):
        passes.append(tokens.shape[1])
        steps(tokens, j, cache)
        return torch.eye(17)[torch.arange(j + 1, j + 1 + tokens.shape[1])][None]

    monkeypatch.setattr(engine, "decode_steps", climbing)
    codes = draw_codes(engine, tiny.texts(1, STREAM), [0], candidate_uniforms(0, [0], 16), Settings(temperature=0.0))
    assert codes.flatten().tolist()[1:] == list(range(1, 16))
    assert passes.count(1) > 8


@ATTENTION
@settings(max_examples=20)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2),
    ahead=st.sampled_from([1, 4]),
    chosen=st.sampled_from([Settings(), Settings(guidance=2.0, min_p=0.1)]),
    first=st.integers(0, 16),
    until=st.integers(0, 16),
    most=st.sampled_from([1, 7, 1024]),
    seed=st.integers(0, 99),
)
def test_going_on_from_given_codes_draws_the_same(patterns, ahead, chosen, first, until, most, seed):
    """However many are given at the start, in however many passes; and drawing may end early."""
    engine = Engine(tiny.prior(STREAM, *patterns, width=64, seed=seed), HERE[-1])
    uniforms = candidate_uniforms(seed, range(2), 16)
    prompts, null = read_prompts(engine, tiny.texts(2, STREAM)), read_prompts(engine, null_text(1, STREAM))
    free = torch.full((2, 16), FREE)

    def batch(forced, **more):
        made = MicroBatch(engine, prompts, null, uniforms, chosen, forced, **more)
        list(draw_micro_batch(engine, made))
        return made

    whole = batch(free).codes
    part = batch(free, ahead=ahead, until=max(first, until))
    assert part.known == max(first, until) and torch.equal(part.codes[:, : part.known], whole[:, : part.known])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("armchair.sample.generate.TOGETHER", most)
        again = batch(torch.where(torch.arange(16) < first, whole, free), ahead=ahead)
    assert torch.equal(again.codes, whole)


def test_given_codes_go_through_together():
    engine = Engine(tiny.prior(STREAM, "full", seed=3), HERE[-1])
    if not engine.independent_rows:
        pytest.skip("rows go one token at a time here")
    prompts, null = read_prompts(engine, tiny.texts(1, STREAM)), read_prompts(engine, null_text(1, STREAM))
    forced = torch.where(torch.arange(16) < 12, 5, FREE)[None]
    batch = MicroBatch(engine, prompts, null, candidate_uniforms(0, [0], 16), Settings(), forced)
    assert batch.step().tokens.tolist() == [[5] * 12] and batch.step().j == 0


@ATTENTION
@settings(max_examples=15)
@given(data=st.data(), options=options, seed=st.integers(0, 99))
def test_batches_that_go_together_draw_what_each_draws_alone(data, options, seed):
    """Begun at any time, of any size, with any settings, looking ahead or not."""
    engine = Engine(tiny.prior(STREAM, "full", "convolutional", width=64, seed=seed, **options), HERE[-1])
    if not engine.independent_rows:
        pytest.skip("rows depend on their neighbours here")
    null = read_prompts(engine, null_text(1, STREAM))

    def begin(rows, chosen, ahead):
        uniforms, free = candidate_uniforms(seed, range(rows), 16), torch.full((rows, 16), FREE)
        prompts = read_prompts(engine, tiny.texts(rows, STREAM))
        return MicroBatch(engine, prompts, null, uniforms, chosen, free, ahead)

    guided = Settings(guidance=2.0, min_p=0.1)
    kinds = st.tuples(st.integers(1, 40), st.sampled_from([Settings(), guided]), st.sampled_from([1, 4]))
    asked = data.draw(st.lists(st.tuples(kinds, st.integers(0, 12)), min_size=2, max_size=4))
    begun, turn = {}, 0
    while len(begun) < len(asked) or not all(batch.done for batch in begun.values()):
        for i, (kind, when) in enumerate(asked):
            if when == turn:
                begun[i] = begin(*kind)
        active = [batch for batch in begun.values() if not batch.done]
        if active:
            with torch.inference_mode():
                answers = engine.decode_together([batch.step() for batch in active])
            for batch, logits in zip(active, answers, strict=True):
                batch.take(logits)
        turn += 1
    for i, (kind, _) in enumerate(asked):
        alone = begin(*kind)
        list(draw_micro_batch(engine, alone))
        assert torch.equal(begun[i].codes, alone.codes)


def test_rows_that_depend_on_their_neighbours_are_drawn_by_batches_of_one_size(monkeypatch):
    engine = Engine(tiny.prior(STREAM, "full", seed=3))
    monkeypatch.setattr(engine, "independent_rows", False)
    seen = set()
    steps = engine.decode_steps
    monkeypatch.setattr(engine, "decode_steps", lambda tokens, *more: seen.add(tokens.shape) or steps(tokens, *more))
    draw_codes(engine, tiny.texts(1, STREAM), [0] * 11, candidate_uniforms(0, range(11), 16), Settings())
    assert seen == {(8, 1)}


def test_dependent_rows_are_found_out(monkeypatch):
    """A product that adds a little of its neighbours, as one with another blocking does."""
    engine = Engine(tiny.prior(STREAM, "full", seed=3), HERE[-1])
    head = engine.head
    engine.head = lambda x: head(x) * (1 + 1e-6 * len(x))
    assert not engine._rows_are_independent()


def test_an_engine_keeps_the_prior_as_it_was():
    model = tiny.prior(STREAM, "full", seed=3)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    engine = Engine(model, HERE[-1])
    draw_codes(engine, null_text(1, STREAM), [0], candidate_uniforms(0, [0], 16), Settings())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


# Norms and activations.


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("width", [680, 1024])
def test_a_rows_bits_do_not_depend_on_where_a_threads_part_ends(threads, width):
    """As they would with a plain SwiGLU, from some fifty rows on."""
    x, gain = 2 * torch.randn(1024, 2 * width, generator=tiny.seeded()), torch.rand(2 * width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rowwise in (*ACTIVATIONS.values(), norm_of_rows(gain, None), norm_of_rows(gain, gain)):
            for rows in (1024, 101, 65, 49):
                together = rowwise(x[:rows])
                alone = torch.cat([rowwise(x[i : i + 1]) for i in range(rows)])
                assert torch.equal(together, alone)
        torch.testing.assert_close(ACTIVATIONS["swiglu"](x), MLPS["swiglu"](x))
    finally:
        torch.set_num_threads(before)


# Products.


@settings(max_examples=30)
@given(
    rows=st.integers(1, 20), inputs=st.integers(1, 70), outputs=st.integers(1, 70), scale=st.sampled_from([1e-3, 1, 50])
)
def test_an_eight_bit_product_is_the_product_of_its_rounded_factors(rows, inputs, outputs, scale):
    g = tiny.seeded(rows * inputs)
    x, weight = scale * torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    bias = torch.randn(outputs, generator=g)
    (a, a_step), (b, b_step) = in_eight_bits(x), in_eight_bits(weight)
    product = pack(weight, bias, "int8")
    assert ((b * b_step) - weight).abs().max() <= b_step.max() / 2 + 1e-7
    expected = (a.double() * a_step.double()) @ (b.double() * b_step.double()).T + bias
    found = product(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(pack(weight, bias, "int8")(x[:1]), found[:1])


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (17, 3), (64, 192), (300, 40)])
def test_both_ways_to_an_eight_bit_product_give_the_same_bits(monkeypatch, inputs, outputs):
    if not blocked_products():
        pytest.skip("this PyTorch has one way only")
    g = tiny.seeded(inputs)
    x, weight = torch.randn(9, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    product = pack(weight, torch.randn(outputs, generator=g), "int8")
    small = product(x)
    monkeypatch.setattr("armchair.sample.engine.BLOCKED_FROM", 0)
    for quicker in (False, True):
        monkeypatch.setattr("armchair.sample.engine.blocked_when_alone", lambda *size, quicker=quicker: quicker)
        product.laid_out = None
        assert torch.equal(product(x[:1]), small[:1]) and (product.laid_out is not None) == quicker
    assert torch.equal(product(x), small)


def test_rows_of_zeros_are_no_trouble():
    product = pack(torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0]), "int8")
    assert torch.equal(product(torch.zeros(2, 4)), torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3))


def half(x):
    return x.bfloat16().float()


def eight_bits(x):
    codes, step = in_eight_bits(x)
    return codes * step


@pytest.mark.parametrize(
    "make, kept, most",
    [
        (partial(Cache, eight_bits=False), lambda x: x, 1e-5),
        (partial(Cache, eight_bits=True), eight_bits, 1e-5),
        (FusedCache, half, 0.02),  # queries and what comes out have 16 bits too
    ],
    ids=["fp32", "int8", "fused"],
)
def test_attention_of_one_query_is_attention(make, kept, most):
    """Over the text and the image slots that are named, by blocks of rows; over what was rounded where that is kept."""
    g = tiny.seeded(4)
    rows, heads, size, length = 19, 3, 8, 5
    keys, values = torch.randn(2, rows, heads, length, size, generator=g)
    places = Places(["full"], tiny.shape(grid=2, text_length=length - 1), everything=False)
    cache = make(PromptCache([keys], [values], torch.zeros(rows, 1)), places)
    added = torch.randn(3, rows, 2, heads, size, generator=g)
    cache.put(0, 0, added)
    q = torch.randn(rows, heads, size, generator=g)
    keys = kept(torch.cat([keys, added[:, :, 0].permute(1, 2, 0, 3)], 2))
    values = kept(torch.cat([values, added[:, :, 1].permute(1, 2, 0, 3)], 2))
    for seen in (slice(8), torch.tensor([0, 1, 2, 3, 4, 6])):
        places.seen[0][2] = seen
        shares = (q[:, :, None] * keys[:, :, seen]).sum(-1).softmax(-1)
        expected = (shares[..., None] * values[:, :, seen]).sum(2).flatten(1)
        assert (cache.attend(0, 2, q[None]) - expected).abs().max() < most


@pytest.fixture
def saturating(monkeypatch):
    """A processor that takes one factor without a sign, by adding 128, and adds pairs of products in 16 bits."""

    def product(a, b):
        pairs = ((a.long() + 128)[:, :, None] * b.long()[None]).transpose(1, 2).unflatten(2, (-1, 2)).sum(3)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(2) - 128 * b.long().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", product)
    exact_products.cache_clear()
    yield
    exact_products.cache_clear()


def test_where_sums_are_not_exact_eight_bits_are_not_drawn_with(saturating, monkeypatch):
    monkeypatch.setattr("armchair.sample.native.library", lambda: None)
    assert not exact_products() and default_weights() == "fp32"
    with pytest.raises(RequestError, match="exactly; take fp32"):
        Engine(tiny.prior(STREAM, "full"), "int8")


def test_where_pytorch_s_sums_are_not_exact_compiled_code_draws_what_it_would_draw_elsewhere(monkeypatch):
    if native.library() is None:
        pytest.skip("the compiled step was not built here, or is not for this processor")
    monkeypatch.setenv("ARMCHAIR_NATIVE", "avx2")
    model, small = tiny.prior(STREAM, "full", width=32), tiny.prior(STREAM, "full", width=16)  # too small for it
    text, codes = tiny.texts(3, STREAM), tiny.codes(3, STREAM)
    before = forced_logits(Engine(model, "int8"), text, codes)
    exact_products.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
    try:
        assert not exact_products()
        assert default_weights(model.config) == "int8" and default_weights(small.config) == "fp32"
        assert torch.equal(forced_logits(Engine(model, "int8"), text, codes), before)
    finally:
        exact_products.cache_clear()


def test_sums_are_exact_at_the_ends_of_the_range():
    if not exact_products():
        pytest.skip("this processor adds up eight-bit products in 16 bits")
    assert default_weights() == "int8"
    product = pack(torch.full((3, 512), 127.0), torch.zeros(3), "int8")
    assert torch.equal(product(torch.full((2, 512), -1.0)), torch.full((2, 3), -127.0 * 512))


def test_an_unknown_form_is_refused():
    with pytest.raises(RequestError, match="weights.*int8"):
        Engine(tiny.prior(STREAM, "full"), "int9")
