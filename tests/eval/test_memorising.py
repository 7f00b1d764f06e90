"""Copies are told from drawings of one's own, whatever the codes lose."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from armchair.eval.figures import Section
from armchair.eval.memorising import COPIES, NEAR, TRAINING, memorising, most_shared, nearest_pixels
from armchair.eval.pairs import Context, Pairs, read_pairs
from armchair.sample.pipeline import load_artist

GRID, SIDE, LEVELS = 4, 16, 4
PATCH = SIDE // GRID


class Mosaic:
    """An artist of 4 x 4 patches, each of one colour of 64, that draws what `pictures` has for a caption."""

    grid, resolution = GRID, SIDE

    def __init__(self, pictures: dict[str, np.ndarray]) -> None:
        self.pictures = pictures

    def encode(self, images: list[Image.Image]) -> np.ndarray:
        x = np.stack([np.asarray(image) for image in images]).reshape(-1, GRID, PATCH, GRID, PATCH, 3).mean((2, 4))
        return (x * LEVELS / 256).astype(int) @ np.array([1, LEVELS, LEVELS**2])

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        levels = np.stack([codes // LEVELS**i % LEVELS for i in range(3)], -1)
        pixels = ((levels + 0.5) * 256 / LEVELS).astype(np.uint8).repeat(PATCH, 1).repeat(PATCH, 2)
        return [Image.fromarray(p) for p in pixels]

    def draw_each(self, captions: list[str], *, seed: int, first: int) -> list[Image.Image]:
        """Through the codes, as any model draws."""
        return self.decode(self.encode([Image.fromarray(self.pictures[caption]) for caption in captions]))


def pictures(count: int, seed: int) -> list[np.ndarray]:
    """Random mosaics with grain, which the codes lose."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 256, (count, GRID, GRID, 3)).repeat(PATCH, 1).repeat(PATCH, 2)
    return list((whole + rng.normal(0, 12, whole.shape)).clip(0, 255).astype(np.uint8))


def section(drawn: list[np.ndarray]) -> Section:
    """Of a model that draws these of the captions of forty training pictures."""
    learned, unseen = pictures(40, 0), pictures(20, 1)
    train = Pairs(images=learned, captions=[f"t{i}" for i in range(40)], fingerprint="", places=["train"] * 40)
    places = ["val.tar"] * 12 + ["pairs.tar"] * 8
    held_out = Pairs(images=unseen, captions=[f"h{i}" for i in range(20)], fingerprint="", places=places)
    known = dict(zip(train.captions, drawn, strict=True)) | dict(zip(held_out.captions, pictures(20, 2), strict=True))
    artist: Any = Mosaic(known)
    return memorising(
        Context(
            artist=artist,
            held_out=held_out,
            train=train,
            networks=[],
            data=("val.tar", "pairs.tar"),
            seed=0,
            options={"memorising": 40},
            say=lambda text: None,
        )
    )


def near(of: Section) -> dict[str, list[float]]:
    """Row -> shares by pixels, by codes and by either."""
    (table,) = (t for t in of.tables if t.title == NEAR)
    return {str(row[0]): [cell.value for cell in row[2:]] for row in table.rows}  # type: ignore[union-attr]


def test_a_model_that_copies_is_found_and_one_that_does_not_is_not():
    copied, own = near(section(pictures(40, 0))), near(section(pictures(40, 3)))
    assert min(copied[TRAINING]) >= 0.9 and max(own[TRAINING]) == 0
    for found in (copied, own):
        assert min(found[COPIES]) >= 0.9
        assert found["held-out (val.tar) pictures"] == found["held-out (val.tar) pictures, round trip"] == [0, 0, 0]


def test_held_out_sources_are_told_apart_and_the_bounds_are_said():
    found = section(pictures(40, 3))
    counts = {str(row[0]): row[1] for row in found.tables[1].rows}
    assert counts["drawings of held-out (val.tar) captions"] == 12
    assert counts["drawings of held-out (pairs.tar) captions"] == counts["held-out (pairs.tar) pictures"] == 8
    assert "95% of the round trips of 40 training pictures" in found.protocol
    assert "an RMSE of at most 0." in found.protocol
    assert [p.name for p in found.pictures] == ["memorising-pixels", "memorising-codes"]


def test_a_picture_is_its_own_nearest_at_no_distance():
    known = torch.rand(50, 300, generator=torch.Generator().manual_seed(0))
    rmse, index = nearest_pixels(known[[7, 31]], known)
    assert rmse.tolist() == [0, 0] and index.tolist() == [7, 31]
    (rmse,), (index,) = nearest_pixels(known[3:4] + 0.1, known)
    assert rmse == pytest.approx(0.1, rel=1e-4) and index == 3
    shares, whose = most_shared(np.array([[1, 2, 3, 9], [5, 5, 5, 5]]), np.array([[1, 0, 0, 0], [1, 2, 3, 4]]))
    assert shares.tolist() == [0.75, 0] and whose[0] == 1


def test_pictures_know_which_path_they_came_by(tiny_bundle, pictures):
    pairs = read_pairs([str(pictures), "shapes:val,length=5"], load_artist(tiny_bundle, "cpu"), 20)
    assert sorted(set(pairs.places)) == ["pictures", "shapes:val,length=5"]
    assert pairs.places.count("pictures") == 12 and len(pairs.places) == len(pairs.captions) == 17
