import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.errors import RequestError
from armchair.prior.attention import (
    PATTERNS,
    ImageKeys,
    rotary_angles,
    sees,
    stream_mask,
    turn,
)

grids = st.integers(1, 16)
patterns = st.sampled_from(PATTERNS)


def seen(pattern: str, j: int, grid: int) -> set[int]:
    """The image tokens that image token j sees, itself among them, as the paper describes each pattern."""
    if pattern == "row":  # the last S tokens in raster order, back to the one right above
        return {k for k in range(j - grid, j + 1) if k >= 0}
    if pattern == "column":
        return {row * grid + j % grid for row in range(j // grid + 1)}
    if pattern == "convolutional":  # 11 x 11 around j, wrapping at the sides into the rows above and below
        window = {j + dy * grid + dx for dy in range(-5, 6) for dx in range(-5, 6)}
        return {k for k in window if 0 <= k <= j}
    return set(range(j + 1))


@settings(max_examples=60)
@given(pattern=patterns, grid=grids, text_length=st.sampled_from([1, 2, 7]))
def test_masks_are_the_papers(pattern, grid, text_length):
    mask = stream_mask(pattern, text_length, grid)
    length = text_length + grid**2
    assert mask.shape == (length, length) and mask.dtype == torch.bool
    first = text_length + 1  # after BOS and the text
    for query in range(length):
        expected = set(range(min(query + 1, first)))
        if query >= first:
            expected |= {first + k for k in seen(pattern, query - first, grid)}
        assert set(mask[query].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [1, 2, 5, 11, 13])
def test_sees_is_the_papers_rule(pattern, grid):
    j = torch.arange(grid**2)
    got = sees(pattern, j[:, None], j[None, :], grid)
    for query in range(grid**2):
        assert set(got[query].nonzero()[:, 0].tolist()) == seen(pattern, query, grid)


def test_a_row_of_the_released_grid_sees_the_32_tokens_before_it():
    mask = stream_mask("row", 256, 32)
    assert int(mask[257 + 500, 257:].sum()) == 33
    assert bool(mask[257 + 500, 257 + 468]) and not bool(mask[257 + 500, 257 + 467])


@settings(max_examples=80)
@given(pattern=patterns, grid=grids)
def test_the_cache_shows_each_token_just_what_it_may_see(pattern, grid):
    store = ImageKeys(pattern, grid)
    n = grid**2
    assert store.size == {"row": min(n, grid + 1), "convolutional": min(n, 5 * grid + 6)}.get(pattern, n)
    held: list[int | None] = [None] * store.size
    for j in range(n):
        held[store.slot(j)] = j
        visible = store.visible(j)
        slots = list(range(store.size))[visible] if isinstance(visible, slice) else visible.tolist()
        tokens = [held[s] for s in slots]
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) == seen(pattern, j, grid)


def test_a_turned_product_depends_on_how_far_apart_two_places_are():
    grid, g = 5, tiny.seeded()
    angles = rotary_angles(grid, 16)
    q, k = torch.randn(16, generator=g), torch.randn(16, generator=g)
    products = turn(q.expand(25, 16), angles) @ turn(k.expand(25, 16), angles).T
    by_offset: dict[tuple[int, int], list[float]] = {}
    for a in range(25):
        for b in range(25):
            (ra, ca), (rb, cb) = divmod(a, grid), divmod(b, grid)
            by_offset.setdefault((ra - rb, ca - cb), []).append(float(products[a, b]))
    assert all(max(x) - min(x) < 1e-4 for x in by_offset.values())
    means = sorted(x[0] for x in by_offset.values())
    assert len(means) == 81 and min(b - a for a, b in zip(means, means[1:], strict=False)) > 0  # each its own


def test_a_share_of_the_pairs_turns_as_a_smaller_head_would_and_the_rest_stays():
    angles = rotary_angles(5, 16, 0.5)
    assert angles.shape == (25, 8) and torch.equal(angles[:, :4], rotary_angles(5, 8)) and not angles[:, 4:].any()
    assert rotary_angles(5, 16, 0.01)[:, :2].any()  # never none


def test_turning_is_a_product_with_a_complex_number_and_so_is_its_gradient():
    g = tiny.seeded()
    x, angles, weight = (torch.randn(*shape, generator=g) for shape in ((2, 3, 7, 8), (7, 4), (2, 3, 7, 8)))
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    turned = turn(ours, angles)
    z = torch.complex(*plain.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([z.real, z.imag], -1)
    torch.testing.assert_close(turned, expected)
    (turned * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize(
    ("wrong", "right"), [("rows", "row"), ("colum", "column"), ("convolution", "convolutional")]
)
def test_an_unknown_pattern_names_the_nearest(wrong, right):
    for use in (lambda: stream_mask(wrong, 4, 2), lambda: ImageKeys(wrong, 2)):
        with pytest.raises(RequestError, match=f"{wrong}.*{right}"):
            use()
