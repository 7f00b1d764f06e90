import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from armchair.prior.attention import PATTERNS
from armchair.prior.sequence import null_text
from armchair.prior.transformer import Prior
from armchair.sample.generate import (
    FREE,
    MICRO_BATCH,
    MicroBatch,
    candidate_uniforms,
    draw_codes,
    draw_codes_uncached,
    draw_micro_batch,
    read_prompts,
)
from armchair.sample.next_token import Settings

STREAM = tiny.shape(grid=4, text_length=4, codebook=17)
SAMPLED = [
    Settings(),
    Settings(temperature=0.7, top_k=5),
    Settings(top_p=0.8),
    Settings(min_p=0.3),
    Settings(min_p=0.2, guidance=2.0),
    Settings(guidance=3.0, top_k=8),
    Settings(guidance=0.5),
    Settings(temperature=0.0),
    Settings(temperature=0.0, guidance=2.0),
]


@pytest.fixture(scope="module")
def model() -> Prior:
    return tiny.prior(STREAM, *PATTERNS, seed=5)


def draw(
    model: Prior, chosen: Settings, rows: list[int], candidates: list[int], forced: Tensor | None = None
):
    uniforms = candidate_uniforms(1, candidates, model.shape.image_length)
    return draw_codes(model, tiny.texts(3, model.shape), rows, uniforms, chosen, forced)


# The cached sampler against the literal one.


@settings(max_examples=25)
@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    grid=st.integers(1, 5),
    text_length=st.integers(1, 5),
    chosen=st.sampled_from(SAMPLED),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=10),
    seed=st.integers(0, 999),
)
def test_drawing_equals_the_literal_sampler(patterns, grid, text_length, chosen, rows, seed):
    stream = tiny.shape(grid, text_length)
    model = tiny.prior(stream, *patterns, seed=seed)
    text = tiny.texts(3, stream, seed)
    uniforms = candidate_uniforms(seed, range(len(rows)), stream.image_length)
    drawn = draw_codes(model, text, rows, uniforms, chosen)
    assert drawn.shape == (len(rows), grid, grid) and drawn.dtype == torch.int64
    assert torch.equal(drawn, draw_codes_uncached(model, text[rows], uniforms, chosen))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_drawing_equals_the_literal_sampler_on_a_grid_wider_than_the_window(pattern, guidance):
    stream = tiny.shape(grid=12, text_length=3)
    model = tiny.prior(stream, pattern, pattern, seed=2)
    text, uniforms = tiny.texts(1, stream), candidate_uniforms(0, [0], 144)
    chosen = Settings(guidance=guidance)
    assert torch.equal(
        draw_codes(model, text, [0], uniforms, chosen), draw_codes_uncached(model, text, uniforms, chosen)
    )


def test_captions_and_candidates_matter(model):
    codes = draw(model, Settings(), [0, 1, 0, 0], [0, 0, 1, 0])
    assert torch.equal(codes[0], codes[3])
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_drawings_follow_the_models_distribution():
    assert tiny.off_distribution(lambda model: model) < 0.03


# Determinism.


def test_a_candidates_uniforms_are_its_own():
    four, many = candidate_uniforms(7, range(4), 20), candidate_uniforms(7, range(16), 20)
    assert torch.equal(four, many[:4]) and torch.equal(candidate_uniforms(7, [2], 20)[0], many[2])
    assert len(many.unique()) == 16 * 20 and many.min() >= 0 and many.max() < 1
    assert not torch.equal(candidate_uniforms(8, [2], 20)[0], many[2])


@pytest.mark.parametrize("chosen", SAMPLED)
def test_codes_do_not_depend_on_who_shares_the_batch(model, chosen):
    rows, candidates = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1], list(range(11))
    together = draw(model, chosen, rows, candidates)
    for i in (0, 7, 8, 10):
        assert torch.equal(draw(model, chosen, rows[i : i + 1], candidates[i : i + 1])[0], together[i])
    assert torch.equal(draw(model, chosen, rows[:4], candidates[:4]), together[:4])
    assert torch.equal(draw(model, chosen, rows[::-1], candidates[::-1]), together.flip(0))


@settings(max_examples=15)
@given(picked=st.lists(st.integers(0, 20), min_size=1, max_size=19), guidance=st.sampled_from([1.0, 2.5]))
def test_any_company_gives_the_same_codes(picked, guidance):
    model = tiny.prior(STREAM, "row", "convolutional", width=64, seed=3)
    chosen = Settings(guidance=guidance)
    alone = {c: draw(model, chosen, [c % 3], [c])[0] for c in set(picked)}
    together = draw(model, chosen, [c % 3 for c in picked], picked)
    assert all(torch.equal(codes, alone[c]) for codes, c in zip(together, picked, strict=True))


@pytest.mark.parametrize(("guidance", "rows_at_once"), [(1.0, MICRO_BATCH), (2.0, 2 * MICRO_BATCH)])
@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_every_product_has_the_same_number_of_rows(model, monkeypatch, guidance, rows_at_once, count):
    seen = set()
    step = model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda token, *more: seen.add(len(token)) or step(token, *more))
    draw(model, Settings(guidance=guidance), [0] * count, list(range(count)))
    assert seen == {rows_at_once}


def test_a_captions_state_does_not_depend_on_its_neighbours(model):
    text = tiny.texts(3, STREAM)
    together, alone = read_prompts(model, text), read_prompts(model, text[1:2])
    assert torch.equal(together.logits[1:2], alone.logits)
    for a, b in zip(together.keys + together.values, alone.keys + alone.values, strict=True):
        assert torch.equal(a[1:2], b)


def test_greedy_drawing_ignores_the_uniforms(model):
    greedy = Settings(temperature=0.0)
    assert torch.equal(draw(model, greedy, [1], [0]), draw(model, greedy, [1], [99]))
    assert not torch.equal(draw(model, Settings(), [1], [0]), draw(model, Settings(), [1], [99]))


def test_drawing_leaves_the_global_random_state_alone(model):
    before = torch.random.get_rng_state()
    draw(model, Settings(), [0], [0])
    assert torch.equal(torch.random.get_rng_state(), before)


# Forced codes and partial results.


@settings(max_examples=25)
@given(data=st.data(), guidance=st.sampled_from([1.0, 2.0]), temperature=st.sampled_from([0.0, 1.0]))
def test_forced_codes_are_kept_and_the_rest_is_drawn_after_them(data, guidance, temperature):
    model = tiny.prior(STREAM, "full", "row", seed=4)
    chosen = Settings(guidance=guidance, temperature=temperature)
    n, k = STREAM.image_length, STREAM.codebook_size
    forced = torch.tensor(data.draw(st.lists(st.integers(FREE, k - 1), min_size=2 * n, max_size=2 * n))).view(
        2, n
    )
    codes = draw(model, chosen, [0, 1], [0, 1], forced).flatten(1)
    assert torch.equal(codes[forced != FREE], forced[forced != FREE])
    # To force a code that was drawn changes nothing: the uniforms are spent by position.
    assert torch.equal(draw(model, chosen, [0, 1], [0, 1], codes).flatten(1), codes)
    first_half = torch.where(torch.arange(n) < n // 2, codes, FREE)
    again = draw(model, chosen, [0, 1], [0, 1], torch.where(forced == FREE, first_half, forced))
    assert torch.equal(again.flatten(1), codes)


def test_what_is_forced_changes_what_is_drawn_after_it_only(model):
    n = STREAM.image_length
    free = draw(model, Settings(), [0], [0]).flatten()
    forced = torch.full((1, n), FREE)
    forced[0, 6] = (free[6] + 1) % STREAM.codebook_size
    codes = draw(model, Settings(), [0], [0], forced).flatten()
    assert torch.equal(codes[:6], free[:6]) and not torch.equal(codes[7:], free[7:])


def test_each_finished_row_is_shown(model):
    rows = torch.arange(MICRO_BATCH)
    prompts = read_prompts(model, tiny.texts(1, STREAM)).rows(rows * 0)
    null = read_prompts(model, null_text(1, STREAM))
    uniforms = candidate_uniforms(0, range(MICRO_BATCH), 16)
    forced = torch.full((MICRO_BATCH, 16), FREE)
    batch = MicroBatch(model, prompts, null, uniforms, Settings(guidance=2.0), forced)
    shown = list(draw_micro_batch(model, batch))
    assert len(shown) == 4
    for row, codes in enumerate(shown):
        done = 4 * (row + 1)
        assert torch.equal(codes[:, :done], shown[-1][:, :done]) and not codes[:, done:].any()
