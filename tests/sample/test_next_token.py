import bisect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.sample.next_token import Settings, guide, pick, plausible, probabilities

rows_of_logits = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40)
uniforms = st.floats(0, 1, exclude_max=True)


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def drawn(logits: list[float], **fields) -> list[float]:
    return probabilities(torch.tensor([logits]), Settings(**fields))[0].tolist()


@given(logits=rows_of_logits, temperature=st.floats(0.05, 10))
def test_temperature_divides_the_logits(logits, temperature):
    assert drawn(logits, temperature=temperature) == pytest.approx(softmax(logits, temperature), abs=1e-9)


@given(logits=rows_of_logits)
def test_temperature_zero_is_the_likeliest_code(logits):
    p = drawn(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert sorted(p) == [0.0] * (len(p) - 1) + [1.0]
    assert logits[p.index(1.0)] == max(logits)


@given(logits=rows_of_logits, k=st.integers(1, 50), temperature=st.floats(0.2, 3))
def test_top_k_keeps_the_k_likeliest(logits, k, temperature):
    p = drawn(logits, top_k=k, temperature=temperature)
    kept = [i for i, x in enumerate(p) if x > 0]
    assert len(kept) == min(k, len(logits))
    left_out = [x for i, x in enumerate(logits) if i not in kept]
    assert min(logits[i] for i in kept) >= max(left_out, default=-math.inf)
    assert [p[i] for i in kept] == pytest.approx(softmax([logits[i] for i in kept], temperature), abs=1e-9)


@given(logits=rows_of_logits, top_p=st.floats(0.01, 1, exclude_max=True))
def test_top_p_keeps_the_fewest_codes_that_reach_p(logits, top_p):
    full = drawn(logits)
    p = drawn(logits, top_p=top_p)
    kept = [i for i, x in enumerate(p) if x > 0]
    mass = sum(full[i] for i in kept)
    assert mass >= top_p - 1e-9
    fewest = next(
        n for n, m in enumerate(itertools.accumulate(sorted(full, reverse=True)), 1) if m >= top_p - 1e-9
    )
    assert len(kept) in (fewest, fewest + 1) if abs(mass - top_p) < 1e-6 else len(kept) == fewest
    assert (
        min(full[i] for i in kept)
        >= max((full[i] for i in range(len(full)) if i not in kept), default=0) - 1e-12
    )
    assert [p[i] for i in kept] == pytest.approx([full[i] / mass for i in kept], abs=1e-9)


def test_top_p_of_a_known_row():
    logits = [math.log(x) for x in (0.1, 0.4, 0.2, 0.3)]
    assert drawn(logits, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-6)
    assert drawn(logits, top_p=0.35) == pytest.approx([0, 1, 0, 0])
    assert drawn(logits, top_p=0.95) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-6)


def test_min_p_leaves_out_what_the_model_itself_finds_far_fetched():
    conditional = torch.tensor([[0.70, 0.20, 0.09, 0.01]]).log()
    unconditional = torch.tensor([[0.70, 0.29, 0.0099, 0.0001]]).log()
    guided = guide(conditional, unconditional, 3.0)
    assert guided.argmax() == 3  # the caption makes it a hundred times likelier: one in a hundred, still
    p = probabilities(plausible(guided, conditional, 0.1), Settings())
    ratio = (0.09**3 / 0.0099**2) / (0.70**3 / 0.70**2)  # of the third to the first
    assert p[0, 3] == 0 and p[0, 2] / p[0, 0] == pytest.approx(ratio, rel=1e-4)
    assert torch.equal(plausible(guided, conditional, 0.0), guided)
    assert plausible(guided, conditional, 1.0).isfinite().tolist() == [[True, False, False, False]]


def test_temperature_comes_first_then_top_k_then_top_p():
    logits = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    sharp = [x**2 / 0.3 for x in (0.4, 0.3, 0.2, 0.1)]
    assert drawn(logits, temperature=0.5, top_p=0.6) == pytest.approx([0.64, 0.36, 0, 0], abs=1e-6)
    assert sharp[0] + sharp[1] > 0.6 > sharp[0]
    # Of the two that top-k leaves, the first alone has 4/7 of the mass, 0.4 before.
    assert drawn(logits, top_k=2, top_p=0.5) == pytest.approx([1, 0, 0, 0])


def test_each_row_is_its_own():
    logits = torch.randn(5, 30, generator=tiny.seeded())
    chosen = Settings(top_k=7, top_p=0.8, temperature=0.9)
    together = probabilities(logits, chosen)
    assert together.dtype == torch.float64
    for i in range(5):
        assert torch.equal(together[i : i + 1], probabilities(logits[i : i + 1], chosen))


# The pick.

distributions = st.lists(st.sampled_from([0.0, 1e-12, 0.01, 0.3, 1.0, 5.0]), min_size=1, max_size=30).filter(
    any
)


def normalised(weights: list[float]) -> torch.Tensor:
    p = torch.tensor([weights], dtype=torch.float64)
    return p / p.sum()


@given(weights=distributions, u=uniforms)
def test_the_pick_is_the_inverse_cdf(weights, u):
    p = normalised(weights)
    cdf = list(itertools.accumulate(p[0].tolist()))
    if min(abs(u - c) for c in cdf) < 1e-9:
        return  # on a border, rounding may go either way; the next test is about those
    assert int(pick(p, torch.tensor([u], dtype=torch.float64))) == bisect.bisect_right(cdf, u)


@given(weights=distributions, u=st.sampled_from([0.0, 5e-324, 1e-17, 0.5, 1 - 2**-53, 1.0]))
def test_a_code_without_probability_is_never_picked(weights, u):
    p = normalised(weights)
    token = int(pick(p, torch.tensor([u], dtype=torch.float64)))
    possible = [i for i, w in enumerate(weights) if w > 0]
    assert token in possible
    if u == 0:
        assert token == possible[0]


def test_borders_between_codes_without_probability_are_skipped():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5, 0.0]]).double().expand(4, -1)
    borders = [0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53]
    assert pick(p, torch.tensor(borders, dtype=torch.float64)).tolist() == [1, 1, 4, 4]


def test_codes_are_picked_as_often_as_they_are_likely():
    p = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
    n = 50_000
    u = torch.rand(n, generator=tiny.seeded(3), dtype=torch.float64)
    counts = pick(p.expand(n, -1), u).bincount(minlength=6)
    assert counts[1] == 0
    likely = p > 0
    chi_square = ((counts - n * p)[likely].square() / (n * p[likely])).sum()
    assert chi_square < 18.5  # 0.1 % of right samplers with four degrees of freedom are above


def test_guidance_one_is_the_captions_logits_and_zero_the_empty_ones():
    with_caption, without = torch.randn(2, 3, 8, generator=tiny.seeded())
    torch.testing.assert_close(guide(with_caption, without, 1.0), with_caption)
    assert torch.equal(guide(with_caption, without, 0.0), without)
    torch.testing.assert_close(guide(with_caption, without, 3.0), 3 * with_caption - 2 * without)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 101), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
        ("top_p", 1.01), ("top_p", math.nan), ("guidance", -1), ("guidance", 1e6), ("guidance", math.inf),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(RequestError, match=f"{field}: expected .*{value}"):
        Settings(**{field: value})


@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.0, 0.01, 1.0, 100.0]), k=st.integers(0, 40))
def test_probabilities_sum_to_one(seed, temperature, k):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 30)) * 50)
    p = probabilities(logits, Settings(temperature=temperature, top_k=k, top_p=0.9))
    torch.testing.assert_close(p.sum(1), torch.ones(4).double())
    assert (p >= 0).all()
