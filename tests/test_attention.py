from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair import attention
from armchair.attention import attend, attend_plainly
from armchair.prior.attention import PATTERNS, stream_mask


@settings(max_examples=30)
@given(
    pattern=st.sampled_from((*PATTERNS, None)),
    grid=st.integers(1, 6),
    heads=st.integers(1, 3),
    block=st.sampled_from([1, 5, 16, 96]),
    seed=st.integers(0, 99),
)
def test_attention_equals_the_library_kernel_and_the_literal_version(pattern, grid, heads, block, seed):
    """None: every position sees every other, as in a picture that is looked at."""
    mask = torch.ones(3 + grid**2, 3 + grid**2).bool() if pattern is None else stream_mask(pattern, 3, grid)
    g = tiny.seeded(seed)
    ours, theirs = [], []
    for _ in range(3):
        x = torch.randn(2, heads, len(mask), 8, generator=g)
        ours.append(x.clone().requires_grad_())
        theirs.append(x.requires_grad_())
    with mock.patch.object(attention, "ATTENTION_BLOCK", block):
        out, plain = attend(*ours, mask, pattern is not None), F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend_plainly(*(x.detach() for x in ours), mask), plain.detach(), rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=g)
    with mock.patch.object(attention, "ATTENTION_BLOCK", block):
        (out * weight).sum().backward()
    (plain * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(length=st.integers(1, 12), seen=st.integers(1, 12), block=st.sampled_from([1, 5, 96]), seed=st.integers(0, 99))
def test_attention_to_another_sequence_equals_the_library_kernel(length, seen, block, seed):
    g = tiny.seeded(seed)
    mask = torch.rand(length, seen, generator=g) < 0.7
    mask[:, 0] = True
    ours, theirs = [], []
    for size in (length, seen, seen):
        x = torch.randn(2, 3, size, 8, generator=g)
        ours.append(x.clone().requires_grad_())
        theirs.append(x.requires_grad_())
    weight = torch.randn(2, 3, length, 8, generator=g)
    with mock.patch.object(attention, "ATTENTION_BLOCK", block):
        out, plain = attend(*ours, mask, causal=False), F.scaled_dot_product_attention(*theirs, attn_mask=mask)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
        (out * weight).sum().backward()
    (plain * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(520, 520), (4, 520)])
def test_attention_is_the_same_past_the_length_where_the_kernel_takes_over(sizes):
    g = tiny.seeded()
    q, k, v = (torch.randn(1, 1, size, 8, generator=g) for size in (*sizes, sizes[1]))
    causal = sizes[0] == sizes[1]
    mask = torch.ones(sizes).tril().bool() if causal else (torch.arange(520) < 500).expand(sizes)
    near = [x[:, :, :500] for x in (q, k, v)]
    torch.testing.assert_close(attend(q, k, v, mask, causal)[:, :, :500], attend(*near, mask[:500, :500], causal))
