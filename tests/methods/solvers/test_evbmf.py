"""Ranks by empirical variational Bayes: the planted ones, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from support.tucker import conv6
from tvm_lowrank.methods.solvers.evbmf import evbmf_rank, suggest_ranks


@pytest.mark.parametrize("rank", [3, 8, 15])
@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (80, 80)])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_finds_the_rank_under_noise(rank: int, shape: tuple[int, int], noise: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        assert evbmf_rank(signal + noise * rng.standard_normal(shape)) == rank


def test_does_not_depend_on_scale_or_orientation() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 90)) + 0.3 * rng.standard_normal((40, 90))
    assert {evbmf_rank(scale * array) for scale in (1e-6, 1, 1e6) for array in (matrix, matrix.T)} == {6}


def test_extremes() -> None:
    rng = np.random.default_rng(2)
    assert evbmf_rank(rng.standard_normal((50, 100))) == 0
    assert evbmf_rank(np.zeros((5, 7))) == 0
    assert evbmf_rank(rng.standard_normal((50, 3)) @ rng.standard_normal((3, 100))) == 3
    with pytest.raises(ValueError, match="expected a matrix"):
        evbmf_rank(np.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        evbmf_rank(np.full((3, 4), np.inf))


def test_ranks_of_a_tucker_kernel_and_their_weakening() -> None:
    rng = np.random.default_rng(3)
    core = rng.standard_normal((9, 5, 3, 3))
    weight = np.einsum("nt,tsij,cs->ncij", rng.standard_normal((40, 9)), core, rng.standard_normal((30, 5)))
    weight += 0.3 * rng.standard_normal(weight.shape)
    assert suggest_ranks(weight) == (5, 9)
    assert suggest_ranks(weight, weakening=1) == (30, 40)
    assert suggest_ranks(weight, weakening=0.2) == (10, 15)
    assert suggest_ranks(rng.standard_normal((20, 20, 3, 3))) == (1, 1)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        suggest_ranks(weight, weakening=2)
    with pytest.raises(ValueError, match="OIHW"):
        suggest_ranks(weight[0])


def test_a_trained_layer_has_signal_and_noise() -> None:
    inner, outer = suggest_ranks(conv6())
    assert 50 < inner < 100 and 50 < outer < 100
