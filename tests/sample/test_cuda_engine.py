import copy
import gc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS
from armchair.prior.sequence import null_text
from armchair.prior.transformer import Prior
from armchair.runtime import has_fast_bfloat16
from armchair.sample.cuda_engine import CudaEngine, as_it_is, default_cuda_weights
from armchair.sample.engine import Engine
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
from armchair.sample.pipeline import Artist, load_artist

STREAM = tiny.shape(grid=4, text_length=4, codebook=17)
KINDS = [(p, o) for p in PATTERNS for o in tiny.OPTIONS if p == "full" or o in ("paper", "all")]
GUIDED = Settings(guidance=2.0, min_p=0.1)
REASON = "needs a CUDA GPU, and this PyTorch finds none"
engine = partial(CudaEngine, weights="fp32")


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)(test))


def forced_logits(decoder, text, codes):
    """(B, N, K): logits of every code, given those before it."""
    with torch.inference_mode():
        cache = decoder.start(prompts := decoder.prefill(text))
        steps = [decoder.decode_step(codes[:, j], j, cache) for j in range(codes.shape[1] - 1)]
        return torch.stack([prompts.logits, *steps], 1)


def drawn(decoder, chosen=GUIDED, count=11, stream=STREAM):
    uniforms = candidate_uniforms(1, range(count), stream.image_length)
    return draw_codes(decoder, tiny.texts(3, stream), [c % 3 for c in range(count)], uniforms, chosen).cpu()


# Against the literal decoder.


@pytest.mark.parametrize(("pattern", "options"), KINDS)
@pytest.mark.parametrize("grid", [4, 13])  # within the window of every pattern, and wider
def test_the_logits_of_the_literal_decoder(pattern, options, grid):
    stream = tiny.shape(grid, text_length=3)
    model = tiny.prior(stream, pattern, pattern, seed=2, **tiny.OPTIONS[options]).folded()
    assert_the_same(engine(model), model, stream)


@settings(max_examples=25)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    grid=st.integers(1, 6),
    text_length=st.integers(1, 9),
    rows=st.integers(1, 5),
    options=st.sampled_from(list(tiny.OPTIONS.values())),
    seed=st.integers(0, 999),
)
def test_of_any_mixture_and_size(patterns, grid, text_length, rows, options, seed):
    stream = tiny.shape(grid, text_length)
    model = tiny.prior(stream, *patterns, **options, seed=seed).folded()
    assert_the_same(engine(model), model, stream, rows)


def test_codes_that_look_alike_are_folded_in():
    model = tiny.prior(STREAM, "full", features=8, seed=1)
    assert_the_same(engine(model), model.folded(), STREAM)


def assert_the_same(decoder, model, stream, rows=3):
    """To 1e-5 of the largest logit where that is above 1."""
    text, codes = tiny.texts(rows, stream), tiny.codes(rows, stream)
    expected, found = forced_logits(model, text, codes), forced_logits(decoder, text, codes)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("options", ["paper", "all"])
@pytest.mark.parametrize("chosen", [Settings(), GUIDED, Settings(temperature=0.0)])
def test_drawing_gives_the_codes_of_the_literal_decoder(options, chosen):
    model = tiny.prior(STREAM, *PATTERNS, seed=5, **tiny.OPTIONS[options])
    codes = drawn(engine(model), chosen)
    assert torch.equal(codes, drawn(model, chosen))
    uniforms = candidate_uniforms(1, range(3), 16)
    assert torch.equal(codes[:3], draw_codes_uncached(model, tiny.texts(3, STREAM), uniforms, chosen))


def test_given_codes_stay_and_drawing_may_end_early():
    model = tiny.prior(STREAM, "row", "full", seed=5)
    forced = torch.where(torch.arange(16) % 3 == 0, tiny.codes(3, STREAM), FREE)
    more = tiny.texts(3, STREAM), range(3), candidate_uniforms(0, range(3), 16), GUIDED, forced
    assert torch.equal(draw_codes(engine(model), *more, until=9), draw_codes(model, *more, until=9))


def test_tokens_may_be_given_again():
    """After others, which left their keys behind, where the cache is one to go back in."""
    stream = tiny.shape(grid=13, text_length=3)
    decoder = engine(tiny.prior(stream, *PATTERNS, seed=4))
    text, codes, wrong = tiny.texts(2, stream), tiny.codes(2, stream), tiny.codes(2, stream, seed=9)
    with torch.inference_mode():
        cache = decoder.start(prompts := decoder.prefill(text), ahead=True)
        found = [prompts.logits[:, None]]
        for j in range(0, 168, 4):
            decoder.decode_steps(wrong[:, j : min(j + 9, 168)], j, cache)
            found.append(decoder.decode_steps(codes[:, j : j + 4], j, cache))
    assert (torch.cat(found, 1) - forced_logits(decoder, text, codes)).abs().max() < 1e-5


@pytest.mark.parametrize("options", tiny.OPTIONS)
def test_16_bit_weights_move_the_distribution_little(options):
    model = tiny.prior(STREAM, "full", "row", width=64, seed=3, **tiny.OPTIONS[options])
    if model.config.tied:  # random vectors of that size would be surer than any model is
        model.image_embedding.weight.data.mul_(0.05)
    text, codes = tiny.texts(32, STREAM), tiny.codes(32, STREAM)
    p = forced_logits(model.folded(), text, codes).log_softmax(-1)
    q = forced_logits(CudaEngine(model), text, codes).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < divergence < 2e-3 * -(p.exp() * p).sum(-1).mean()


def test_matrices_keys_and_values_have_16_bits_and_nothing_has_float16():
    model = tiny.prior(STREAM, "full", seed=3, **tiny.OPTIONS["all"])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    decoder = CudaEngine(model, "bf16")
    cache = decoder.start(decoder.prefill(tiny.texts(2, STREAM)))
    of_products = [p.dtype for p in (*decoder.model.blocks.parameters(), *decoder.model.image_head.parameters())]
    assert of_products.count(torch.bfloat16) == 2 * 5
    assert {kept.dtype for kept in (*cache.buffers.keys, *cache.buffers.values)} == {torch.bfloat16}
    assert cache.buffers.logits.dtype == decoder.positions.dtype == torch.float32
    assert torch.float16 not in {p.dtype for p in decoder.model.parameters()}
    assert all(torch.equal(w, before[name]) and w.dtype == before[name].dtype for name, w in model.state_dict().items())


def test_32_bit_weights_are_shared_with_the_prior():
    model = tiny.prior(STREAM, "full", seed=3)
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in engine(model).model.parameters()} == shared


# What a graph relies on.


def addresses(buffers):
    tables = buffers.tables.slots.values(), buffers.tables.masks.values()
    tensors = *buffers.keys, *buffers.values, buffers.tokens, buffers.place, buffers.logits, *tables[0], *tables[1]
    return [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors]


def held_bytes():
    """Of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):  # `isinstance` would ask proxies, which import what they stand for
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_step_changes_no_address_and_holds_no_more_memory():
    decoder = engine(tiny.prior(STREAM, *PATTERNS, seed=3, **tiny.OPTIONS["all"]))
    codes = tiny.codes(4, STREAM)
    cache = decoder.start(decoder.prefill(tiny.texts(4, STREAM)))
    decoder.decode_step(codes[:, 0], 0, cache)
    before, held = addresses(cache.buffers), held_bytes()
    for j in range(1, 15):
        decoder.decode_step(codes[:, j], j, cache)
    assert addresses(cache.buffers) == before and held_bytes() == held


class Operations(TorchDispatchMode):
    """What is computed: every operation, and the shapes that go in and come out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [tuple(t.shape) for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]))
        return out


@pytest.mark.parametrize("options", ["paper", "all"])
def test_a_step_is_the_same_at_every_place_and_takes_no_number_out_of_a_tensor(options):
    """As the host would have to wait for that, and a graph could not have it."""
    decoder = engine(tiny.prior(STREAM, *PATTERNS, seed=3, **tiny.OPTIONS[options]))
    every = []
    with torch.no_grad():  # in inference mode what an operation is made of would not be seen
        buffers = decoder._buffers(2, ahead=False)
        for j in range(15):
            buffers.place.fill_(j)
            with Operations() as operations:
                decoder._step(buffers)
            every.append(operations.seen)
    assert all(seen == every[0] for seen in every)
    names = {name for name, _ in every[0]}
    assert any("scaled_dot_product" in name for name in names) or any("softmax" in name for name in names)
    assert not [name for name in names if "local_scalar" in name or "nonzero" in name or "_to_copy" in name]


def test_logits_that_were_given_stay_as_they_are():
    decoder = engine(tiny.prior(STREAM, "full", seed=3))
    cache = decoder.start(decoder.prefill(tiny.texts(1, STREAM)))
    first = decoder.decode_step(torch.tensor([1]), 0, cache)
    kept = first.clone()
    decoder.decode_step(torch.tensor([2]), 1, cache)
    assert torch.equal(first, kept)


def test_where_nothing_can_be_recorded_it_draws_all_the_same(caplog):
    model = tiny.prior(STREAM, "full", "row", seed=5)
    text, uniforms = tiny.texts(2, STREAM), candidate_uniforms(0, range(2), STREAM.image_length)

    def fails(step, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")

    decoder = engine(model)
    decoder.record = fails
    drawn = [draw_codes(decoder, text, [0, 1], uniforms, Settings(guidance=g)) for g in (2.0, 1.0)]
    assert torch.equal(drawn[0], draw_codes(engine(model), text, [0, 1], uniforms, Settings(guidance=2.0)))
    (record,) = caplog.records
    assert "so drawing is slower: CUDA error" in record.message and "more" not in record.message


def test_a_step_is_recorded_once_for_each_number_of_rows_and_then_replayed():
    """With a stand-in for the graph, which may run nothing but the step as it was recorded."""
    model = tiny.prior(STREAM, *PATTERNS, seed=3)
    decoder, recorded, replayed = engine(model), [], []

    def record(step, device):
        number = len(recorded)
        recorded.append(device)
        return lambda: (replayed.append(number), step())

    decoder.record = record
    assert torch.equal(drawn(decoder), drawn(model))
    assert torch.equal(drawn(decoder, Settings()), drawn(model, Settings()))
    assert recorded == [torch.device("cpu")] * 2  # 16 rows with guidance, 8 without
    assert replayed == [0] * 2 * 15 + [1] * 2 * 15  # two micro-batches each


# One drawing after the other, and several at once.


def test_a_second_drawing_is_the_first_again():
    decoder = engine(tiny.prior(STREAM, *PATTERNS, seed=5))
    first = drawn(decoder)
    drawn(decoder, Settings(temperature=0.0))
    assert torch.equal(drawn(decoder), first)
    assert {rows: len(free) for rows, free in decoder.free.items()} == {(16, False): 1, (8, False): 1}


def test_what_is_not_finite_does_not_outlive_its_picture():
    decoder = engine(tiny.prior(STREAM, *PATTERNS, seed=5))
    first = drawn(decoder)
    with torch.inference_mode():
        for kept in decoder.free[16, False][0].keys + decoder.free[16, False][0].values:
            kept.fill_(torch.nan)
    assert torch.equal(drawn(decoder), first)


def test_drawings_that_go_on_side_by_side_do_not_meet():
    """As a server has them: of the same size, at other places of their pictures."""
    model = tiny.prior(STREAM, *PATTERNS, seed=5)
    decoder, null = engine(model), null_text(1, STREAM)

    def begin(draws, seed):
        prompts, empty = read_prompts(draws, tiny.texts(8, STREAM, seed)), read_prompts(draws, null)
        free = torch.full((8, 16), FREE)
        return MicroBatch(draws, prompts, empty, candidate_uniforms(seed, range(8), 16), GUIDED, free)

    one = begin(decoder, 0)
    for _ in range(5):
        one.take(decoder.decode_steps(*one.step()))
    other = begin(decoder, 1)
    for _ in range(10):
        for batch, logits in zip((one, other), decoder.decode_together([one.step(), other.step()]), strict=True):
            batch.take(logits)
    while not other.done:
        other.take(decoder.decode_steps(*other.step()))
    for seed, batch in enumerate((one, other)):
        alone = begin(model.folded(), seed)
        list(draw_micro_batch(model.folded(), alone))
        assert batch.done and torch.equal(batch.codes, alone.codes)


def test_the_number_of_candidates_changes_none():
    decoder = engine(tiny.prior(STREAM, *PATTERNS, seed=5))
    assert torch.equal(drawn(decoder, count=2), drawn(decoder, count=19)[:2])


# What an artist draws with.


@pytest.fixture
def elsewhere(tiny_bundle: Path):
    """An artist on another device, as far as it says which form of the weights goes with that."""

    def make(kind: str) -> Artist:
        artist = copy.copy(load_artist(tiny_bundle, "cpu"))
        artist.prior  # noqa: B018  # read while it is on the CPU
        artist.device, artist._decoders = torch.device(kind), {}
        return artist

    return make


def test_an_artist_on_a_gpu_draws_by_graphs(elsewhere, tiny_bundle: Path):
    on_cpu, on_gpu = load_artist(tiny_bundle, "cpu", weights="fp32"), elsewhere("cuda")
    decoder = on_gpu.decoder("fp32")
    assert isinstance(decoder, CudaEngine) and decoder.weights == "fp32" and on_gpu.decoder("fp32") is decoder
    assert isinstance(on_cpu.decoder(), Engine)
    assert on_gpu.decoder("bf16").weights == "bf16"
    stream = decoder.shape
    assert torch.equal(drawn(decoder, stream=stream), drawn(on_cpu.prior, stream=stream))


def test_eight_bits_are_for_a_cpu(elsewhere):
    with pytest.raises(RequestError, match="weights 'int8' are not for cuda; take bf16 or fp32"):
        elsewhere("cuda").decoder("int8")


def test_other_devices_keep_the_literal_decoder(elsewhere):
    assert isinstance(elsewhere("meta").decoder("fp32"), Prior)
    with pytest.raises(RequestError, match="weights 'bf16' are not for meta; take fp32"):
        elsewhere("meta").decoder("bf16")


def test_unknown_weights_are_refused():
    with pytest.raises(RequestError, match="weights.*'bf17'"):
        CudaEngine(tiny.prior(STREAM, "full"), "bf17")



@pytest.mark.parametrize(("major", "weights"), [(7, "fp32"), (8, "bf16")])
def test_emulated_bfloat16_is_not_taken_for_native(major, weights, monkeypatch):
    """Which GPUs before Ampere have, slower than 32 bits."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert default_cuda_weights(torch.device("cuda")) == weights


# Where there is a GPU: the graphs themselves.


@on_gpu
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize(("pattern", "options"), KINDS)
def test_a_graph_gives_what_the_step_gives(pattern, options, weights):
    stream = tiny.shape(grid=13, text_length=3)
    model = tiny.prior(stream, pattern, pattern, width=64, seed=2, **tiny.OPTIONS[options]).cuda()
    text, codes = tiny.texts(3, stream).cuda(), tiny.codes(3, stream).cuda()
    graph = CudaEngine(model, weights)
    found, pictures = forced_logits(graph, text, codes), drawn(graph, stream=stream)
    eager = CudaEngine(model, weights)
    eager.record = as_it_is
    assert (found - forced_logits(eager, text, codes)).abs().max() < 1e-5 * max(1, found.abs().max())
    assert torch.equal(pictures, drawn(eager, stream=stream))
    if weights == "fp32":
        literal = forced_logits(model.folded(), text, codes)
        assert (found - literal).abs().max() < 1e-4 * max(1, literal.abs().max())


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_token_neither_allocates_memory_nor_makes_the_host_wait():
    decoder = CudaEngine(tiny.prior(STREAM, *PATTERNS, seed=3, **tiny.OPTIONS["all"]).cuda())
    codes = tiny.codes(4, STREAM).cuda()
    cache = decoder.start(decoder.prefill(tiny.texts(4, STREAM).cuda()))
    decoder.decode_step(codes[:, 0], 0, cache)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for j in range(1, 15):
            decoder.decode_step(codes[:, j], j, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@on_gpu
def test_a_drawing_on_the_gpu_comes_again(tiny_bundle: Path):
    artist = load_artist(tiny_bundle, "cuda")
    assert artist.weights == ("bf16" if has_fast_bfloat16(artist.device) else "fp32")
    first = artist.draw("a red circle", candidates=9, seed=7)
    assert (artist.draw("a red circle", candidates=3, seed=7).codes == first.codes[:3]).all()
    assert (load_artist(tiny_bundle, "cuda").draw("a red circle", candidates=9, seed=7).codes == first.codes).all()
