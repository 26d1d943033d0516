"""CP: the solver against its definition and against simpler ones, and the chains that it makes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from support.factors import Recipe, check_data_norm, check_errors
from support.samples import columns, moments_of
from tvm_lowrank import example
from tvm_lowrank.methods import ConvSpec, compose
from tvm_lowrank.methods.cp import CP3, CP4, CPFactors, Format
from tvm_lowrank.methods.moments import grouped, output_power
from tvm_lowrank.methods.solvers.cp_als import als, greedy, start
from tvm_lowrank.methods.solvers.cp_solver import (
    MAX_SPREAD,
    Effort,
    Normal,
    conjugate_gradients,
    correct,
    grow,
    levenberg_marquardt,
    solve,
)
from tvm_lowrank.methods.solvers.cp_terms import balanced, exact, mttkrps, norms, split, spread, tensor_of

FORMATS = {"cp4": CP4, "cp3": CP3}
SHAPES = [(5, 4, 3), (4, 5, 3, 2)]


def error_of(tensor: np.ndarray, stack: np.ndarray) -> float:
    """Relative error."""
    return float(np.linalg.norm(tensor - tensor_of(stack, tensor.shape)) / np.linalg.norm(tensor))


def starts_for(tensor: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [start(tensor, rank, rng, hosvd=hosvd) for hosvd in (True, False)]


def border_rank_tensor() -> np.ndarray:
    """Rank 3, but a limit of rank-2 tensors: no best rank-2 approximation exists."""
    a, b = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 2)))[0].T
    return sum(np.einsum("i,j,k->ijk", *modes) for modes in ((a, a, b), (a, b, a), (b, a, a)))


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dense_jacobian(shape: tuple[int, ...]) -> None:
    """Gradient and J^T J of the penalised residual, against central differences (exact for these: no even terms)."""
    rng, rank, penalty = np.random.default_rng(0), 3, 0.2
    tensor, stack = rng.standard_normal(shape), rng.standard_normal((sum(shape), rank))

    def residual(flat: np.ndarray) -> np.ndarray:
        stack = flat.reshape(-1, rank)
        terms = [tensor_of(stack[:, [r]], shape).ravel() * np.sqrt(penalty) for r in range(rank)]
        return np.concatenate([(tensor_of(stack, shape) - tensor).ravel(), *terms])

    steps = 1e-5 * np.eye(stack.size)
    jacobian = np.stack([(residual(stack.ravel() + s) - residual(stack.ravel() - s)) / 2e-5 for s in steps], axis=1)
    normal, vector = Normal(stack, shape, penalty), rng.standard_normal(stack.shape)
    np.testing.assert_allclose(normal.product(vector).ravel(), jacobian.T @ (jacobian @ vector.ravel()), rtol=1e-6)
    products = np.concatenate(list(mttkrps(tensor, split(stack, shape))))
    gradient = np.concatenate([f @ own for f, own in zip(normal.factors, normal.own, strict=True)]) - products
    np.testing.assert_allclose(gradient.ravel(), jacobian.T @ residual(stack.ravel()), rtol=1e-6, atol=1e-6)
    assert normal.power() == pytest.approx(
        np.sum(tensor_of(stack, shape) ** 2) + penalty * spread(stack, shape), rel=1e-12
    )
    dense = jacobian.T @ jacobian + 0.1 * np.eye(stack.size)
    solution, rest = conjugate_gradients(normal, 0.1, vector, 1e-9, 500)
    np.testing.assert_allclose(dense @ solution.ravel() + rest.ravel(), vector.ravel(), atol=1e-5)
    np.testing.assert_allclose(solution.ravel(), np.linalg.solve(dense, vector.ravel()), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms(shape: tuple[int, ...]) -> None:
    """The arithmetic of stacks: composition, norms, balance, and the decomposition without error."""
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((sum(shape), 3))
    letters = "ijkl"[: len(shape)]
    expected = np.einsum(",".join(f"{i}r" for i in letters) + "->" + letters, *split(stack, shape))
    np.testing.assert_allclose(tensor_of(stack, shape), expected)
    even = balanced(stack, shape)
    np.testing.assert_allclose(tensor_of(even, shape), expected)
    lengths = [np.linalg.norm(factor, axis=0) for factor in split(even, shape)]
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], (len(shape), 3)))
    assert spread(stack, shape) == pytest.approx(sum(np.sum(tensor_of(stack[:, [r]], shape) ** 2) for r in range(3)))
    stack[0 : shape[0], 1] = 0
    assert np.isfinite(balanced(stack, shape)).all()
    tensor = rng.standard_normal(shape)
    assert error_of(tensor, exact(tensor)) < 1e-14
    assert spread(exact(tensor), shape) == pytest.approx(np.sum(tensor**2))


@pytest.mark.parametrize("shape", [(12, 10, 3, 3), (12, 10, 9)])
@pytest.mark.parametrize("rank", [3, 8, 14])
def test_recovers_low_rank_tensors(shape: tuple[int, ...], rank: int) -> None:
    """Also where the rank exceeds every dimension, and terms are correlated."""
    rng = np.random.default_rng(rank)
    stack = rng.standard_normal((sum(shape), rank)) + 0.5
    tensor = tensor_of(stack, shape)
    found = solve(tensor, starts_for(tensor, rank), Effort(iterations=200))
    assert error_of(tensor, found) < 1e-4
    assert spread(found, shape) <= MAX_SPREAD * np.sum(tensor**2)


@pytest.mark.parametrize("shape", [(128, 128, 3, 3), (128, 128, 9)])
def test_gauss_newton_beats_als_and_greedy_on_a_trained_layer(shape: tuple[int, ...]) -> None:
    """Lebedev et al. 2015, table 1, for conv4 of the example: from the same starts."""
    rank, tensor = 64, example.model().conv4.weight.detach().numpy().reshape(shape)
    starts = starts_for(tensor, rank)
    found = solve(tensor, starts)
    alternating = [als(tensor, stack, sweeps=300) for stack in starts]
    deflated = greedy(tensor, rank, sweeps=15)
    best = error_of(tensor, found)
    assert best < min(error_of(tensor, stack) for stack in alternating) - 1e-3
    assert best < error_of(tensor, deflated) - 0.03
    assert spread(found, shape) <= MAX_SPREAD * np.sum(tensor**2)


def test_gauss_newton_beats_als_and_greedy_on_structured_kernels() -> None:
    """Smooth 7x7 kernels over correlated channels, like CharNet's; all have local minima, so the mean is compared."""
    errors: dict[str, list[float]] = {"solve": [], "als": [], "greedy": []}
    for seed in range(3):
        rng, axis = np.random.default_rng(seed), np.arange(7)
        bumps = np.exp(-((axis[:, None] - rng.uniform(0, 6, 40)) ** 2) / rng.uniform(0.5, 6, 40))
        waves = bumps * np.cos(axis[:, None] * rng.uniform(0, 2, 40))
        mixing = rng.standard_normal((24 + 32, 40)) * np.arange(1, 41) ** -0.5
        tensor = tensor_of(np.concatenate([mixing, bumps, waves]), (24, 32, 7, 7))
        tensor += 0.02 * tensor.std() * rng.standard_normal(tensor.shape)
        for stack in starts_for(tensor, 28):
            errors["solve"].append(error_of(tensor, solve(tensor, [stack])))
            errors["als"].append(error_of(tensor, als(tensor, stack, sweeps=300)))
        errors["greedy"].append(error_of(tensor, greedy(tensor, 28)))
    mean = {name: np.mean(values) for name, values in errors.items()}
    assert mean["solve"] < 0.99 * mean["als"]
    assert mean["solve"] < 0.7 * mean["greedy"]


def test_never_degenerate() -> None:
    """Where the infimum is reached only by diverging terms, ALS follows them and the solver does not."""
    tensor = border_rank_tensor()
    starts = starts_for(tensor, 2)
    diverged = als(tensor, starts[1], sweeps=10000)
    assert spread(diverged, tensor.shape) > 4 * MAX_SPREAD * np.sum(tensor**2)
    found = solve(tensor, starts, Effort(iterations=300))
    assert spread(found, tensor.shape) <= MAX_SPREAD * np.sum(tensor**2)
    assert error_of(tensor, found) < 0.35


@pytest.mark.parametrize("shape", SHAPES)
def test_correction_keeps_the_error_and_lowers_the_spread(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    tensor = rng.standard_normal(shape)
    stack = als(tensor, start(tensor, 5, rng, hosvd=False), sweeps=20)
    corrected = correct(tensor, stack, sweeps=50)
    assert error_of(tensor, corrected) == pytest.approx(error_of(tensor, stack), rel=1e-6)
    assert spread(corrected, shape) < 0.99 * spread(stack, shape)
    looser = correct(tensor, stack, sweeps=50, slack=0.01)
    allowed = np.sqrt(error_of(tensor, stack) ** 2 + 0.01)
    assert error_of(tensor, looser) <= allowed * (1 + 1e-6)
    assert spread(looser, shape) < spread(corrected, shape)


def test_every_step_lowers_the_penalised_error_and_is_reported() -> None:
    tensor = np.random.default_rng(6).standard_normal((9, 8, 3, 3))
    seen: list[float] = []
    stack = starts_for(tensor, 6)[0]
    levenberg_marquardt(tensor, stack, iterations=40, report=lambda _, error: seen.append(error))
    assert len(seen) > 5
    assert all(after <= before for before, after in pairwise(seen))
    seen.clear()
    als(tensor, stack, sweeps=40, report=lambda _, error: seen.append(error))
    assert all(after <= before + 1e-6 for before, after in pairwise(seen))


def test_single_precision_does_as_well() -> None:
    tensor = example.model().conv2.weight.detach().numpy()
    starts = starts_for(tensor.astype(float), 24)
    double = solve(tensor.astype(float), starts, Effort(iterations=40))
    single = solve(tensor, [stack.astype(np.float32) for stack in starts], Effort(iterations=40))
    assert single.dtype == np.float32
    assert error_of(tensor, single) == pytest.approx(error_of(tensor, double), rel=2e-3)


def test_dead_channels_and_zero_weights() -> None:
    tensor = np.random.default_rng(7).standard_normal((6, 5, 3, 3))
    tensor[:, 2] = tensor[4] = 0
    assert np.isfinite(solve(tensor, starts_for(tensor, 30), Effort(iterations=20))).all()
    nothing = np.zeros((4, 3, 3, 3))
    stack = solve(nothing, starts_for(nothing, 4))
    assert not tensor_of(stack, nothing.shape).any()
    assert np.isfinite(grow(nothing, stack, 6, np.random.default_rng(0))).all()


GEOMETRIES = {
    "strides and asymmetric padding": ConvSpec(6, 8, (3, 5), strides=(2, 1), padding=(1, 0, 2, 3)),
    "dilation": ConvSpec(5, 4, (3, 3), dilation=(2, 3), padding=(2, 3, 2, 3)),
    "groups": ConvSpec(8, 6, (3, 2), strides=(1, 2), padding=(1, 1, 0, 1), groups=2),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("case", sorted(GEOMETRIES))
@pytest.mark.parametrize("whitened", [False, True])
def test_chain_computes_the_convolution_of_its_kernel(name: str, case: str, whitened: bool) -> None:
    form, spec, rng = FORMATS[name], GEOMETRIES[case], np.random.default_rng(8)
    weight = rng.standard_normal(spec.weight_shape)
    moments = moments_of(columns(spec, rng, 500)) if whitened else None
    factors = form.factorise(weight, spec, moments)
    specs, weights = form.chain_specs(spec, 3), factors.weights(3)
    x = torch.from_numpy(rng.standard_normal((2, spec.in_channels, 11, 12)))
    expected = convolve(x, spec, compose(specs, weights, spec.groups))
    actual = x
    for part, array in zip(specs, weights, strict=True):
        actual = convolve(actual, part, array)
    torch.testing.assert_close(actual, expected)
    assert form.applies(spec)
    assert tuple(actual.shape[2:]) == spec.output_size((11, 12))
    # and with as many terms as there are in the worst case it is the site's own
    highest = form.max_rank(spec)
    assert factors.error(highest) <= 1e-6 * output_power(grouped(weight, spec), moments)
    whole = compose(form.chain_specs(spec, highest), factors.weights(highest), spec.groups)
    np.testing.assert_allclose(whole, weight, atol=1e-3)


def convolve(x: torch.Tensor, spec: ConvSpec, weight: np.ndarray) -> torch.Tensor:
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    kernel = torch.from_numpy(np.ascontiguousarray(weight))
    return F.conv2d(padded, kernel, stride=spec.strides, dilation=spec.dilation, groups=spec.groups)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_whitening_and_refit_lower_the_error_on_held_out_columns(form: Format) -> None:
    for rank in (6, 16):
        check_data_norm(Recipe(form.max_rank, form.chain_specs, form.factorise), ConvSpec(10, 12, (3, 3)), rank)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_predicted_errors_are_the_true_ones(form: Format) -> None:
    spec = ConvSpec(8, 6, (3, 2), strides=(2, 1), groups=2)
    check_errors(Recipe(form.max_rank, form.chain_specs, form.factorise), spec, [1, 5])


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("with_moments", [False, True])
def test_errors_fall_with_the_rank_in_whatever_order_it_is_asked_for(name: str, with_moments: bool) -> None:
    form, spec = FORMATS[name], ConvSpec(16, 12, (3, 3), groups=2)
    rng = np.random.default_rng(10)
    weight = rng.standard_normal(spec.weight_shape)
    given = moments_of(columns(spec, rng)) if with_moments else None
    power = output_power(grouped(weight, spec), given)
    ranks = [2, 3, 4, 6, 8, 12]
    rising = form.factorise(weight, spec, given)
    errors = [rising.error(rank) for rank in ranks]
    assert all(after <= before + 1e-6 * power for before, after in pairwise([power, *errors]))
    falling: CPFactors = form.factorise(weight, spec, given)
    assert [falling.error(rank) for rank in (12, 6)] == [errors[ranks.index(rank)] for rank in (12, 6)]
    for solution in rising.solved.values():
        for stack, tensor in zip(solution.stacks, rising.tensors, strict=True):
            assert spread(stack, tensor.shape) <= MAX_SPREAD
            assert np.isfinite(norms(stack, tensor.shape)).all()


def test_geometry() -> None:
    spec = ConvSpec(512, 512, (3, 3))
    assert CP4.max_rank(spec) == CP3.max_rank(spec) == 4608
    assert CP4.parity(spec) == 512 * 512 * 9 // (512 + 512 + 3 + 3)
    ranks = CP4.ranks(spec, 16)
    assert ranks == [96, 128, 192, 256, 384, 512, 768, 1024]
    assert CP4.ranks(ConvSpec(128, 128, (3, 3), groups=4), 8) == [8, 16, 24, 32, 48, 64]
    strided = CP4.chain_specs(ConvSpec(8, 6, (3, 5), strides=(2, 3), padding=(1, 2, 3, 4), dilation=(2, 1)), 10)
    assert [part.kernel for part in strided] == [(1, 1), (3, 1), (1, 5), (1, 1)]
    assert [part.strides for part in strided] == [(1, 1), (2, 1), (1, 3), (1, 1)]
    assert [part.groups for part in strided] == [1, 10, 10, 1]
    assert not CP4.applies(ConvSpec(4, 4, (1, 3)))
    assert CP3.applies(ConvSpec(4, 4, (1, 3)))
    assert not CP3.applies(ConvSpec(4, 4, (1, 1)))
    assert not any(form.applies(ConvSpec(4, 4, (3, 3), groups=4)) for form in (CP3, CP4))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_bad_input_is_named(form: Format) -> None:
    spec = ConvSpec(4, 4, (3, 3))
    weight = np.ones(spec.weight_shape)
    with pytest.raises(ValueError, match="does not fit"):
        form.factorise(weight[1:], spec)
    highest = form.max_rank(spec)
    for rank in (0, highest + 1):
        with pytest.raises(ValueError, match=rf"rank {rank} .* outside 1\.\.{highest}"):
            form.factorise(weight, spec).error(rank)
    with pytest.raises(ValueError, match="takes one"):
        form.factorise(weight, spec).error((2, 3))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("groups", [1, 2])
def test_starts_near_a_similar_kernel(form: Format, groups: int) -> None:
    rng = np.random.default_rng(0)
    spec = ConvSpec(12, 16, (3, 3), groups=groups)
    weight = rng.standard_normal(spec.weight_shape)
    similar = weight + 0.1 * rng.standard_normal(spec.weight_shape)
    rank = 6
    known = form.factorise(weight, spec).weights(rank)
    cold, warm = form.factorise(similar, spec), form.factorise(similar, spec).starting_from(known)
    assert warm.error(rank) < 1.05 * cold.error(rank)
    assert warm.error(rank + 1) == cold.error(rank + 1)  # of another rank: nothing to start from
