import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from armchair.train.optim import Plateau, cosine, make_optimizer, parameter_groups, step_size, update_ema
from armchair.train.recipe import FitConfig, PriorTraining


def fit_config(**fields) -> FitConfig:
    return FitConfig(**{"steps": 100, "batch_size": 1, "lr": 0.1, "warmup": 10, **fields})


def test_cosine_of_known_steps():
    assert [cosine(s, 4, 1.0, 0.0) for s in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine(1, 4, 2.0, 6.0) == pytest.approx(2 + 4 * (1 - math.sqrt(0.5)) / 2)
    assert cosine(0, 0, 1.0, 0.25) == 0.25  # a schedule of no steps is over at once


def test_the_papers_schedules():
    assert cosine(75_000, 150_000, 1.0, 1 / 16) == pytest.approx((1 + 1 / 16) / 2)
    assert cosine(5_000, 5_000, 0.0, 6.6) == pytest.approx(6.6)
    assert cosine(1_200_000, 1_200_000, 1e-4, 1.25e-6) == pytest.approx(1.25e-6)


@given(step=st.integers(0, 300), steps=st.integers(1, 200), start=st.floats(0, 10), end=st.floats(0, 10))
def test_cosine_stays_between_its_ends_and_keeps_its_direction(step, steps, start, end):
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9
    here, after = cosine(step, steps, start, end), cosine(step + 1, steps, start, end)
    assert low <= here <= high
    assert (after - here) * (end - start) >= -1e-9


def test_the_step_size_warms_up_then_follows_the_cosine():
    config = fit_config(final_lr=0.02)
    assert [step_size(s, config) for s in range(10)] == pytest.approx([0.01 * (s + 1) for s in range(10)])
    assert step_size(10, config) == pytest.approx(0.1)
    assert step_size(55, config) == pytest.approx(0.06)
    assert step_size(99, config) == pytest.approx(0.02, abs=1e-4)
    assert step_size(0, fit_config(warmup=0)) == pytest.approx(0.1)


def test_constant_and_plateau_schedules():
    assert [step_size(s, fit_config(schedule="constant")) for s in (4, 9, 50, 99)] == pytest.approx(
        [0.05] + 3 * [0.1]
    )
    assert step_size(50, fit_config(schedule="plateau"), 0.25) == pytest.approx(0.025)
    assert step_size(50, fit_config(), 0.25) == step_size(50, fit_config())  # a cosine knows no plateau


def test_a_trapezoid_is_flat_and_then_falls_in_a_line():
    config = fit_config(schedule="trapezoid", cooldown=0.5, final_lr=0.01)  # of 100 steps, ten of them warm-up
    assert step_size(4, config) == pytest.approx(0.05)
    assert [step_size(s, config) for s in (9, 30, 49)] == pytest.approx([0.1] * 3) and config.cooldown_step == 50
    falling = [step_size(s, config) for s in range(49, 101)]
    assert falling[-1] == pytest.approx(0.01)
    assert [a - b for a, b in zip(falling, falling[1:], strict=False)] == pytest.approx([0.09 / 51] * 51)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 9_999])
def test_a_trapezoid_of_any_length_falls_to_its_end(steps):
    config = fit_config(schedule="trapezoid", steps=steps, warmup=0)
    sizes = [step_size(s, config) for s in range(min(steps - 3, 0), steps)]
    assert 0 <= config.cooldown_step < steps and 0 < sizes[-1] < 0.1


def test_plateau_halves_after_patience_validations_without_a_best():
    plateau = Plateau(2)
    scales = []
    for loss in (5.0, 4.0, 4.0, 4.5, 4.2, 4.1, 3.0, 3.5, 2.9, 3.0):
        plateau.observe(loss)
        scales.append(plateau.scale)
    assert scales == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


@given(losses=st.lists(st.floats(0, 10), max_size=20), cut=st.integers(0, 20), patience=st.integers(1, 3))
def test_a_plateau_goes_on_from_its_state(losses, cut, patience):
    whole, first, second = Plateau(patience), Plateau(patience), Plateau(patience)
    for loss in losses:
        whole.observe(loss)
    for loss in losses[:cut]:
        first.observe(loss)
    second.load(first.state())
    for loss in losses[cut:]:
        second.observe(loss)
    assert second.state() == whole.state()


@given(decay=st.floats(0, 0.9999), step=st.integers(0, 100_000), seed=st.integers(0, 99))
def test_the_average_moves_by_the_rest_of_the_decay(decay, step, seed):
    average, weights = torch.randn(2, 3, 4, generator=tiny.seeded(seed))
    d = min(decay, (1 + step) / (10 + step))
    expected = d * average + (1 - d) * weights
    update_ema([average], [weights], decay, step)
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-5)


def test_the_average_forgets_its_random_start():
    average, weights = [torch.full((2,), 100.0)], [torch.ones(2)]
    for step in range(200):
        update_ema(average, weights, 0.999, step)
    assert average[0].max() < 1.1
    assert torch.equal(weights[0], torch.ones(2))


def names_by_group(model: nn.Module) -> tuple[list[dict], list[set[str]]]:
    groups = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    return groups, [{names[id(p)] for p in g["params"]} for g in groups]


def test_the_encoder_of_a_dvae_has_a_step_size_of_its_own():
    model = tiny.dvae()
    scales = {id(p): g["lr_scale"] for g in parameter_groups(model, 0.1, 0.25) for p in g["params"]}
    for name, p in model.named_parameters():
        assert scales.pop(id(p)) == (0.25 if name.startswith(("encoder", "to_logits")) else 1.0), name
    assert not scales


@pytest.mark.parametrize("width", [16, 64])
def test_weight_decay_and_width_apply_to_the_priors_matrices_only(width):
    model = tiny.prior(tiny.shape(), "row", "full", width=width)
    (matrices, others), (decayed, spared) = names_by_group(model)
    hidden = {
        f"blocks.{i}.{m}.weight"
        for i in (0, 1)
        for m in ("attention.qkv", "attention.out", "mlp_in", "mlp_out")
    }
    assert decayed == hidden | {"text_head.weight", "image_head.weight"}
    assert decayed | spared == {name for name, _ in model.named_parameters()} and not decayed & spared
    assert {n for n in spared if "embedding" in n or "position" in n} == {
        f"{n}.weight"
        for n in ("text_embedding", "text_position", "image_embedding", "row_embedding", "column_embedding")
    }
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert (matrices["lr_scale"], others["lr_scale"]) == (256 / width, 1)


def test_gains_and_a_tied_table_are_spared_and_go_by_the_recipes_step_size():
    model = tiny.prior(tiny.shape(), "full", width=64, **tiny.OPTIONS["all"])
    (matrices, others), (decayed, spared) = names_by_group(model)
    layers = ("attention.qkv", "attention.out", "mlp_in", "mlp_out")
    assert decayed == {*(f"blocks.0.{m}.weight" for m in layers), "text_head.weight"}
    gains = {f"blocks.0.attention.{kind}_norm.weight" for kind in ("query", "key")}
    assert spared >= gains | {"image_embedding.weight", "norm.weight"}
    assert (others["weight_decay"], others["lr_scale"], matrices["lr_scale"]) == (0, 1, 256 / 64)


@pytest.mark.parametrize("width", [64, 512])
def test_the_width_that_a_step_size_is_stated_at_is_the_recipes(width):
    config = PriorTraining(steps=1, batch_size=1, lr=1e-3, lr_width=width)
    optimizer = make_optimizer(tiny.prior(tiny.shape(), "full", width=64), config, torch.device("cpu"))
    assert [g["lr_scale"] for g in optimizer.param_groups] == [width / 64, 1]


@pytest.mark.parametrize("matrix_scale", [None, 3.0])
def test_with_code_features_the_vectors_of_codes_have_a_step_size_of_their_own(matrix_scale):
    model = tiny.prior(tiny.shape(), "full", features=7)
    groups = parameter_groups(model, 0.1, matrix_scale=matrix_scale)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    maps = {f"code_{side}.{layer}.{kind}" for side in ("inputs", "outputs") for layer in ("hidden", "out")
            for kind in ("weight", "bias")}  # fmt: skip
    own = {"image_embedding.weight", "image_head.weight"}
    for name, group in found.items():
        kind = (group["lr_scale"], group["weight_decay"], group["matrices"])
        assert (kind == (0.1, 0.0, 0)) == (name in maps), name
        assert (kind == (0.03, 0.0, 0)) == (name in own), name


def test_weight_decay_spares_the_dvaes_biases_and_codebook():
    model = tiny.dvae()
    groups, (decayed, spared) = names_by_group(model)
    assert decayed | spared == {name for name, _ in model.named_parameters()} and not decayed & spared
    assert "codebook" in spared and all(n == "codebook" or n.endswith("bias") for n in spared)
    assert all(n.endswith("weight") for n in decayed)
    assert [g["weight_decay"] for g in groups] == [0.1, 0] and [g["lr_scale"] for g in groups] == [1, 1]
