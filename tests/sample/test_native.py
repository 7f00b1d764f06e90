"""The compiled step beside the same step by PyTorch. tests/sample/test_engine.py holds both to the model."""

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.prior.attention import PATTERNS
from armchair.prior.transformer import Prior
from armchair.sample import native
from armchair.sample.engine import Cache, Engine, FusedCache, pack
from armchair.sample.generate import candidate_uniforms, draw_codes
from armchair.sample.next_token import Settings
from armchair.sample.weights import in_eight_bits

TASKS = Path("/proc/self/task")
STREAM = tiny.shape(grid=5, text_length=4, codebook=150)

needs_the_library = pytest.mark.skipif(
    native.library() is None, reason="the compiled step was not built here, or is not for this processor"
)


@pytest.fixture(params=["avx512", "avx2"], scope="module")
def each_kind(request):
    """With every kind of instructions that this processor has."""
    library = native.library()
    if library is None:
        pytest.skip("the compiled step was not built here, or is not for this processor")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "avx2":
            patch.setenv("ARMCHAIR_NATIVE", "avx2")
        elif native.instructions(library) != native.AVX512:
            pytest.skip("this processor has no AVX-512 with VNNI")
        yield


EACH_KIND = pytest.mark.usefixtures("each_kind")


def by_pytorch(model: Prior, monkeypatch: pytest.MonkeyPatch) -> Engine:
    with monkeypatch.context() as patch:
        patch.setenv("ARMCHAIR_NATIVE", "0")
        engine = Engine(model, "int8")
    assert engine.native is None
    return engine


def logits(engine: Engine, text: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(R, N-1, K) of every code but the first."""
    with torch.inference_mode():
        cache = engine.start(engine.prefill(text))
        return torch.stack([engine.decode_step(codes[:, j], j, cache) for j in range(codes.shape[1] - 1)], 1)


@EACH_KIND
@pytest.mark.parametrize("width", [32, 96, 320])  # heads of 16, 48 and 160
@pytest.mark.parametrize("name", tiny.OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_compiled_step_is_that_of_pytorch(pattern, name, width, monkeypatch):
    monkeypatch.setattr("armchair.sample.engine.fused_attention", lambda: False)  # keys in eight bits here too
    model = tiny.prior(STREAM, pattern, "full", width=width, seed=1, **tiny.OPTIONS[name])
    compiled, pytorch = Engine(model, "int8"), by_pytorch(model, monkeypatch)
    assert compiled.native is not None
    text, codes = tiny.texts(7, STREAM), tiny.codes(7, STREAM)
    a, b = logits(compiled, text, codes), logits(pytorch, text, codes)
    # Sums in another order can round a number to its neighbour among 255: far less than what rounding itself costs.
    with torch.inference_mode():
        exact = model(text, codes)[1][:, 1:]
    assert (a - b).square().mean() < 0.5 * (b - exact).square().mean()
    assert (a - b).abs().median() < 1e-2 * b.std()


@EACH_KIND
@pytest.mark.parametrize("inputs", [16, 64, 272])
@pytest.mark.parametrize("codebook", [5, 64, 130])
def test_products_are_exact_at_the_ends_of_the_range(inputs, codebook):
    """Of a model that hands its tokens' vectors of -1 and 1 to the head as they are."""
    stream = tiny.shape(grid=2, text_length=2, codebook=codebook)
    model = tiny.prior(stream, "full", width=inputs * (1 if inputs % 32 == 0 else 2), norm="rms")
    g = tiny.seeded(3)
    width = model.config.d_model
    ends = torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        for p in (p for block in model.blocks for p in block.parameters()):
            p.zero_()
        model.row_embedding.weight.zero_()
        model.column_embedding.weight.zero_()
        model.norm.weight.fill_(1.0)
        model.image_embedding.weight.copy_(ends[torch.randint(2, (codebook, width), generator=g)])
        model.image_head.weight.copy_(ends[torch.randint(2, (codebook, width), generator=g)])
        model.image_head.weight[0] = model.image_embedding.weight[0] = 1.0
        model.image_head.bias.zero_()
    engine = Engine(model, "int8")
    assert engine.native is not None
    codes = torch.randint(codebook, (9, 4), generator=g)
    codes[0] = 0
    found = logits(engine, tiny.texts(9, stream), codes)[:, 0]
    expected = model.image_embedding.weight[codes[:, 0]] @ model.image_head.weight.T  # whole numbers up to `width`
    assert (found - expected).abs().max() < 1e-4 * width and found[0, 0] > 0.999 * width


@EACH_KIND
@pytest.mark.parametrize("inputs", [16, 100, 512])
@pytest.mark.parametrize("outputs", [1, 17, 64, 200])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 70])
def test_a_product_alone_is_that_of_pytorch(rows, outputs, inputs):
    g = tiny.seeded(rows)
    weight, bias = torch.randn(outputs, inputs, generator=g), torch.randn(outputs, generator=g)
    codes, step = in_eight_bits(weight)
    x = torch.randn(rows, inputs, generator=g)
    library = native.library()
    assert library is not None
    product = native.NativeProduct(native.Calls(library), codes, step[:, 0], bias)
    found, expected = product(x), pack(weight, bias, "int8")(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(found[-1:], product(x[-1:]))


@EACH_KIND
@settings(max_examples=25, deadline=None)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    rows=st.integers(1, 20),
    threads=st.integers(1, 4),
    name=st.sampled_from(list(tiny.OPTIONS)),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_same_bits_beside_others_and_with_more_threads(patterns, rows, threads, name, seed):
    model = tiny.prior(STREAM, *patterns, width=64, seed=seed, **tiny.OPTIONS[name])
    engine = Engine(model, "int8")
    text, codes = tiny.texts(20, STREAM, seed), tiny.codes(20, STREAM, seed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = logits(engine, text, codes)
        torch.set_num_threads(threads)
        some = slice(20 - rows, 20)
        assert torch.equal(whole[some], logits(engine, text[some], codes[some]))
    finally:
        torch.set_num_threads(before)


@needs_the_library
def test_it_is_left_out_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("armchair.sample.engine.fused_attention", lambda: True)
    model = tiny.prior(STREAM, "full", width=32)
    prompts = Engine(model, "int8").prefill(tiny.texts(1, STREAM))
    compiled = Engine(model, "int8").start(prompts)
    assert type(compiled) is Cache and compiled.kept[0].dtype == torch.int8
    assert type(by_pytorch(model, monkeypatch).start(prompts)) is FusedCache
    assert Engine(model, "fp32").native is None


def drawn(engine: Engine) -> torch.Tensor:
    return draw_codes(engine, tiny.texts(1, STREAM), [0], candidate_uniforms(0, range(1), 25), Settings())


@pytest.mark.parametrize("what", ["nothing was built", "another system's", "another processor's"])
def test_without_it_pytorch_draws(what, monkeypatch, tmp_path):
    if what == "nothing was built":
        monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".none"])
    elif what == "another system's":
        (tmp_path / "_native.other").write_bytes(b"no library")
        monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".other"])
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    else:
        monkeypatch.setattr("ctypes.CDLL", lambda path: FakeLibrary())
    native._loaded.cache_clear()
    try:
        assert native.library() is None
        engine = Engine(tiny.prior(STREAM, "full", width=32), "int8")
        assert engine.native is None and drawn(engine).shape == (1, 5, 5)
    finally:
        native._loaded.cache_clear()


class FakeLibrary:
    def __getattr__(self, name: str) -> "FakeLibrary":
        return self

    def __call__(self) -> int:
        return 0


@needs_the_library
@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list a process's threads")
def test_threads_end_with_their_engine():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        gc.collect()  # engines of other tests, whose threads end too
        engine = Engine(tiny.prior(STREAM, "full", width=32), "int8")
        drawn(engine)
        during = len(list(TASKS.iterdir()))
        del engine
        gc.collect()
        assert during - len(list(TASKS.iterdir())) == 2
    finally:
        torch.set_num_threads(before)


@needs_the_library
@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list a process's threads")
def test_a_step_is_shared_by_threads_of_its_own_while_pytorch_has_one():
    before, text, codes = torch.get_num_threads(), tiny.texts(2, STREAM), tiny.codes(2, STREAM)
    engine = Engine(tiny.prior(STREAM, "full", width=32), "int8")
    torch.set_num_threads(1)
    try:
        expected, during = logits(engine, text, codes), len(list(TASKS.iterdir()))
        torch.set_num_threads(4)
        with pytest.raises(KeyboardInterrupt), native.sharing(3):
            assert torch.get_num_threads() == 1
            assert torch.equal(logits(engine, text, codes), expected)
            assert len(list(TASKS.iterdir())) == during + 2
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_sizes_that_it_is_not_for_are_left_to_pytorch():
    model = tiny.prior(STREAM, "full", width=16)  # heads of 8
    assert not native.fits(model.config) and Engine(model, "int8").native is None
