import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from armchair.errors import RequestError
from armchair.image import dvae as dvae_module
from armchair.image.dvae import DVAE, DVAEConfig, gumbel_relaxation
from armchair.image.network import Block, logit_laplace_log_prob, map_pixels, unmap_pixels

# The density and the pixel map.


@given(mu=st.floats(-6, 6), b=st.floats(0.02, 1.2))
def test_logit_laplace_is_a_density(mu, b):
    y = mu + b * torch.linspace(-12, 12, 4001, dtype=torch.float64)  # x = sigmoid(y)
    x = torch.sigmoid(y)
    log_f = logit_laplace_log_prob(x, torch.tensor(mu).double(), torch.tensor(b).double().log())
    assert abs(torch.trapezoid(log_f.exp() * x * (1 - x), y) - 1) < 1e-3


def test_logit_laplace_is_a_density_over_pixels_too():
    x = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
    for mu, b in ((0.0, 0.5), (1.5, 0.3), (-2.0, 0.1)):
        log_f = logit_laplace_log_prob(x, torch.tensor(mu), torch.tensor(b).double().log())
        assert abs(torch.trapezoid(log_f.exp(), x) - 1) < 1e-3


@given(x=st.floats(0.1, 0.9), mu=st.floats(-8, 8), b=st.floats(0.01, 10))
def test_logit_laplace_is_the_papers_formula(x, mu, b):
    f = 1 / (2 * b * x * (1 - x)) * math.exp(-abs(math.log(x / (1 - x)) - mu) / b)
    got = logit_laplace_log_prob(*(torch.tensor(v, dtype=torch.float64) for v in (x, mu, math.log(b))))
    if f > 1e-300:
        assert float(got) == pytest.approx(math.log(f), rel=1e-9, abs=1e-9)


@given(st.integers(0, 255))
def test_pixels_are_mapped_into_the_open_interval_and_back(v):
    mapped = map_pixels(torch.tensor(v / 255, dtype=torch.float64))
    assert float(mapped) == pytest.approx((1 - 2 * 0.1) * v / 255 + 0.1)
    assert float(unmap_pixels(mapped)) == pytest.approx(v / 255)


def test_reconstructions_outside_the_pixel_range_are_clamped():
    assert unmap_pixels(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist() == pytest.approx([0, 0, 0.5, 1, 1])


# The relaxation.


def plain_relaxation(logits: Tensor, tau: float, seed: int) -> tuple[Tensor, Tensor]:
    """The plain formula in float64, with the uniforms drawn in the order of the blocks."""
    g = tiny.seeded(seed)
    k = logits.shape[-1]
    flat = logits.reshape(-1, k)
    uniforms = [
        torch.empty(len(flat[rows]), k).uniform_(generator=g) for rows in dvae_module._row_blocks(flat)
    ]
    gumbel = -torch.log(-torch.log(torch.cat(uniforms).double()))
    log_q = torch.log_softmax(logits.double(), -1)
    weights = torch.softmax((log_q + gumbel.view_as(log_q)) / tau, -1)
    return weights, (log_q.exp() * (log_q - math.log(1 / k))).sum(-1)


def compare_relaxation(shape: tuple[int, ...], tau: float, dtype: torch.dtype, seed: int) -> None:
    g = tiny.seeded(seed)
    start = (2 * torch.randn(shape, generator=g)).to(dtype)
    logits, plain = start.clone().requires_grad_(), start.double().requires_grad_()
    weights, kl = gumbel_relaxation(logits, tau, tiny.seeded(seed))
    plain_weights, plain_kl = plain_relaxation(plain, tau, seed)
    assert weights.shape == shape and weights.dtype == dtype
    assert kl.shape == shape[:-1] and kl.dtype == torch.float32
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(weights.double(), plain_weights, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kl.double(), plain_kl, rtol=1e-4, atol=1e-4)

    a, b = torch.randn(shape, generator=g), torch.randn(shape[:-1], generator=g)
    ((weights * a.to(dtype)).double().sum() + (kl * b).double().sum()).backward()
    ((plain_weights * a.to(dtype)).sum() + (plain_kl * b).sum()).backward()
    largest = a.abs().max() / tau + b.abs().max()
    assert (logits.grad.double() - plain.grad).abs().max() < tolerance * largest


@settings(max_examples=40)
@given(
    rows=st.integers(1, 6), side=st.integers(1, 3), k=st.integers(2, 40), tau=st.floats(1 / 16, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_relaxation_is_the_plain_formula(rows, side, k, tau, dtype, seed):
    compare_relaxation((rows, side, side, k), tau, dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [127, 128, 129, 300])
def test_the_relaxation_is_the_plain_formula_over_several_blocks(rows, dtype):
    if rows == 300:
        assert len(dvae_module._row_blocks(torch.empty(rows, 4096))) == 3
    compare_relaxation((rows, 4096), 0.5, dtype, rows)


def test_the_relaxation_samples_codes_as_often_as_the_logits_say():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    weights, _ = gumbel_relaxation(p.log().expand(20_000, 4), 1 / 16, tiny.seeded())
    assert (weights.argmax(-1).bincount(minlength=4) / 20_000 - p).abs().max() < 0.015
    torch.testing.assert_close(weights.sum(-1), torch.ones(20_000))


def test_kl_is_zero_for_uniform_codes_and_ln_k_for_certain_ones():
    logits = torch.stack([torch.zeros(16), 100.0 * torch.eye(16)[3]])
    _, kl = gumbel_relaxation(logits, 1.0, tiny.seeded())
    assert kl.tolist() == pytest.approx([0, math.log(16)], abs=1e-5)


# The model.


def test_codes_and_images_have_the_promised_shapes_and_ranges():
    model = tiny.dvae()
    images = tiny.pictures(5, 16)
    codes = model.encode(images)
    assert codes.shape == (5, 4, 4) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < model.codebook_size == 32
    back = model.decode(torch.arange(16 * 2).view(2, 4, 4))
    assert back.shape == (2, 3, 16, 16) and back.dtype == torch.float32
    assert back.min() >= 0 and back.max() <= 1


def test_encoding_is_the_argmax_of_the_logits_without_noise():
    model, images = tiny.dvae(), tiny.pictures(3, 16)
    logits = model.logits(images)
    assert logits.shape == (3, 4, 4, 32)
    assert torch.equal(model.encode(images), logits.argmax(-1))
    assert torch.equal(model.encode(images), model.encode(images))


def test_decoding_does_not_depend_on_the_rest_of_the_batch():
    model = tiny.dvae()
    codes = torch.randint(32, (4, 4, 4), generator=tiny.seeded())
    torch.testing.assert_close(model.decode(codes)[1:2], model.decode(codes[1:2]))


@pytest.mark.parametrize("wrong", [(1, 3, 8, 8), (3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 24)])
def test_images_of_another_shape_are_refused(wrong):
    with pytest.raises(RequestError, match=r"expected \(B, 3, 16, 16\), got"):
        tiny.dvae().encode(torch.zeros(wrong))


@pytest.mark.parametrize(
    ("patch", "n_groups", "resolution", "grid"),
    [(1, 4, 32, 4), (2, 3, 32, 4), (4, 2, 32, 4), (8, 1, 32, 4), (4, 2, 64, 8), (8, 2, 64, 4), (1, 1, 6, 6)],
)
def test_patch_and_groups_set_the_grid(patch, n_groups, resolution, grid):
    model = tiny.dvae(patch=patch, n_groups=n_groups, resolution=resolution)
    assert model.grid == grid and model.config.factor * grid == resolution
    codes = model.encode(tiny.pictures(2, resolution))
    assert codes.shape == (2, grid, grid)
    assert model.decode(codes).shape == (2, 3, resolution, resolution)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resolution", 250, "resolution 250 is not a multiple .* 8"),
        ("codebook_size", 1, "codebook_size"),
        ("n_hid", 6, "n_hid: expected a multiple of 4"),
        ("stem_kernel", 4, "stem_kernel: expected an odd"),
        ("encoder_kernel", 2, "encoder_kernel: expected an odd"),
        ("n_blocks", 0, "n_blocks: expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(field, value, message):
    with pytest.raises(RequestError, match=message):
        DVAEConfig(**{field: value})


def block_facts(part: nn.Module) -> list[tuple]:
    facts = []
    for m in part:
        if isinstance(m, Block):
            kernels = tuple(c.kernel_size[0] for c in m.convs)
            widths = (m.convs[0].in_channels, *(c.out_channels for c in m.convs))
            skip = None if isinstance(m.skip, nn.Identity) else m.skip.kernel_size
            facts.append((widths, kernels, skip, m.gain))
        else:
            facts.append((type(m).__name__,))
    return facts


def test_the_default_is_the_released_model():
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert (model.grid, model.codebook_size, model.config.factor) == (32, 8192, 8)

    def group(n_in, width, kernels):
        mid = width // 4
        first = ((n_in, mid, mid, mid, width), kernels, None if n_in == width else (1, 1), 1 / 64)
        return [first, ((width, mid, mid, mid, width), kernels, None, 1 / 64)]

    e, d = (3, 3, 3, 1), (1, 3, 3, 3)
    pool, up = [("MaxPool2d",)], [("Upsample",)]
    assert block_facts(model.encoder) == [
        ("Conv2d",), *group(256, 256, e), *pool, *group(256, 512, e), *pool,
        *group(512, 1024, e), *pool, *group(1024, 2048, e), ("ReLU",),
    ]  # fmt: skip
    assert block_facts(model.decoder) == [
        *group(128, 2048, d), *up, *group(2048, 1024, d), *up,
        *group(1024, 512, d), *up, *group(512, 256, d), ("ReLU",), ("Conv2d",),
    ]  # fmt: skip
    stem, out = model.encoder[0], model.decoder[-1]
    assert (stem.in_channels, stem.out_channels, stem.kernel_size) == (3, 256, (7, 7))
    assert tuple(model.to_logits.weight.shape) == (8192, 2048, 1, 1)
    assert tuple(model.codebook.shape) == (8192, 128)
    assert (out.in_channels, out.out_channels, out.kernel_size) == (256, 6, (1, 1))
    assert all(up.mode == "nearest" for up in model.decoder if isinstance(up, nn.Upsample))


def test_the_loss_is_the_evidence_bound():
    model, images = tiny.dvae().requires_grad_(False), tiny.pictures(4, 16)
    loss, reconstruction, kl = model.relaxed_loss(images, 0.7, 6.6, tiny.seeded(5))
    weights, plain_kl = plain_relaxation(model.logits(images), 0.7, 5)
    mu, log_b = model.density(weights.float() @ model.codebook)
    x = 0.8 * images.double() + 0.1
    distance = (torch.log(x / (1 - x)) - mu).abs()
    nll = torch.log(2 * log_b.double().exp() * x * (1 - x)) + distance / log_b.double().exp()
    assert float(reconstruction) == pytest.approx(float(nll.mean()), abs=1e-4)
    assert float(kl) == pytest.approx(float(plain_kl.mean()), abs=1e-4)
    assert float(loss) == pytest.approx(float(nll.mean() + 6.6 / (3 * 4 * 4) * plain_kl.mean()), abs=1e-4)


def test_the_scale_of_the_density_never_falls_under_its_floor():
    model = tiny.dvae()
    with torch.no_grad():
        model.decoder[-1].bias.fill_(-100.0)
    _, log_b = model.density(torch.zeros(1, 4, 4, 8))
    assert log_b.min().item() >= -3.0


def test_a_batch_can_be_learnt_by_heart():
    model, images = tiny.dvae(n_hid=16), tiny.pictures(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    noise = tiny.seeded()
    before = model.hard_loss(images, model.encode(images)).item()
    for step in range(250):
        optimizer.zero_grad()
        model.relaxed_loss(images, max(1 / 16, 1 - step / 200), 0.1, noise).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model.hard_loss(images, model.encode(images)).item()
    assert after < before - 0.5


@pytest.mark.parametrize("kernel", [1, 3])
def test_with_kernels_of_one_a_code_knows_its_own_patch_only(kernel):
    model = tiny.dvae(resolution=16, patch=4, n_groups=1, stem_kernel=kernel, encoder_kernel=kernel)
    before = torch.rand(1, 3, 16, 16, generator=tiny.seeded())
    after = before.clone()
    after[:, :, 4:8, 8:12] = 1 - before[:, :, 4:8, 8:12]
    with torch.no_grad():
        changed = (model.logits(before) != model.logits(after)).any(-1)[0]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(changed, expected) == (kernel == 1)
    assert changed[1, 2]
