"""What a newcomer's first picture stands on: the bundles that ship with the package."""

import numpy as np
import pytest

from armchair.bundle import bundled_names, find_bundle
from armchair.sample.pipeline import load_artist

PROMPTS = ("a red apple", "grinning face, noto emoji", "dog face, twemoji", "house", "woman astronaut", "rainbow")


@pytest.fixture(scope="module", params=bundled_names())
def artist(request):
    return load_artist(request.param)


def distinct(codes: np.ndarray) -> list[int]:
    return [len(np.unique(c)) for c in codes]


def test_sampled_drawings_do_not_collapse_to_few_codes(artist):
    """The failure of small reproductions: drawings of one colour. Real pictures hold 43 distinct codes of 64."""
    counts = [n for prompt in PROMPTS for n in distinct(artist.draw(prompt, candidates=4, seed=1).codes)]
    assert np.median(counts) > 30 and min(counts) > 8


def test_greedy_drawings_do_not_collapse_to_few_codes(artist):
    counts = [n for prompt in PROMPTS for n in distinct(artist.draw(prompt, candidates=1, temperature=0.0).codes)]
    assert np.median(counts) > 30 and min(counts) > 8


def test_most_red_apples_are_red_on_a_light_ground(artist):
    check_red(artist, artist.draw("a red apple", candidates=8, seed=0).images)


def test_the_best_red_apple_of_four_is_red_on_a_light_ground(artist):
    check_red(artist, [artist.draw("a red apple", candidates=4, seed=seed).images[0] for seed in range(6)])


def check_red(artist, pictures):
    if artist.bundle.name != "emoji":
        pytest.skip("only the emoji bundle knows apples")
    images = [np.asarray(im, dtype=float) for im in pictures]
    red = [np.mean((im[..., 0] > 150) & (im[..., 1] < 110) & (im[..., 2] < 110)) for im in images]
    corners = [im[[0, 0, -1, -1], [0, -1, 0, -1]].mean() for im in images]
    assert np.median(red) > 0.15  # share of the picture that is red
    assert np.median(corners) > 220


def test_bundles_are_small(artist):
    size = sum(p.stat().st_size for p in find_bundle(artist.bundle.name).iterdir())
    assert size <= 40 * 2**20
