"""The start of a dVAE: what it says through its numbers, and the codes it leaves."""

import math

import pytest
import torch

import tiny
from armchair.errors import RequestError
from armchair.image.autoencoder import Autoencoder
from armchair.image.clusters import distinct, kmeans


def autoencoder(channels: int = 4, noise: float = 0.4, **sizes) -> Autoencoder:
    model = tiny.dvae(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Autoencoder(model, channels, noise)


def test_numbers_are_white_so_that_the_noise_bounds_what_they_carry():
    numbers = autoencoder().numbers(tiny.pictures(16, 16)).flatten(0, 2)
    assert torch.allclose(numbers.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(numbers.var(0, correction=0), torch.ones(4), atol=1e-2)


def test_more_noise_costs_likelihood():
    images = tiny.pictures(16, 16)
    quiet, loud = (trained(autoencoder(noise=n, n_hid=16), images).loss(images, tiny.seeded(2)) for n in (0.1, 2.0))
    assert quiet.item() < loud.item() - 0.1


def test_what_is_said_of_crops_is_clustered_over_whole_pictures():
    images = tiny.pictures(32, 16)
    model = autoencoder(n_hid=16, codebook_size=64, stem_kernel=1, encoder_kernel=1, n_groups=1, patch=4)
    model.crop = 8
    noise, learning = tiny.seeded(), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        crops = model.crops(images, noise)
        assert crops.shape == (32, 3, 8, 8)
        model.loss(crops, noise).backward()
        optimizer.step()
    model.quantise(images, tiny.seeded(3))
    with torch.no_grad():
        again = model.dvae.decode(model.dvae.encode(images))
    plain = images.mean((2, 3), keepdim=True)
    assert (again - images).square().mean() < 0.5 * (plain - images).square().mean()


def trained(model: Autoencoder, images: torch.Tensor, steps: int = 100) -> Autoencoder:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, noise = torch.optim.Adam(learning, lr=3e-3), tiny.seeded()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(images, noise).backward()
        optimizer.step()
    return model


def test_a_code_is_the_nearest_cluster_of_the_numbers():
    model, images = autoencoder(codebook_size=24), tiny.pictures(32, 16)
    with torch.no_grad():
        numbers = model.numbers(images).flatten(0, 2)
        points, counts = distinct(numbers)
        centres, _ = kmeans(points, 24, tiny.seeded(1), counts.sqrt())
        model.quantise(images, tiny.seeded(1))
        nearest = torch.cdist(numbers, centres).argmin(1)
        got = model.dvae.encode(images).flatten()
    gaps = torch.cdist(numbers, centres).sort(1).values
    clear = gaps[:, 1] - gaps[:, 0] > 1e-3  # a tie may fall either way
    assert clear.sum() > 400 and torch.equal(got[clear], nearest[clear])


def test_what_was_learnt_through_numbers_is_drawn_through_codes():
    model, images = autoencoder(n_hid=16, codebook_size=64), tiny.pictures(16, 16)

    def round_trip_loss() -> float:
        with torch.no_grad():
            return model.dvae.hard_loss(images, model.dvae.encode(images)).item()

    before = round_trip_loss()
    trained(model, images)
    found = model.quantise(images, tiny.seeded(3))
    assert found.noise == pytest.approx(4 * 0.4**2) and 0 <= found.error < found.noise
    assert round_trip_loss() < before - 0.5
    assert len(model.dvae.encode(images).unique()) > 20


def test_from_its_clusters_on_the_relaxation_goes_on_learning():
    model, images = trained(autoencoder(n_hid=16), tiny.pictures(8, 16)), tiny.pictures(8, 16)
    model.quantise(images, tiny.seeded(3))
    dvae = model.dvae.requires_grad_(True)
    optimizer, noise = torch.optim.Adam(dvae.parameters(), lr=1e-3), tiny.seeded()
    start = dvae.hard_loss(images, dvae.encode(images)).item()
    for _ in range(200):
        optimizer.zero_grad()
        dvae.relaxed_loss(images, 0.5, 0.1, noise).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert dvae.hard_loss(images, dvae.encode(images)).item() < start - 0.5


def test_the_same_pictures_and_seed_give_the_same_codes():
    first, again = autoencoder(), autoencoder()
    for model in (first, again):
        model.quantise(tiny.pictures(8, 16), tiny.seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_fewer_positions_than_codes_are_no_error():
    model = autoencoder(codebook_size=64)
    model.quantise(torch.full((1, 3, 16, 16), 0.5), tiny.seeded())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_kmeans_finds_clusters_and_its_error_is_that_of_the_nearest_centre():
    g = tiny.seeded()
    true = torch.randn(12, 3, generator=g) * 10
    points = true.repeat(50, 1) + 0.01 * torch.randn(600, 3, generator=g)
    centres, error = kmeans(points, 12, g)
    assert torch.cdist(true, centres).amin(1).max() < 0.1
    assert math.isclose(error, torch.cdist(points, centres).square().amin(1).mean().item(), rel_tol=1e-2)
    with pytest.raises(RequestError, match="at least one point"):
        kmeans(points[:0], 3, g)
