"""Tucker-2: exact at full rank, optimal given its first factor, better the more it knows of the inputs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from support.samples import columns, moments_of
from support.tucker import centred_error, check_chain_computes_its_kernel, conv6
from tvm_lowrank.methods import ConvSpec, Moments, chain_macs, compose, tucker2
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import grouped, output_power
from tvm_lowrank.methods.solvers import tucker2_solver

SPECS = {
    "3x3": ConvSpec(6, 8, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 12, (3, 5), strides=(2, 1), padding=(2, 1, 0, 3), dilation=(1, 2), groups=2),
    "wide": ConvSpec(2, 20, (3, 3)),
    "1x1": ConvSpec(9, 6, (1, 1)),
}


@pytest.mark.parametrize("case", sorted(SPECS))
@pytest.mark.parametrize("whitened", [False, True])
def test_exact_at_full_rank_and_errors_are_the_true_ones(case: str, whitened: bool) -> None:
    spec, rng = SPECS[case], np.random.default_rng(1)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng)
    moments = moments_of(x) if whitened else None
    factors = tucker2.factorise(weight, spec, moments)
    highest = tucker2.max_rank(spec)
    np.testing.assert_allclose(
        compose(tucker2.chain_specs(spec, highest), factors.weights(highest), spec.groups), weight, atol=1e-4
    )
    power = output_power(grouped(weight, spec), moments)
    assert factors.error(highest) <= 1e-6 * power
    for rank in {(1, 1), (highest[0] // 2, highest[1]), (highest[0], highest[1] // 2)}:
        specs, weights = tucker2.chain_specs(spec, rank), factors.weights(rank)
        check_chain_computes_its_kernel(spec, specs, weights)
        missing = weight - compose(specs, weights, spec.groups)
        assert factors.error(rank) == pytest.approx(output_power(grouped(missing, spec), moments), abs=1e-6 * power)
        assert 0 < factors.error(rank) < power
        if moments is not None:
            found = centred_error(spec, missing, x)
            assert found == pytest.approx(factors.error(rank), rel=1e-6, abs=1e-6 * power)


def test_recovers_a_tucker_tensor_under_noise() -> None:
    spec, rng = ConvSpec(20, 24, (3, 3)), np.random.default_rng(2)
    core = rng.standard_normal((5, 4, 3, 3))
    weight = np.einsum("nt,tsij,cs->ncij", rng.standard_normal((24, 5)), core, rng.standard_normal((20, 4)))
    assert tucker2.factorise(weight, spec).error((4, 5)) <= 1e-14 * np.sum(weight**2)
    noise = 0.1 * rng.standard_normal(weight.shape)
    assert tucker2.factorise(weight + noise, spec).error((4, 5)) < np.sum(noise**2)


@pytest.mark.parametrize("rank", [(3, 3), (8, 5), (12, 16)])
def test_hooi_is_no_worse_than_hosvd_or_random_starts_and_never_rises(rank: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    tensor = rng.standard_normal((24, 16, 9)) * np.geomspace(1, 0.1, 24)[:, None, None]
    power = np.sum(tensor**2)
    outputs = tucker2_solver.leading(tensor.reshape(24, -1) @ tensor.reshape(24, -1).T, rank[1])[1]
    by_input = tensor.transpose(1, 0, 2).reshape(16, -1)
    inputs = tucker2_solver.leading(by_input @ by_input.T, rank[0])[1]
    hosvd = power - np.sum(np.einsum("ncp,nt,cs->tsp", tensor, outputs, inputs) ** 2)
    p, a, errors = tucker2_solver.hooi(tensor, rank, tolerance=1e-12, iterations=500)
    assert all(after <= before + 1e-12 * power for before, after in pairwise([hosvd, *errors]))
    np.testing.assert_allclose(p.T @ p, np.eye(rank[1]), atol=1e-10)
    np.testing.assert_allclose(a.T @ a, np.eye(rank[0]), atol=1e-10)
    scattered = [
        tucker2_solver.hooi(tensor, rank, np.linalg.qr(rng.standard_normal((24, rank[1])))[0], tolerance=1e-12)[2][-1]
        for _ in range(5)
    ]
    assert errors[-1] <= np.median(scattered) * (1 + 1e-4)


def test_regression_is_optimal_given_the_first_factor() -> None:
    """No change of the core and the last factor together lowers the expected error."""
    spec, rng, rank = SPECS["3x3"], np.random.default_rng(4), (3, 4)
    weight = rng.standard_normal(spec.weight_shape)
    moments = moments_of(columns(spec, rng))
    factors = tucker2.factorise(weight, spec, moments)
    specs, (first, core, last) = tucker2.chain_specs(spec, rank), factors.weights(rank)

    def error(core: np.ndarray, last: np.ndarray) -> float:
        return output_power(grouped(weight - compose(specs, (first, core, last)), spec), moments)

    least = factors.error(rank)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            steps = (size * rng.standard_normal(part.shape) for part in (core, last))
            assert error(*(part + step for part, step in zip((core, last), steps, strict=True))) > least
    for _ in range(3):  # alternating least squares from random starts finds nothing better
        last = rng.standard_normal(last.shape)
        for _ in range(100):
            flat = last[:, :, 0, 0]
            core = np.einsum("tn,nkij->tkij", np.linalg.pinv(flat), best_full_core(weight, spec, first, moments))
            *_, last = refit_last(weight, spec, specs, (first, core, last), moments)
        assert error(core, last) >= least * (1 - 1e-9)


def best_full_core(weight: np.ndarray, spec: ConvSpec, first: np.ndarray, moments: Moments) -> np.ndarray:
    """The full-rank regression of the outputs on the first convolution's features: (N, R3, kh, kw)."""
    inputs, out = first[:, :, 0, 0].T, spec.out_channels
    last, core, _ = tucker2_solver.regress(grouped(weight, spec)[0], inputs, out, moments.covariance[0])
    return np.einsum("nt,tkp->nkp", last, core).reshape(out, -1, *spec.kernel)


@pytest.mark.parametrize("case", ["3x3", "3x5 in 2 groups"])
def test_whitening_and_regression_lower_the_error_on_new_columns(case: str) -> None:
    spec, rng = SPECS[case], np.random.default_rng(5)
    weight = rng.standard_normal(spec.weight_shape)
    x, held_out = np.split(columns(spec, rng, 8000), 2, axis=1)
    moments, fresh = moments_of(x), moments_of(held_out)
    plain, whitened = tucker2.factorise(weight, spec), tucker2.factorise(weight, spec, moments)
    for rank in ((2, 3), (3, 3)):
        specs = tucker2.chain_specs(spec, rank)

        def error(weights: tuple[np.ndarray, ...], specs: tuple[ConvSpec, ...] = specs) -> float:
            return output_power(grouped(weight - compose(specs, weights, spec.groups), spec), fresh)

        refit = refit_last(weight, spec, specs, plain.weights(rank), moments)
        assert error(whitened.weights(rank)) < error(refit) < error(plain.weights(rank))
        again = refit_last(weight, spec, specs, whitened.weights(rank), moments)
        assert error(again) == pytest.approx(error(whitened.weights(rank)), rel=1e-4)


def test_a_solved_rank_is_a_start_for_others() -> None:
    spec, rng = ConvSpec(16, 24, (3, 3)), np.random.default_rng(6)
    weight = rng.standard_normal(spec.weight_shape)
    warm = tucker2.factorise(weight, spec)
    for rank in ((8, 12), (6, 16), (4, 6), (12, 20)):
        cold = tucker2.factorise(weight, spec).error(rank)
        assert warm.error(rank) == pytest.approx(cold, rel=0.02)
        assert warm.weights(rank) is warm.weights(rank)


def test_channels_between_the_convolutions_are_balanced() -> None:
    spec, rng = SPECS["3x5 in 2 groups"], np.random.default_rng(7)
    factors = tucker2.factorise(rng.standard_normal(spec.weight_shape), spec, moments_of(columns(spec, rng)))
    first, core, last = factors.weights((2, 3))
    made = np.linalg.norm(core.reshape(6, -1), axis=1)
    read = np.linalg.norm(last.reshape(2, 6, 3).transpose(0, 2, 1).reshape(6, 6), axis=1)
    np.testing.assert_allclose(made, read, rtol=1e-3)
    made = np.linalg.norm(first.reshape(4, -1), axis=1)
    read = np.linalg.norm(core.reshape(2, 3, 2, -1).transpose(0, 2, 1, 3).reshape(4, -1), axis=1)
    np.testing.assert_allclose(made, read, rtol=0.05)


def test_dead_channels_and_few_images() -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(8)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng, 20) * 1e-3
    x[:, :, :9] = 0
    moments = moments_of(x)
    factors = tucker2.factorise(weight, spec, moments)
    for rank in ((1, 1), (3, 4), (6, 8)):
        assert all(np.isfinite(part).all() and np.abs(part).max() < 1e3 for part in factors.weights(rank))
    assert factors.error((6, 8)) <= 1e-3 * output_power(grouped(weight, spec), moments)


@pytest.mark.parametrize("dead", ["inputs", "weights"])
def test_nothing_to_approximate(dead: str) -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(9)
    weight = rng.standard_normal(spec.weight_shape) * (dead == "inputs")
    moments = moments_of(columns(spec, rng, 100) * (dead == "weights"))
    for factors in (tucker2.factorise(weight, spec, moments), tucker2.factorise(0 * weight, spec)):
        assert factors.error((3, 4)) == 0
        assert all(np.isfinite(part).all() for part in factors.weights((3, 4)))


def test_candidates_are_multiples_of_the_lanes_and_cheaper() -> None:
    for spec in (ConvSpec(256, 256, (3, 3)), ConvSpec(128, 256, (3, 3), strides=(2, 2)), ConvSpec(64, 32, (5, 5))):
        found = tucker2.ranks(spec, 8)
        assert 4 <= len(found) <= 12 and len(set(found)) == len(found)
        limits = tucker2.max_rank(spec)
        for rank in found:
            assert isinstance(rank, tuple)
            assert all(n % 8 == 0 and 0 < n <= limit for n, limit in zip(rank, limits, strict=True))
            assert chain_macs(tucker2.chain_specs(spec, rank), (32, 32)) < spec.macs((32, 32))
    assert list(tucker2.ranks(SPECS["wide"], 16)) == []


def test_macs_are_those_of_the_notes() -> None:
    spec = ConvSpec(6, 8, (3, 5), strides=(2, 1), padding=(1, 2, 1, 2))
    height, width = spec.output_size((9, 10))
    expected = 90 * 6 * 3 + height * width * (3 * 4 * 15 + 4 * 8)
    assert chain_macs(tucker2.chain_specs(spec, (3, 4)), (9, 10)) == expected


@pytest.mark.parametrize("rank", [3, (3,), (3, 4, 2)])
def test_other_ranks_are_refused(rank: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not a tuple of 2 numbers"):
        tucker2.chain_specs(SPECS["3x3"], rank)
    with pytest.raises(ValueError, match="is not a tuple of 2 numbers"):
        tucker2.factorise(np.ones(SPECS["3x3"].weight_shape), SPECS["3x3"]).weights(rank)


def test_a_trained_layer() -> None:
    """Half the MACs of the example's sixth convolution keep most of its weights."""
    weight, spec = conv6(), ConvSpec(256, 256, (3, 3), padding=(1, 1, 1, 1))
    factors = tucker2.factorise(weight, spec)
    power = np.sum(weight**2)
    errors = [factors.error(rank) / power for rank in ((64, 64), (112, 112), (160, 160))]
    assert errors == pytest.approx([0.527, 0.328, 0.188], abs=0.003)
    half = weight - compose(tucker2.chain_specs(spec, (112, 112)), factors.weights((112, 112)))
    assert np.sum(half**2) / power == pytest.approx(errors[1])
