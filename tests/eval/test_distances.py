"""FID, KID and IS against torchmetrics on the same features and against closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

import tiny
from armchair.eval.distances import (
    _mmd,
    fid,
    fid_figure,
    fid_from_pairs,
    inception_figure,
    inception_score,
    kid,
    kid_figure,
)


def gaussian(count: int, mean: Tensor, scale: Tensor, seed: int) -> Tensor:
    """(count, F) whose sample mean and covariance are exactly `mean` and diag(scale^2)."""
    x = torch.randn(count, len(mean), generator=tiny.seeded(seed), dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (count - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T * scale + mean


class Project(nn.Module):
    """A network of pictures, as torchmetrics is usually given one."""

    num_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), (2, 2))[:, :2].flatten(1)


def test_fid_of_two_gaussians_is_the_closed_form():
    means = torch.tensor([0.0, 1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 1.0, 0.0, -0.5]).double()
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 1.0, 0.5, 1.0]).double()
    a, b = (gaussian(500, m, s, seed) for seed, (m, s) in enumerate(zip(means, scales, strict=True)))
    expected = float((means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum())
    assert fid(a, b) == pytest.approx(expected, abs=1e-6)
    assert fid_from_pairs(a, b) == pytest.approx(expected, abs=1e-6)
    assert fid(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")
def test_the_figures_are_torchmetrics_own_on_the_same_features():
    real, fake = tiny.pictures(60, 16, seed=1), 0.8 * tiny.pictures(50, 16, seed=2)
    network = Project()
    a, b = network(real), network(fake)
    whole = FrechetInceptionDistance(feature=network, normalize=True)
    whole.set_dtype(torch.float64)
    whole.update(real.double(), real=True)
    whole.update(fake.double(), real=False)
    assert fid(a, b) == pytest.approx(float(whole.compute()), abs=1e-3) and fid(a, b) > 0.01
    kernel = KernelInceptionDistance(feature=network, normalize=True, subset_size=25, subsets=100)
    kernel.update(real, real=True)
    kernel.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, spread = kernel.compute()
    assert kid(a, b) == pytest.approx((float(mean), float(spread)), abs=1e-6)
    classes = InceptionScore(feature=network, splits=10)
    classes.update(real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        score, _ = classes.compute()
    assert inception_score(a) == pytest.approx(float(score), abs=1e-6)


@pytest.mark.parametrize(("count", "features"), [(40, 12), (12, 40)])
def test_fid_from_pairs_is_fid_with_more_or_fewer_pictures_than_features(count, features):
    a = torch.randn(count, features, generator=tiny.seeded(1))
    b = 0.5 + 2 * torch.randn(count + 5, features, generator=tiny.seeded(2))
    assert fid_from_pairs(a, b) == pytest.approx(fid(a, b), rel=1e-4)


def test_kid_is_the_literal_sum_over_pairs():
    a = torch.randn(9, 4, generator=tiny.seeded(1)).double()
    b = 1 + torch.randn(7, 4, generator=tiny.seeded(2)).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    own = np.mean([kernel(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    other = np.mean([kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    cross = np.mean([kernel(x, y) for x in a for y in b])
    xx, yy, xy = ((x @ y.T / 4 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    once = torch.ones(9).double(), torch.ones(7).double()
    assert _mmd(xx, yy, xy, *once) == pytest.approx(own + other - 2 * cross, rel=1e-9)


def test_inception_score_is_the_number_of_classes_at_best_and_one_at_worst():
    sure = 50 * torch.eye(4).repeat(100, 1)
    assert inception_score(sure) == pytest.approx(4, rel=0.05)  # ten splits, not each with all classes alike
    assert inception_score(torch.zeros(50, 4)) == pytest.approx(1, abs=1e-6)


def test_a_resample_counts_a_picture_as_often_as_it_was_drawn():
    a, b = torch.randn(6, 3, generator=tiny.seeded(1)).double(), torch.randn(5, 3, generator=tiny.seeded(2)).double()
    i, j = torch.tensor([0, 0, 3, 5, 5, 5]), torch.tensor([1, 1, 2, 4, 0])
    xx, yy, xy = ((x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    ones = torch.ones(6).double(), torch.ones(5).double()
    expected = _mmd(xx[i][:, i], yy[j][:, j], xy[i][:, j], *ones)
    times = torch.bincount(i, minlength=6).double(), torch.bincount(j, minlength=5).double()
    assert _mmd(xx, yy, xy, *times) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("figure", [fid_figure, kid_figure])
def test_intervals_cover_what_another_sample_gives(figure):
    """Two worlds whose distance is known: the interval from few pictures is right most of the time."""

    def drawn(seed: int, count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 3, generator=tiny.seeded(seed))
        return x, 0.7 + torch.randn(count, 3, generator=tiny.seeded(seed + 1000))

    true = 3 * 0.49 if figure is fid_figure else kid(*drawn(5, 4000))[0]
    covered = 0
    for seed in range(20):
        f = figure(*drawn(10 + seed, 150))
        assert f.interval[0] < f.value < f.interval[1]
        covered += f.interval[0] <= true <= f.interval[1]
    assert covered >= 15


def test_the_interval_of_an_inception_score_is_around_it():
    logits = 3 * torch.randn(200, 6, generator=tiny.seeded(3))
    f = inception_figure(logits)
    assert f.interval[0] < f.value < f.interval[1] and f.interval[1] - f.interval[0] < 1


@pytest.mark.parametrize("count", [8, 24, 128])
def test_the_interval_of_an_inception_score_is_around_it_for_few_pictures_too(count):
    """Many classes and few pictures: resamples have fewer different ones, and their percentiles lie lower."""
    f = inception_figure(3 * torch.randn(count, 1000, generator=tiny.seeded(count)))
    assert 1 <= f.interval[0] <= f.value < f.interval[1]


def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    a = torch.randn(20, 4, generator=tiny.seeded(1))
    kid(a, a + 1)
    inception_score(a)
    assert torch.equal(torch.random.get_rng_state(), state)
