"""The optimiser of compressed networks: orthogonal steps, as large as the weights say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tvm_lowrank.searching.fit.muon import LEAST, Muon, orthogonal


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(values: Tensor, gradient: Tensor, *, lr: float = 0.1, **group: object) -> Tensor:
    """The first step."""
    parameter = nn.Parameter(values.clone())
    parameter.grad = gradient
    Muon([{"params": [parameter], **group}], lr=lr).step()
    return parameter.detach() - values


@pytest.mark.parametrize("shape", [(3, 6, 20), (2, 20, 6), (4, 8, 8), (5, 1, 9), (1, 7, 1)])
def test_orthogonal_keeps_the_singular_vectors(shape: tuple[int, int, int]) -> None:
    given = drawn(*shape)
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    among = u.mT @ orthogonal(given) @ v.mT
    sizes = among.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.65 and sizes.max() < 1.25
    assert (among - torch.diag_embed(sizes)).abs().max() < 1e-4


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert orthogonal(torch.zeros(2, 3, 4)).count_nonzero() == 0


@pytest.mark.parametrize(("shape", "blocks"), [((8, 4, 3, 3), 2), ((8, 1, 3, 3), 8), ((1, 6, 1, 1), 1), ((5, 7), 1)])
def test_steps_are_a_part_of_the_norm_whatever_the_gradient(shape: tuple[int, ...], blocks: int) -> None:
    values, gradient = drawn(*shape), drawn(*shape, seed=1)
    step = moved(values, gradient, blocks=blocks)
    assert step.norm().item() == pytest.approx(0.1 * values.norm().item(), rel=1e-4)
    torch.testing.assert_close(moved(values, 1e-6 * gradient, blocks=blocks), step, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved(values, gradient, share=0.25, blocks=blocks), step / 4, rtol=1e-3, atol=1e-6)
    assert (step * gradient).sum() < 0


def test_rows_whose_gradients_disagree_hardly_move() -> None:
    parameter = nn.Parameter(torch.ones(2, 1, 1, 1))
    optimiser = Muon([{"params": [parameter], "blocks": 2}], lr=0.01)
    for step in range(50):
        parameter.grad = torch.tensor([1.0, (-1.0) ** step]).reshape(2, 1, 1, 1)
        optimiser.step()
    one, other = parameter.detach().flatten()
    assert one < 0.7 and abs(other - 1) < 0.1


def test_what_is_zero_begins_to_move() -> None:
    step = moved(torch.zeros(1, 9, 1, 1), drawn(1, 9, 1, 1))
    assert step.norm().item() == pytest.approx(0.1 * LEAST * 3, rel=1e-4)


def test_the_groups_of_a_convolution_are_matrices_of_their_own() -> None:
    values, gradient = drawn(8, 2, 3, 3), drawn(8, 2, 3, 3, seed=1)
    gradient[:4] *= 1e-3  # one of two groups has a much smaller gradient: it moves as far
    step = moved(values, gradient, blocks=2)
    alone = moved(values[:4], gradient[:4])
    torch.testing.assert_close(step[:4] / step[:4].norm(), alone / alone.norm(), rtol=1e-3, atol=1e-4)
    assert 0.8 < step[:4].norm() / step[4:].norm() < 1.25


def error_after(optimiser: type[torch.optim.Optimizer], lr: float) -> float:
    """The error of a linear map that was learnt in 100 steps from inputs of which few directions are large."""
    wanted = drawn(16, 32)
    weight = nn.Parameter(wanted + 0.3 * drawn(16, 32, seed=1))
    sizes = torch.logspace(0, -2, 32)
    turned = torch.linalg.qr(drawn(32, 32, seed=2)).Q
    optimise = optimiser([weight], lr=lr)
    for step in range(100):
        for group in optimise.param_groups:
            group["lr"] = lr * (1 - step / 100)
        x = drawn(64, 32, seed=step) * sizes @ turned
        loss = ((weight - wanted) @ x.T).square().mean()
        optimise.zero_grad()
        loss.backward()
        optimise.step()
    return float(((weight.detach() - wanted) @ (turned.T * sizes)).square().mean())


def test_learns_small_directions_sooner_than_adam() -> None:
    """Each with the best of its rates."""
    muon = min(error_after(Muon, lr) for lr in (0.01, 0.02, 0.04))
    adam = min(error_after(torch.optim.Adam, lr) for lr in (0.003, 0.01, 0.03, 0.1))
    assert muon < 0.5 * adam
