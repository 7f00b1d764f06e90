"""A prior's weights as drawing multiplies with them, whole and rounded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS
from armchair.sample.engine import Engine, Int8Product, exact_products
from armchair.sample.generate import candidate_uniforms, draw_codes
from armchair.sample.next_token import Settings
from armchair.sample.weights import drawing_weights, in_eight_bits, matrices, prior_of, read_rounded, rounded

STREAM = tiny.shape(grid=4, text_length=4, codebook=17)
FEATURES = [{"features": 8}, {"features": 8, "rotary": True}]
VARIANTS = pytest.mark.parametrize(
    "options", [*tiny.OPTIONS.values(), *FEATURES], ids=[*tiny.OPTIONS, "features", "features and rotary"]
)
needs_exact_products = pytest.mark.skipif(not exact_products(), reason="this processor draws with fp32")


def products(engine: Engine) -> list[Int8Product]:
    layers = [p for layer in engine.layers for p in (layer.qkv, layer.out, layer.mlp_in, layer.mlp_out)]
    assert all(isinstance(p, Int8Product) for p in (*layers, engine.head))
    return [*layers, engine.head]


@needs_exact_products
@VARIANTS
def test_rounded_beforehand_is_what_the_engine_rounds(options):
    model = tiny.prior(STREAM, *PATTERNS, seed=3, **options)
    weights = rounded(drawing_weights(model))
    before, now = Engine(weights, "int8"), Engine(model, "int8")
    for a, b in zip(products(before), products(now), strict=True):
        assert a.codes.dtype == torch.int8
        assert torch.equal(a.codes, b.codes) and torch.equal(a.step, b.step) and torch.equal(a.bias, b.bias)
    text, uniforms = tiny.texts(3, STREAM), candidate_uniforms(0, range(3), STREAM.image_length)
    chosen = Settings(guidance=2.0)
    drawn = [draw_codes(engine, text, [0, 1, 2], uniforms, chosen) for engine in (before, now)]
    assert torch.equal(*drawn)


@settings(max_examples=20)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
def test_rounding_is_to_the_nearest_of_255_numbers(outputs, inputs, scale):
    x = scale * torch.randn(outputs, inputs, generator=tiny.seeded(outputs * inputs))
    codes, step = in_eight_bits(x)
    for row, whole, s in zip(x.tolist(), codes.tolist(), step.flatten().tolist(), strict=True):
        most = max(map(abs, row))
        assert s == pytest.approx(most / 127 + 1e-14)
        assert all(-127 <= n <= 127 and abs(n * s - value) <= 0.5001 * s for n, value in zip(whole, row, strict=True))


@VARIANTS
def test_tables_in_16_bits_are_the_same_numbers(options):
    """A bundle's tables stay as they are stored; only what is looked up is widened."""
    model = tiny.prior(STREAM, *PATTERNS, seed=3, **options)
    whole = drawing_weights(model)
    half = {name: w.half() for name, w in whole.tensors.items()}
    widened = {name: w.float() for name, w in half.items()}
    text, codes = tiny.texts(2, STREAM), tiny.codes(2, STREAM)

    def logits(engine):
        prompts = engine.prefill(text)
        cache = engine.start(prompts)
        return torch.stack([prompts.logits, *(engine.decode_step(codes[:, j], j, cache) for j in range(15))])

    with torch.inference_mode():
        found, expected = (logits(Engine(replace(whole, tensors=tensors))) for tensors in (half, widened))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@VARIANTS
def test_a_prior_comes_back(options):
    model = tiny.prior(STREAM, *PATTERNS, seed=3, **options)
    again = prior_of(drawing_weights(model))
    text, codes = tiny.texts(3, STREAM), tiny.codes(3, STREAM)
    with torch.inference_mode():
        for a, b in zip(model(text, codes), again(text, codes), strict=True):
            assert (a - b).abs().max() < 1e-5 * max(10, a.abs().max())
    assert again.config == model.config.folded() and not again.training


@VARIANTS
def test_a_rounded_prior_computes_with_what_is_drawn_with(options):
    """The 32-bit prior of rounded weights and the engine on them in 32 bits are one model."""
    weights = rounded(drawing_weights(tiny.prior(STREAM, *PATTERNS, seed=3, **options)))
    model, engine = prior_of(weights), Engine(weights, "fp32")
    for name in matrices(weights.config):
        if not name.endswith("qkv"):
            step = weights.tensors[f"{name}.step"]
            assert torch.equal(model.get_parameter(f"{name}.weight"), weights.tensors[f"{name}.weight"] * step[:, None])
    text, codes = tiny.texts(2, STREAM), tiny.codes(2, STREAM)
    with torch.inference_mode():
        prompts = engine.prefill(text)
        step = engine.decode_step(codes[:, 0], 0, engine.start(prompts))
        expected = model(text, codes)[1]
    near = 1e-5 * max(10, expected.abs().max())
    assert (prompts.logits - expected[:, 0]).abs().max() < near
    assert (step - expected[:, 1]).abs().max() < near


@VARIANTS
@pytest.mark.parametrize("patterns", [("full",), PATTERNS])
def test_what_is_stored_is_read_back_without_a_copy(patterns, options):
    model = tiny.prior(STREAM, *patterns, **options)
    weights = rounded(drawing_weights(model))
    again = read_rounded(weights.tensors, model.config, STREAM)
    assert again.config == weights.config
    assert all(again.tensors[name] is w for name, w in weights.tensors.items())


def test_what_does_not_fit_is_refused():
    model = tiny.prior(STREAM, "full", "row", features=8)
    whole = dict(rounded(drawing_weights(model)).tensors)
    step, matrix = "blocks.1.mlp_out.step", "blocks.0.attention.qkv.weight"

    def refused(problem, *left_out, **changed):
        tensors = {name: w for name, w in whole.items() if name not in left_out} | changed
        with pytest.raises(RequestError, match=problem):
            read_rounded(tensors, model.config, STREAM)

    for name in whole:
        refused(f"{name} is missing", name)
        refused(f"{name}: expected the shape", **{name: whole[name][None]})
    refused(f"{step}: expected floating point, got torch.int8", **{step: whole[step].to(torch.int8)})
    refused(f"{matrix}: expected whole numbers of eight bits, got torch.float32", **{matrix: whole[matrix].float()})
    refused("code_inputs.out.bias is not known", **{"code_inputs.out.bias": torch.zeros(16)})
