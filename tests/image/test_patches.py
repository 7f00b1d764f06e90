"""Work on patches: crops where there is something to see, recurring points, and codes of distinct patches."""

import pytest
import torch

import tiny
from armchair.image.autoencoder import distinct, kmeans, varied_crops


def drawing(count: int = 6, side: int = 32) -> torch.Tensor:
    """Plain pictures, each with one pixel of another colour, (B, 3, R, R)."""
    images = torch.full((count, 3, side, side), 0.25)
    spots = torch.randint(side, (2, count), generator=tiny.seeded(7))
    images[torch.arange(count), :, spots[0], spots[1]] = 1.0
    return images


def test_a_crop_holds_what_there_is_to_see_and_lies_on_the_grid():
    images = drawing(200)
    crops = varied_crops(images, 8, 4, tiny.seeded())
    assert crops.shape == (200, 3, 8, 8)
    assert (crops.amax((1, 2, 3)) == 1).all()
    for image, crop in zip(images, crops, strict=True):
        (y,), (x,) = torch.nonzero(image[0] == 1).T
        (v,), (u,) = torch.nonzero(crop[0] == 1).T
        assert (y - v) % 4 == 0 and (x - u) % 4 == 0


def test_crops_of_plain_pictures_come_from_everywhere():
    ramp = torch.arange(8.0).repeat_interleave(4).expand(400, 3, 32, 32)  # each column of cells plain, all different
    left = (varied_crops(ramp, 8, 4, tiny.seeded())[:, 0, 0, 0]).unique()
    assert left.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_crop_of_the_whole_side_is_the_picture():
    images = tiny.pictures(4, 16)
    assert torch.equal(varied_crops(images, 16, 4, tiny.seeded()), images)


def test_distinct_points_and_how_often():
    points = torch.tensor([[1.0, 2.0], [3.0, -4.0], [1.0, 2.00000001], [1.0, 2.0]])
    found, counts = distinct(points)
    assert sorted(zip(found.tolist(), counts.tolist(), strict=True)) == [([1.0, 2.0], 3.0), ([3.0, -4.0], 1.0)]


def test_a_weight_counts_as_that_many_points():
    g = tiny.seeded()
    points = torch.randn(40, 2, generator=g)
    counts = torch.randint(1, 6, (40,), generator=g)
    repeated = points.repeat_interleave(counts, 0)
    centres, error = kmeans(points, 1, tiny.seeded(), counts.float())
    assert torch.allclose(centres[0], repeated.mean(0), atol=1e-5)
    assert error == pytest.approx((repeated - repeated.mean(0)).square().sum(1).mean().item(), rel=1e-4)


def test_a_code_of_a_distinct_patch_is_the_code_of_each_of_its_places():
    model = tiny.dvae(stem_kernel=1, encoder_kernel=1, n_groups=1, patch=4)
    images = torch.cat([drawing(side=16), tiny.pictures(4, 16)])
    with torch.no_grad():
        logits = model.logits(images)
        codes = model.encode(images)
    best = logits.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4  # a tie may fall either way
    assert clear.float().mean() > 0.99
    assert torch.equal(codes[clear], logits.argmax(-1)[clear])


def test_neighbours_matter_where_the_encoder_sees_them():
    model = tiny.dvae(stem_kernel=3, encoder_kernel=1, n_groups=1, patch=4)
    images = tiny.pictures(4, 16)
    with torch.no_grad():
        assert torch.equal(model.encode(images), model.logits(images).argmax(-1))
    assert not model.config.own_patch
