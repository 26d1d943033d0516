"""The tensor algebra against tensorly, which has the plain algorithms: the same where it should be, else better."""

from __future__ import annotations

from functools import partial, reduce

import numpy as np
import pytest
import tensorly
from tensorly.cp_tensor import cp_to_tensor, unfolding_dot_khatri_rao
from tensorly.decomposition import parafac, partial_tucker

from tvm_lowrank import example
from tvm_lowrank.methods.cp import ladder
from tvm_lowrank.methods.solvers.cp_als import als
from tvm_lowrank.methods.solvers.cp_solver import climb, solve
from tvm_lowrank.methods.solvers.cp_terms import khatri_rao, mttkrps, split, squared, tensor_of
from tvm_lowrank.methods.solvers.tucker2_solver import hooi


def trained_kernel() -> np.ndarray:
    """A layer of the bundled network, (O, I, taps), of norm 1."""
    weight = example.model().conv2.weight.detach().numpy().astype(np.float64)
    tensor = weight.reshape(*weight.shape[:2], -1)
    return tensor / np.linalg.norm(tensor)


@pytest.mark.parametrize("shape", [(5, 4, 3), (4, 5, 3, 2)])
def test_sums_and_products_of_terms(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    stack, tensor = rng.standard_normal((sum(shape), 6)), rng.standard_normal(shape)
    factors = split(stack, shape)
    terms = (np.ones(6), factors)
    np.testing.assert_allclose(tensor_of(stack, shape), cp_to_tensor(terms), atol=1e-12)
    np.testing.assert_allclose(khatri_rao(factors), tensorly.tenalg.khatri_rao(factors), atol=1e-12)
    for mode, product in enumerate(mttkrps(tensor, factors)):
        np.testing.assert_allclose(product, unfolding_dot_khatri_rao(tensor, terms, mode), atol=1e-12)


def test_alternating_least_squares_makes_the_same_sweep() -> None:
    tensor = trained_kernel()
    start = np.random.default_rng(1).standard_normal((sum(tensor.shape), 8))
    given = (np.ones(8), [factor.copy() for factor in split(start, tensor.shape)])
    theirs = cp_to_tensor(parafac(tensor, 8, n_iter_max=1, init=given, tol=0))
    np.testing.assert_allclose(tensor_of(als(tensor, start, sweeps=1), tensor.shape), theirs, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("rank", [16, 64])
def test_cp_is_closer_than_parafac(rank: int) -> None:
    tensor = trained_kernel()
    theirs = cp_to_tensor(parafac(tensor, rank, n_iter_max=100, init="svd", random_state=0))
    rungs = [*[rung for rung in ladder(rank - 1) if rung >= 24], rank]
    ours = solve(tensor, [reduce(partial(climb, tensor), rungs, np.zeros((sum(tensor.shape), 0), tensor.dtype))])
    assert squared(tensor - tensor_of(ours, tensor.shape)) < squared(tensor - theirs)


@pytest.mark.parametrize("rank", [(8, 24), (32, 32)])
def test_tucker2_is_as_close_as_partial_tucker(rank: tuple[int, int]) -> None:
    tensor = trained_kernel()
    inputs, outputs = rank
    (core, factors), _ = partial_tucker(tensor, (outputs, inputs), modes=[0, 1], n_iter_max=100, tol=1e-8)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    assert hooi(tensor, rank, tolerance=1e-10)[2][-1] <= squared(tensor - theirs) * (1 + 1e-6)
