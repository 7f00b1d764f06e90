"""Vector quantisation: the codebook follows what the encoder says, and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tiny
from armchair.errors import RequestError
from armchair.image.vq import VQ, VQConfig


def points_of(model: VQ, images: torch.Tensor) -> torch.Tensor:
    """What the encoder says of images, (M, C)."""
    with torch.no_grad():
        return model._placed(model.down(model.features(images))).flatten(0, 2)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_code_is_the_nearest_point(normalise):
    model, images = tiny.vq(normalise=normalise), tiny.pictures(5, 16)
    distances = torch.cdist(points_of(model, images).double(), model.codebook.double())
    assert torch.equal(model.encode(images).flatten(), distances.argmin(1))


def test_codes_lie_on_the_sphere_where_they_are_normalised():
    model, images = tiny.vq(), tiny.pictures(5, 16)
    torch.testing.assert_close(points_of(model, images).norm(dim=1), torch.ones(5 * 16))
    model.start(images, tiny.seeded())
    learn(model, images, 3)
    torch.testing.assert_close(model.codebook.norm(dim=1), torch.ones(32))


def learn(model: VQ, images: torch.Tensor, updates: int, seed: int = 0) -> None:
    """Let the codebook alone learn from the same images again and again."""
    for update in range(updates):
        points = points_of(model, images)
        model.move_codebook(points, model._nearest(points), tiny.seeded(seed + update))


def error(points: torch.Tensor, codebook: torch.Tensor) -> float:
    """Mean squared distance of points to the nearest code."""
    return torch.cdist(points, codebook.detach()).amin(1).square().mean().item()


def test_the_start_is_clusters_of_what_the_encoder_says():
    model, images = tiny.vq(), tiny.pictures(32, 16)
    random = model.codebook.clone()
    model.start(images, tiny.seeded())
    points = points_of(model, images)
    assert error(points, model.codebook) < error(points, random) / 2
    assert len(model.encode(images).unique()) > 24
    with torch.no_grad():
        means = model.down(model.features(images)).flatten(0, 2).mean(0)
    torch.testing.assert_close(means, torch.zeros(4), atol=1e-4, rtol=0)


def test_the_codebook_moves_as_a_reference_moves_it():
    package = pytest.importorskip("vector_quantize_pytorch", reason="the reference is another package")
    for normalise in (True, False):
        ours = tiny.vq(normalise=normalise, reseed=0.0, code_channels=4, decay=0.9)
        with torch.random.fork_rng():
            theirs = package.VectorQuantize(
                4, 32, decay=0.9, use_cosine_sim=normalise, threshold_ema_dead_code=0, eps=1e-9, rotation_trick=False
            )
        batch = 64  # counts there, shares here: as many counts as there are points stand for all of them
        theirs._codebook.embed.copy_(ours.codebook[None])
        theirs._codebook.embed_avg.copy_(ours.sums[None] * batch)
        theirs._codebook.cluster_size.copy_(ours.shares[None] * batch)
        for step in range(5):
            said = torch.randn(batch, 4, generator=tiny.seeded(step))
            _, codes, commitment = theirs(said[None].requires_grad_())
            points = F.normalize(said, dim=-1) if normalise else said.detach()
            assert torch.equal(codes[0], ours._nearest(points))
            gone = (points - ours.codebook[codes[0]]).square().sum(-1).mean()
            assert float(gone) == pytest.approx(4 * commitment.item(), rel=1e-4)  # a mean over channels there
            ours.move_codebook(points, codes[0], tiny.seeded())
            torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-4, rtol=1e-4)


def test_codes_that_nobody_chooses_start_anew_where_codes_are_least_right():
    model, images = tiny.vq(decay=0.5, reseed=0.03), tiny.pictures(16, 16)
    model.start(images, tiny.seeded())
    points = points_of(model, images)
    one = points[0] + 0.01 * torch.randn(32, 4, generator=tiny.seeded())  # collapsed: all codes are about the same
    model.codebook.copy_(F.normalize(one, dim=-1))
    model.sums.copy_(model.codebook / 32)
    before = model.codebook.detach().clone()
    learn(model, images, 4)
    unused = model.shares < 0.5**4 / 32 * 1.01
    assert unused.any()
    torch.testing.assert_close(model.codebook[unused], before[unused])  # not at once: their share of before counts
    learn(model, images, 30, seed=4)
    assert len(model._nearest(points).unique()) > 24
    assert error(points, model.codebook) < error(points, before) / 10


def test_no_code_starts_anew_where_none_shall():
    model, images = tiny.vq(decay=0.5, reseed=0.0), tiny.pictures(16, 16)
    before = model.codebook.detach().clone()
    learn(model, images, 60)
    unused = model.shares < 1e-12
    assert unused.any() and torch.isfinite(model.codebook).all()
    torch.testing.assert_close(model.codebook[unused], before[unused])


def test_more_dead_codes_than_points_are_no_trouble():
    model = tiny.vq(decay=0.0)
    points = F.normalize(torch.randn(5, 4, generator=tiny.seeded()), dim=-1)
    model.move_codebook(points, model._nearest(points), tiny.seeded())
    assert torch.isfinite(model.codebook).all()
    assert torch.cdist(points, model.codebook.detach()).amin(1).max() < 1e-3


def test_the_same_generator_moves_the_codebook_the_same_way_and_the_global_one_is_left_alone():
    first = tiny.vq(decay=0.5)
    second, images = copy.deepcopy(first), tiny.pictures(8, 16)
    before = torch.random.get_rng_state()
    for model in (first, second):
        model.start(images, tiny.seeded(3))
        learn(model, images, 12)
    assert torch.equal(first.codebook, second.codebook) and torch.equal(first.shares, second.shares)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_moves_the_codebook_has_32_bits_under_autocast():
    model, images = tiny.vq(), tiny.pictures(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        done = model.training_pass(images, tiny.seeded(), {})
    raw, points, codes = done.seen
    assert raw.dtype == points.dtype == torch.float32 and torch.equal(codes, model._nearest(points))
    torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points)), atol=1e-5, rtol=0)


def test_the_commitment_draws_the_encoder_to_its_codes():
    model, images = tiny.vq(commitment_weight=10.0), tiny.pictures(8, 16)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=3e-3)
    figures = []
    for _ in range(20):
        optimizer.zero_grad()
        done = model.training_pass(images, tiny.seeded(), {})
        done.loss.backward()
        optimizer.step()
        figures.append(done.figures["commitment"].item())
    assert figures[-1] < figures[0] / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code_channels": 0}, "code_channels: expected at least 1"),
        ({"code_channels": 1}, "code_channels: on a sphere at least 2"),
        ({"decay": 1.0}, "decay: expected 0 or more and less than 1"),
        ({"reseed": -0.1}, "reseed: expected 0 or more"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected 0 or more"),
        ({"codebook_size": 1}, "codebook_size: expected at least 2"),
        ({"kind": "dvae"}, "kind: unknown 'dvae'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        VQConfig(**fields)
