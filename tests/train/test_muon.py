"""The optimiser of matrices against slow, literal versions of what it does."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tiny
from armchair.image.autoencoder import Autoencoder
from armchair.train.muon import MOMENTUM, MuonAdamW, orthogonalised
from armchair.train.optim import make_optimizer, parameter_groups
from armchair.train.recipe import FitConfig


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape, kind):
    matrices = torch.randn(shape, generator=tiny.seeded())
    found = orthogonalised(matrices.to(kind)).float()
    for before, after in zip(matrices, found, strict=True):
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ v.T
        kept = s > 0.05 * s.norm()  # the rounds raise small values more slowly
        assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3))[kept].all()
        off = inner - torch.diag(inner.diagonal())
        assert off.abs().max() < (1e-4 if kind == torch.float32 else 0.1)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


class Literal:
    """Muon of one matrix, as the formulas say."""

    def __init__(self, weight: Tensor, lr: float, decay: float):
        self.weight, self.lr, self.decay = weight.clone(), lr, decay
        self.momentum = torch.zeros_like(weight)

    def step(self, grad: Tensor) -> None:
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * grad
        nesterov = MOMENTUM * self.momentum + (1 - MOMENTUM) * grad
        move = orthogonalised(nesterov[None])[0] * max(1.0, math.sqrt(len(grad) / grad.shape[1]))
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * move


def test_each_matrix_of_a_weight_moves_alone_and_a_kernel_as_a_matrix():
    stacked, kernel = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer = MuonAdamW(
        [
            {"params": [stacked], "matrices": 3, "weight_decay": 0.1},
            {"params": [kernel], "matrices": 1, "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    literal = [Literal(part, 0.1, 0.1) for part in stacked.detach().split(4)]
    flat = Literal(kernel.detach().flatten(1), 0.1, 0.0)
    for seed in range(4):
        stacked.grad = torch.randn(12, 4, generator=tiny.seeded(seed))
        kernel.grad = torch.randn(6, 2, 3, 3, generator=tiny.seeded(seed + 9))
        for part, grad in zip(literal, stacked.grad.split(4), strict=True):
            part.step(grad)
        flat.step(kernel.grad.flatten(1))
        optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([part.weight for part in literal]))
    torch.testing.assert_close(kernel.detach().flatten(1), flat.weight)


def test_without_a_matrix_lr_it_is_adamw_bit_for_bit():
    ours = tiny.prior(tiny.shape(), "full", "row", blank=True)
    plain = copy.deepcopy(ours)
    config = FitConfig(steps=1, batch_size=1, lr=1e-2, weight_decay=0.1)
    mine = make_optimizer(ours, config, torch.device("cpu"))
    theirs = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, eps=config.eps, fused=True)
    for _ in range(3):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        mine.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def moved_by_muon(model: nn.Module) -> dict[str, int]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, matrix_scale=10.0)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert all(g["lr_scale"] == 10.0 for g in groups if g["matrices"])
    return {names[id(p)]: g["matrices"] for g in groups for p in g["params"] if g["matrices"]}


def test_muon_moves_the_matrices_of_the_blocks_and_no_embedding_or_head():
    block = {"attention.qkv": 3, "attention.out": 1, "mlp_in": 1, "mlp_out": 1}
    assert moved_by_muon(tiny.prior(tiny.shape(), "full", "row")) == {
        f"blocks.{i}.{name}.weight": n for i in (0, 1) for name, n in block.items()
    }


def test_the_gates_and_the_values_of_a_gated_block_move_as_two_matrices():
    moved = moved_by_muon(tiny.prior(tiny.shape(), "full", **tiny.OPTIONS["all"]))
    assert moved == {f"blocks.0.{name}.weight": n for name, n in
                     {"attention.qkv": 3, "attention.out": 1, "mlp_in": 2, "mlp_out": 1}.items()}  # fmt: skip


def test_muon_moves_the_convolutions_of_an_autoencoder_and_not_its_codes():
    moved = moved_by_muon(Autoencoder(tiny.dvae(), channels=3, noise=0.3))
    assert moved and set(moved.values()) == {1}
    assert all(name.startswith(("dvae.encoder.", "dvae.decoder.")) for name in moved)
    assert {"dvae.encoder.0.weight", "dvae.decoder.4.weight"} <= set(moved)
