"""The loss that starts from states, beside the one that starts from logits."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from armchair.prior import sequence
from armchair.prior.sequence import Head, StreamLoss, stream_loss, stream_loss_of_states
from armchair.prior.transformer import Prior


def rows_at_once(count: int) -> Any:
    return mock.patch.dict(sequence.HEAD_ROWS, cpu=count)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float, least: float = 1e-9) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= share * max(float(expected.abs().max()), least)


def check_against_logits(
    pictures: int, grid: int, vocab: int, rows: int, weight: float, smoothing: float, dtype: torch.dtype, seed: int
) -> None:
    stream, g = tiny.shape(grid, 5, vocab, 2 * vocab), tiny.seeded(seed)
    text, codes = tiny.texts(pictures, stream, seed), tiny.codes(pictures, stream, seed)
    start = [torch.randn(pictures, stream.length, 8, generator=g)]
    for classes in (vocab + 1, stream.codebook_size):
        start += [torch.randn(classes, 8, generator=g), torch.randn(classes, generator=g)]
    ours, plain = [[x.clone().requires_grad_() for x in start] for _ in range(2)]
    with autocast(dtype):
        heads = Head(*ours[1:3]), Head(*ours[3:])
        with rows_at_once(rows):
            found = stream_loss_of_states(ours[0], heads, text, codes, weight, smoothing)
        logits = F.linear(plain[0][:, :5], *plain[1:3]), F.linear(plain[0][:, 5:], *plain[3:])
        expected = stream_loss(*logits, text, codes, weight, smoothing)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol={torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype], atol=1e-5)
    (3 * found.loss).backward()
    (3 * expected.loss).backward()
    share, least = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (3e-2, 1e-9)}[dtype]
    for a, b in zip(ours, plain, strict=True):
        assert_near(a.grad, b.grad, share, least)


@settings(max_examples=40)
@given(
    pictures=st.integers(1, 3),
    grid=st.integers(1, 5),
    vocab=st.sampled_from([1, 30, 900]),
    rows=st.sampled_from([1, 7, 1024]),
    weight=st.floats(0, 1),
    smoothing=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_loss_of_states_is_that_of_their_logits(pictures, grid, vocab, rows, weight, smoothing, seed):
    check_against_logits(pictures, grid, vocab, rows, weight, smoothing, torch.float32, seed)


@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_products_in_16_bits_gradients_are_within_3_percent_of_the_largest(rows, smoothing):
    """The other loss adds up those of biases and weights in 16 bits."""
    check_against_logits(3, 5, 300, rows, 0.25, smoothing, torch.bfloat16, 0)


def of_states(model: Prior, text: torch.Tensor, codes: torch.Tensor) -> StreamLoss:
    return stream_loss_of_states(model.states(text, codes), model.heads(), text, codes, 0.25, 0.1)


def of_logits(model: Prior, text: torch.Tensor, codes: torch.Tensor) -> StreamLoss:
    return stream_loss(*model(text, codes), text, codes, 0.25, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"features": 7}, {"tied": True}], ids=["paper", "features", "tied"])
def test_every_weight_gets_the_gradient_that_logits_give_it(options, dtype):
    stream = tiny.shape()
    model = tiny.prior(stream, "full", "row", **options)
    text, codes = tiny.texts(3, stream), tiny.codes(3, stream)
    gradients = []
    for loss in (of_states, of_logits):
        model.zero_grad()
        with autocast(dtype), rows_at_once(7):
            loss(model, text, codes).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    most = max(float(b.abs().max()) for b in gradients[1])
    for a, b in zip(*gradients, strict=True):
        # What moves all logits alike has none, and shows rounding alone.
        assert_near(a, b, {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype], least=most / 20)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_a_batch_are_never_there_at_once(dtype):
    """Nor are their gradients: nothing is larger than the logits of one chunk, forward and backward."""
    stream = tiny.shape(grid=6, text_length=3, codebook=500)
    model = tiny.prior(stream, "full")
    text, codes = tiny.texts(8, stream), tiny.codes(8, stream)
    start = model.states(text, codes).detach()
    largest = []
    for whole in (False, True):
        states = start.clone().requires_grad_()
        with autocast(dtype), rows_at_once(32), Largest() as seen:
            if whole:
                logits = model.text_head(states[:, :3]), model.image_head(states[:, 3:])
                stream_loss(*logits, text, codes).loss.backward()
            else:
                stream_loss_of_states(states, model.heads(), text, codes).loss.backward()
        assert states.grad is not None and states.grad.any()
        largest.append(seen.elements)
    assert largest == [32 * 500, 8 * 36 * 500]


def test_a_loss_that_is_only_looked_at_computes_no_gradients():
    stream = tiny.shape()
    model = tiny.prior(stream, "full")
    text, codes = tiny.texts(2, stream), tiny.codes(2, stream)
    with torch.inference_mode(), mock.patch("torch.mm", side_effect=AssertionError("a gradient")):
        found = of_states(model, text, codes)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found, of_logits(model, text, codes), rtol=1e-5, atol=1e-5)


def test_a_loss_can_go_back_twice():
    stream = tiny.shape()
    model = tiny.prior(stream, "full")
    loss = of_states(model, tiny.texts(2, stream), tiny.codes(2, stream)).loss
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
