"""Finite scalar quantisation: numbers, digits, codes and back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.image.fsq import FSQConfig, bounded, codes_from_digits, digits_from_codes, scaled

LEVELS = st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple)


@given(levels=LEVELS)
def test_every_code_has_its_own_digits_and_comes_back_from_them(levels):
    codes = torch.arange(math.prod(levels))
    digits = digits_from_codes(codes, levels)
    assert len(digits.unique(dim=0)) == len(codes)
    assert digits.min() >= 0 and (digits.amax(0) == torch.tensor(levels) - 1).all()
    assert torch.equal(codes_from_digits(digits, levels), codes)


@given(levels=LEVELS, seed=st.integers(0, 99), spread=st.floats(0, 50))
def test_whatever_the_encoder_says_is_a_digit(levels, seed, spread):
    numbers = spread * torch.randn(40, len(levels), generator=tiny.seeded(seed))
    digits = bounded(numbers, levels).round()
    assert (digits >= 0).all() and (digits <= torch.tensor(levels) - 1).all()


@given(levels=LEVELS)
def test_nothing_said_is_the_middle_digit_and_stands_for_nothing(levels):
    digits = bounded(torch.zeros(len(levels)), levels)
    torch.testing.assert_close(scaled(digits, levels), torch.zeros(len(levels)), atol=1e-5, rtol=0)
    ends = scaled(torch.stack([torch.zeros(len(levels)), torch.tensor(levels) - 1.0]), levels)
    assert (ends[0] == -1).all() and (ends[1] <= 1).all() and (ends[1] >= 0.5).all()


@given(levels=LEVELS, seed=st.integers(0, 99))
def test_codes_are_those_of_a_reference(levels, seed):
    package = pytest.importorskip("vector_quantize_pytorch", reason="the reference is another package")
    numbers = 2 * torch.randn(1, 30, len(levels), generator=tiny.seeded(seed))
    digits = bounded(numbers, levels).round()
    values, codes = package.FSQ(list(levels))(numbers)
    torch.testing.assert_close(scaled(digits, levels), values, atol=1e-6, rtol=0)
    assert torch.equal(codes_from_digits(digits.long(), levels), codes.long())


def test_training_and_use_have_the_same_codes_once_their_statistics_are_known():
    model, images = tiny.fsq(), tiny.pictures(32, 16)
    model.start(images, tiny.seeded())
    codes = model.encode(images)
    with torch.no_grad():
        done = model.training_pass(images, tiny.seeded(), {})
        assert float(done.loss) == pytest.approx(float(model.hard_loss(images, codes)), abs=1e-4)
    digits = digits_from_codes(codes.unique(), (8, 4))
    assert len(digits) > 16 and (digits.amax(0) - digits.amin(0) >= 3).all()


def test_in_use_numbers_are_whitened_by_what_training_saw():
    model, images = tiny.fsq(), tiny.pictures(32, 16)
    for _ in range(300):
        with torch.no_grad():
            done = model.training_pass(images, tiny.seeded(), {})
        model.after_update(done.seen, tiny.seeded())
    with torch.no_grad():
        numbers = model.down(model.features(images)).flatten(0, 2)
    torch.testing.assert_close(numbers.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(numbers.std(0), torch.ones(2), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("levels", "message"),
    [((), r"levels: expected one number or more, each at least 3, got \[\]"), ((8, 2), r"got \[8, 2\]")],
)
def test_levels_that_do_not_fit_are_refused(levels, message):
    with pytest.raises(RequestError, match=message):
        FSQConfig(levels=levels)
