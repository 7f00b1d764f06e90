"""What a newcomer's first picture stands on: the bundles that ship with the package."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from armchair.bundle import bundled_names, find_bundle
from armchair.data.tar_shards import TarSource
from armchair.sample.pipeline import load_artist

TRAINING = Path(__file__).parent / "shipped/emoji-24.tar"  # the first of the training pictures; credits in KEY.json
MANY = 30  # codes


@pytest.fixture(scope="module", params=bundled_names())
def artist(request):
    return load_artist(request.param)


def distinct(codes: np.ndarray) -> list[int]:
    return [len(np.unique(c)) for c in codes]


@pytest.fixture(scope="module")
def training(artist):
    """Captions of training pictures that hold many distinct codes, and how many they hold."""
    if artist.bundle.name != "emoji":
        pytest.skip("only the emoji bundle has learned from these pictures")
    source = TarSource(TRAINING)
    samples = [source[i] for i in range(len(source))]
    held = distinct(artist.encode([Image.fromarray(sample.image) for sample in samples]))
    found = {sample.captions[0]: n for sample, n in zip(samples, held, strict=True) if n > MANY}
    assert len(found) > len(source) / 2
    return found


@pytest.mark.parametrize("settings", [{"candidates": 1, "temperature": 0.0}, {"candidates": 4, "seed": 1}])
def test_drawings_hold_many_codes_wherever_training_pictures_do(artist, training, settings):
    """The failure of small reproductions: drawings of one colour, greedy ones above all."""
    counts, shares = [], []
    for caption, held in training.items():
        found = distinct(artist.draw(caption, **settings).codes)
        counts += found
        shares += [n / held for n in found]
    assert np.mean(np.array(counts) > MANY) > 0.9, counts
    # Hardly one is left nearly empty; a plain building may hold fewer than the factory that was learned.
    assert np.mean(np.array(shares) > 1 / 3) > 0.95, sorted(shares)


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
