"""Pictures of which a part of the codes is looked at, beside whole ones."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.prior.sequence import stream_loss_of_states
from armchair.prior.thinning import busy_places, thinned
from armchair.train.recipe import PriorTraining

sides = st.integers(1, 6)


def drawn(grid: int, colours: int, seed: int, pictures: int = 3) -> torch.Tensor:
    """(B, N) codes, plain where there are few colours."""
    return torch.randint(colours, (pictures, grid**2), generator=tiny.seeded(seed))


@settings(max_examples=40)
@given(grid=sides, colours=st.integers(1, 3), seed=st.integers(0, 99))
def test_something_busy_places_where_a_code_is_another_than_one_before_it_nearby(grid, colours, seed):
    codes = drawn(grid, colours, seed)
    found = busy_places(codes, grid)
    for picture, busy in zip(codes.tolist(), found.tolist(), strict=True):
        for j, code in enumerate(picture):
            row, column = divmod(j, grid)
            around = [(row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
            near = [picture[r * grid + c] for r, c in around if r >= 0 and 0 <= c < grid]
            assert busy[j] == any(other != code for other in near)


@settings(max_examples=60)
@given(grid=sides, colours=st.integers(1, 3), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_part_is_in_order_has_no_place_twice_and_counts_for_the_whole(grid, colours, share, seed):
    n = grid**2
    codes, count = drawn(grid, colours, seed), min(n, 3 + round(share * (n - 3)))
    places, weights = thinned(codes, grid, count, tiny.seeded(seed))
    assert places.shape == weights.shape == (3, count)
    assert (places[:, 0] == 0).all() and (places.diff() > 0).all() and (places < n).all()
    busy = busy_places(codes, grid)
    busy[:, 0] = False
    taken = busy.gather(1, places)
    for kind, mine in ((busy, taken), (~busy, ~taken)):
        mine[:, 0] = kind[:, 0] = False  # which counts once
        torch.testing.assert_close((weights * mine).sum(1), kind.sum(1).float())
    fits = busy.sum(1) <= (count - 1) - -(-(count - 1) // 8)
    assert torch.equal(taken.sum(1)[fits], busy.sum(1)[fits])  # all of them, where there is room


def test_on_average_a_part_has_the_sum_of_the_whole():
    codes = drawn(5, 2, 3, 1)
    for count in (6, 20):  # fewer than there are busy places, and more
        pictures = codes.expand(20_000, -1)
        places, weights = thinned(pictures, 5, count, tiny.seeded())
        total = torch.zeros(25).index_add_(0, places.flatten(), weights.flatten()) / len(pictures)
        assert (total - 1).abs().max() < 0.06


@pytest.mark.parametrize("name", list(tiny.OPTIONS))
def test_the_states_of_a_part_are_those_of_the_whole_with_the_rest_hidden(name):
    stream = tiny.shape(grid=4, text_length=5)
    model = tiny.prior(stream, "full", "full", **tiny.OPTIONS[name])
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    places = thinned(codes, 4, 7, tiny.seeded(1)).places
    with torch.no_grad():
        found = model.states(text, codes, places=places)
        for picture in range(2):
            seen = torch.cat([torch.arange(5), 5 + places[picture]])
            hidden = torch.ones(stream.length, dtype=torch.bool).index_fill(0, seen, False)
            mask = model.mask_full & ~hidden | torch.eye(stream.length, dtype=torch.bool)  # a hidden one sees itself
            with mock.patch.object(model, "mask_full", mask):
                whole = model.states(text[picture, None], codes[picture, None])
            torch.testing.assert_close(found[picture], whole[0, seen], rtol=1e-4, atol=1e-4)
        everything = torch.arange(16).expand(2, 16)
        torch.testing.assert_close(model.states(text, codes, places=everything), model.states(text, codes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_image_tokens_count_as_their_weights_say(smoothing):
    stream = tiny.shape()
    model = tiny.prior(stream, "full")
    text, codes, weights = tiny.texts(2, stream), tiny.codes(2, stream), 2 * torch.rand(2, 16, generator=tiny.seeded())
    gradients, losses = [], []
    for ours in (True, False):
        states = model.states(text, codes).detach().requires_grad_()
        if ours:
            loss = stream_loss_of_states(states, model.heads(), text, codes, 0.0, smoothing, weights).loss
        else:
            logits = F.linear(states[:, 5:], *model.heads()[1]).transpose(1, 2)
            nats = F.cross_entropy(logits, codes, label_smoothing=smoothing, reduction="none")
            loss = (nats * weights).mean()
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append((states.grad, model.image_head.weight.grad.clone(), model.image_head.bias.grad.clone()))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_layers_that_see_little_are_refused():
    stream, first = tiny.shape(), torch.tensor([[0]])
    model = tiny.prior(stream, "full", "row")
    with pytest.raises(RequestError, match="all layers have full attention"):
        model.states(tiny.texts(1, stream), tiny.codes(1, stream), places=first)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinned": 1.0}, "thinned: expected 0 or more and less than 1, got 1.0"),
        ({"thinned_codes": 2}, "thinned_codes: expected at least 3, got 2"),
    ],
)
def test_a_share_or_a_number_that_leaves_nothing_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        PriorTraining(steps=1, batch_size=1, lr=1e-3, **fields)
