import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from armchair.clip.contrast import contrastive_loss, retrieval_ranks, same_captions, sigmoid_loss
from armchair.clip.negatives import NearMisses
from armchair.errors import RequestError

COLOURS, SIDES = ("red", "light blue", "blue", "green"), ("left of", "right of")


def unit(*size: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*size, generator=tiny.seeded(seed)), dim=-1)


def literal_contrastive(images: Tensor, texts: Tensor, scale: float, same: Tensor, wrong: Tensor | None) -> float:
    """A picture and a caption at a time."""
    n, total = len(images), 0.0
    for i in range(n):
        right = [j for j in range(n) if same[i, j]]
        rivals = [scale * float(images[i] @ t) for t in texts]
        if wrong is not None:
            rivals += [scale * float(images[i] @ w) for row in wrong for w in row]
        total -= sum(scale * float(images[i] @ texts[j]) for j in right) / len(right)
        total += math.log(sum(map(math.exp, rivals)))
        total -= sum(scale * float(images[j] @ texts[i]) for j in right) / len(right)
        total += math.log(sum(math.exp(scale * float(image @ texts[i])) for image in images))
    return total / n / 2


@settings(max_examples=30)
@given(n=st.integers(2, 5), m=st.integers(0, 2), seed=st.integers(0, 99), words=st.integers(1, 4))
def test_the_losses_are_their_formulas(n, m, seed, words):
    images, texts = unit(n, 7, seed=seed), unit(n, 7, seed=seed + 1000)
    wrong = unit(n, m, 7, seed=seed + 2000) if m else None
    captions = [f"a {k}" for k in torch.randint(words, (n,), generator=tiny.seeded(seed)).tolist()]
    same = same_captions(captions)
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    found = contrastive_loss(images, texts, scale, same, wrong)
    assert float(found) == pytest.approx(literal_contrastive(images, texts, 5.0, same, wrong), rel=1e-4)

    total = 0.0
    for i in range(n):
        for j in range(n):
            z = 1 if captions[i] == captions[j] else -1
            total += math.log1p(math.exp(-z * (5 * float(images[i] @ texts[j]) - 2)))
        for w in [] if wrong is None else wrong[i]:
            total += math.log1p(math.exp(5 * float(images[i] @ w) - 2))
    assert float(sigmoid_loss(images, texts, scale, bias, same, wrong)) == pytest.approx(total / n, rel=1e-4)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_what_the_losses_ask_for_is_that_pairs_find_each_other(sigmoid):
    images, texts = (torch.randn(8, 5, generator=tiny.seeded(i), requires_grad=True) for i in (0, 1))
    scale, bias = torch.tensor(14.0), torch.tensor(-2.0)
    same = same_captions([f"a {max(i, 1)}" for i in range(8)])  # the first two say the same
    optimizer = torch.optim.Adam([images, texts], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        a, b = F.normalize(images, dim=1), F.normalize(texts, dim=1)
        wrong = b.roll(1, 0)[:, None].detach()
        loss = sigmoid_loss(a, b, scale, bias, same, wrong) if sigmoid else contrastive_loss(a, b, scale, same, wrong)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    assert (found.argmax(1) == torch.arange(8))[2:].all() and (found.argmax(0) == torch.arange(8))[2:].all()
    assert set(found.argmax(1)[:2].tolist()) <= {0, 1}


def test_captions_are_the_same_whatever_their_case_and_spaces():
    assert same_captions(["A red  apple", "a red apple ", "a pear"]).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]


@settings(max_examples=30)
@given(n=st.integers(2, 12), distractors=st.integers(1, 5), seed=st.integers(0, 99))
def test_ranks_are_places_in_a_sorted_list(n, distractors, seed):
    images, texts = unit(n, 4, seed=seed), unit(n, 4, seed=seed + 1000)
    captions = [f"a {i // 2}" for i in range(n)]
    found = retrieval_ranks(images, texts, same_captions(captions), distractors)
    for i in range(n):
        others = [j % n for j in range(i + 1, i + n) if captions[j % n] != captions[i]][:distractors]
        ordered = sorted([i, *others], key=lambda j: -float(images[i] @ texts[j]))
        assert int(found[i]) == ordered.index(i)


def test_a_ranker_that_says_the_same_of_everything_ranks_last():
    same = torch.ones(4, 3) / 3**0.5
    assert retrieval_ranks(same, same, torch.eye(4).bool()).tolist() == [3, 3, 3, 3]


phrases = st.lists(st.sampled_from([*COLOURS, *SIDES, "ball", "redder", "of"]), max_size=6)


@settings(max_examples=200)
@given(words=phrases, seed=st.integers(0, 99))
def test_a_near_miss_differs_in_one_kind_and_keeps_all_other_words(words, seed):
    caption = " ".join(words)
    miss = NearMisses([COLOURS, SIDES]).of(caption, np.random.default_rng(seed))
    if miss is None:
        assert not {*COLOURS, *SIDES} & set(words)
        return
    assert miss != caption
    plain = miss
    original = caption
    for word in ("light blue", *COLOURS):
        plain, original = plain.replace(word, "C"), original.replace(word, "C")
    for word in SIDES:
        plain, original = plain.replace(word, "S"), original.replace(word, "S")
    assert plain.replace("Cder", "redder") == original.replace("Cder", "redder")


def test_near_misses_swap_and_exchange():
    makes = NearMisses([COLOURS, SIDES])
    rng = np.random.default_rng(0)
    found = {makes.of("A Red ball left of a light blue ball", rng) for _ in range(200)}
    assert "a light blue ball left of a red ball" in found
    assert "a red ball right of a light blue ball" in found
    assert "a green ball left of a light blue ball" in found
    assert len(found) == 1 + 1 + 4
    turned = [makes.of("a red ball left of a light blue ball", rng) for _ in range(300)]
    assert 100 < turned.count("a red ball right of a light blue ball") < 200  # as often as all of the colours
    swapped = NearMisses([["orange", "red"]]).of("an orange ball on a red orb", rng)
    assert swapped == "a red ball on an orange orb"
    assert makes.of("a redder ball", rng) is None
    assert makes.of("", rng) is None


def test_near_misses_keep_to_words_that_captions_put_together():
    forms = ["ball", "cube", "cone"]
    captions = [
        "a red ball left of a blue cube",
        "a green ball left of a blue cube",
        "a red cube left of a blue cube",
        "a blue cube left of a red cube",
        "a blue cube left of a red ball",
        "a blue cube right of a red ball",
    ]  # no blue ball, no green cube, no cone, and left of blue cubes nothing but these
    makes = NearMisses([COLOURS, SIDES, forms], captions)
    rng = np.random.default_rng(0)
    for caption, false in ((0, {1}), (2, {0, 3}), (4, {5})):
        found = {makes.of(captions[caption], rng) for _ in range(200)}
        assert found == {captions[i] for i in false}
    assert makes.links("a red ball left of a blue cube") == {
        ("red",), ("ball",), ("left of",), ("blue",), ("cube",),
        ("red", "left of"), ("red", "ball"), ("ball", "left of"), ("ball", "blue"),
        ("left of", "blue"), ("left of", "cube"), ("blue", "cube"),
    }  # fmt: skip
    assert NearMisses([COLOURS], ["red", "blue"]).of("a red ball", rng) == "a blue ball"
    assert NearMisses([COLOURS, forms], ["a red ball", "blue cone"]).of("a red ball", rng) is None


@pytest.mark.parametrize("kinds", [[["red"]], [["red", "red"]], [["red", "blue"], ["blue", "green"]], [["red", " "]]])
def test_kinds_of_words_that_cannot_be_told_apart_are_refused(kinds):
    with pytest.raises(RequestError, match="near_misses"):
        NearMisses(kinds)
