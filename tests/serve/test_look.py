"""Looking inside a picture."""

import numpy as np
import pytest
import torch

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS, stream_mask
from armchair.sample.pipeline import load_artist
from armchair.serve.look import look_inside

PROMPT = "two red"


@pytest.fixture(scope="module")
def artist(tiny_bundle):
    return load_artist(tiny_bundle, "cpu")


@pytest.fixture(scope="module")
def drawing(artist):
    return artist.draw(PROMPT, candidates=1, seed=3)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_is_shares_of_what_a_position_may_see(rotary):
    stream = tiny.shape()
    prior = tiny.prior(stream, *PATTERNS, rotary=rotary)
    seen: list[torch.Tensor] = []
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.no_grad():
        watched = prior(text, codes, watch=lambda layer, shares: seen.append(shares))
        plain = prior(text, codes)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))  # to watch changes nothing
    assert len(seen) == len(PATTERNS)
    for pattern, shares in zip(PATTERNS, seen, strict=True):
        mask = stream_mask(pattern, stream.text_length, stream.grid)
        assert shares.shape == (2, 2, stream.length, stream.length)
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))
        assert (shares[..., ~mask] == 0).all() and (shares[..., mask] > 0).all()
        assert (shares.triu(1) == 0).all()


def test_attention_to_words_sums_to_one_and_first_codes_see_no_codes(artist, drawing):
    look = look_inside(artist, drawing.codes[0], PROMPT)
    assert look.words == PROMPT.split()
    assert look.attention.shape == (4, 16, len(look.words) + 2)
    np.testing.assert_allclose(look.attention.sum(-1), 1, atol=1e-5)
    assert (look.attention > -1e-6).all()
    np.testing.assert_allclose(look.attention[:, 0, -1], 0, atol=1e-6)
    assert (look.attention[:, 1:, -1] > 0).all()


def test_attention_is_what_the_mean_over_heads_gives_to_the_tokens_of_each_word(artist, drawing):
    look = look_inside(artist, drawing.codes[0], PROMPT)
    tokens = torch.from_numpy(artist.text_tokenizer.encode([PROMPT], artist.shape.text_length))
    layers: list[torch.Tensor] = []
    with torch.no_grad():
        artist.prior(tokens, torch.from_numpy(drawing.codes).flatten(1), watch=lambda i, shares: layers.append(shares))
    (first, places), *_ = artist.text_tokenizer.words(PROMPT, artist.shape.text_length)
    assert first == "two" and places[0] == 0
    wanted = layers[1][0].mean(0)[artist.shape.text_length + 5, [1 + place for place in places]].sum()
    assert look.attention[1, 5, 0] == pytest.approx(float(wanted), abs=1e-6)


def test_bits_are_the_likelihood_code_by_code(artist, drawing):
    look = look_inside(artist, drawing.codes[0], PROMPT)
    tokens = torch.from_numpy(artist.text_tokenizer.encode([PROMPT], artist.shape.text_length))
    codes = drawing.codes[0].flatten()
    for j in (0, 6, 15):
        known = np.where(np.arange(16) < j, codes, 0)  # what comes later is not looked at
        with torch.no_grad():
            logits = artist.prior(tokens, torch.from_numpy(known)[None])[1][0, j].double()
        assert look.bits.flatten()[j] == pytest.approx(float(-logits.log_softmax(0)[codes[j]] / np.log(2)), abs=1e-4)


def test_words_beyond_the_model_s_length_are_left_out(artist, drawing):
    look = look_inside(artist, drawing.codes[0], "Red circle, " * 20)
    assert look.words[:3] == ["red", "circle", ","]
    np.testing.assert_allclose(look.attention.sum(-1), 1, atol=1e-5)


def test_each_cell_shows_its_code_alone(artist, drawing):
    look = look_inside(artist, drawing.codes[0], PROMPT)
    side = artist.resolution // artist.grid
    code = drawing.codes[0][3, 1]
    middle = artist.grid // 2 * side
    (whole,) = artist.decode(np.full((1, 4, 4), code))
    wanted = np.asarray(whole)[middle : middle + side, middle : middle + side]
    assert (np.asarray(look.alone)[3 * side :, side : 2 * side] == wanted).all()


def test_codes_of_another_model_are_refused(artist):
    for codes in (np.zeros((5, 5), int), np.full((4, 4), 32)):
        with pytest.raises(RequestError, match="expected 4 x 4 of 0 to 31"):
            look_inside(artist, codes, PROMPT)
