"""Block terms: recovered where they are, better than Tucker-2 at equal cost, and an error that only falls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from support.samples import columns, moments_of
from support.tucker import centred_error, check_chain_computes_its_kernel, conv6
from tvm_lowrank.methods import ConvSpec, btd, chain_macs, compose, tucker2
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import grouped, output_power
from tvm_lowrank.methods.solvers import btd_solver, tucker2_solver

SPECS = {
    "3x3": ConvSpec(8, 12, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 12, (3, 5), strides=(2, 1), padding=(2, 1, 0, 3), dilation=(1, 2), groups=2),
}


def planted(rng: np.random.Generator, out: int, inner: int, rank: tuple[int, int, int]) -> np.ndarray:
    """A sum of block terms, OIHW with a 3 x 3 kernel."""
    s, t, blocks = rank[0] // rank[2], rank[1] // rank[2], rank[2]
    factors = [rng.standard_normal((blocks, *shape)) for shape in ((out, t), (t, s, 3, 3), (inner, s))]
    return np.einsum("bnt,btsij,bcs->ncij", *factors, optimize=True)


def test_exact_with_one_full_block() -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(0)
    weight = rng.standard_normal(spec.weight_shape)
    for moments in (None, moments_of(columns(spec, rng))):
        factors = btd.factorise(weight, spec, moments)
        kernel = compose(btd.chain_specs(spec, (8, 12, 1)), factors.weights((8, 12, 1)))
        np.testing.assert_allclose(kernel, weight, atol=1e-4)
        assert factors.error((8, 12, 1)) <= 1e-6 * output_power(grouped(weight, spec), moments)


def test_recovers_planted_blocks() -> None:
    rng = np.random.default_rng(1)
    for rank in ((4, 6, 2), (9, 6, 3), (12, 16, 4)):
        tensor = planted(rng, 24, 16, rank).reshape(24, 16, 9)
        found = btd_solver.solve(tensor, rank, starts=6, trial=150, sweeps=1500, tolerance=1e-6)
        assert np.sum((tensor - found.kernel()) ** 2) < 1e-4 * np.sum(tensor**2)
        wrong = btd_solver.solve(tensor, (rank[0] // rank[2], rank[1] // rank[2], 1))
        assert wrong.errors[-1] > 0.05 * np.sum(tensor**2)


@pytest.mark.parametrize("rank", [(8, 12, 4), (12, 24, 2), (20, 30, 10), (6, 6, 1)])
def test_errors_fall_and_are_the_true_ones(rank: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(2)
    tensor = rng.standard_normal((24, 16, 9))
    power = np.sum(tensor**2)
    starts = [btd_solver.deflate(tensor, rank), btd_solver.scatter(tensor, rank, 0)]
    starts.append(btd_solver.adapt(tensor, btd_solver.solve(tensor, (10 * rank[2], 2 * rank[2], rank[2])), rank))
    for start in starts:
        assert start.errors[-1] == pytest.approx(np.sum((tensor - start.kernel()) ** 2))
        found = btd_solver.iterate(tensor, start, sweeps=60)
        assert all(after <= before + 1e-12 * power for before, after in pairwise(found.errors))
        assert found.errors[-1] == pytest.approx(np.sum((tensor - found.kernel()) ** 2))
        for factors in (found.outputs, found.inputs):
            gram = factors.transpose(0, 2, 1) @ factors
            np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=1e-10)


def test_one_block_is_tucker2() -> None:
    tensor = np.random.default_rng(3).standard_normal((24, 16, 9))
    hooi = tucker2_solver.hooi(tensor, (6, 9), tolerance=1e-9, iterations=500)[2][-1]
    assert btd_solver.solve(tensor, (6, 9, 1), tolerance=1e-7, sweeps=500).errors[-1] == pytest.approx(hooi, rel=1e-3)


def test_four_blocks_beat_tucker2_at_equal_macs() -> None:
    spec, rng = ConvSpec(16, 24, (3, 3), padding=(1, 1, 1, 1)), np.random.default_rng(4)
    weight = planted(rng, 24, 16, (12, 16, 4))
    weight += 0.3 * weight.std() * rng.standard_normal(weight.shape)
    for rank, rival in (((12, 16, 4), (8, 10)), ((8, 12, 4), (6, 8))):
        macs = chain_macs(btd.chain_specs(spec, rank), (8, 8))
        assert macs <= chain_macs(tucker2.chain_specs(spec, rival), (8, 8))
        assert btd.factorise(weight, spec).error(rank) < 0.95 * tucker2.factorise(weight, spec).error(rival)


@pytest.mark.parametrize("case", sorted(SPECS))
@pytest.mark.parametrize("whitened", [False, True])
def test_chain_computes_its_kernel_and_errors_are_true(case: str, whitened: bool) -> None:
    spec, rng = SPECS[case], np.random.default_rng(5)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng)
    moments = moments_of(x) if whitened else None
    factors = btd.factorise(weight, spec, moments)
    for rank in ((4, 6, 2), (2, 4, 2), (4, 4, 4)):
        specs, weights = btd.chain_specs(spec, rank), factors.weights(rank)
        assert specs[1].groups == spec.groups * rank[2]
        check_chain_computes_its_kernel(spec, specs, weights)
        missing = weight - compose(specs, weights, spec.groups)
        assert factors.error(rank) == pytest.approx(output_power(grouped(missing, spec), moments))
        if moments is not None:
            assert centred_error(spec, missing, x) == pytest.approx(factors.error(rank), rel=1e-6)


@pytest.mark.parametrize("case", sorted(SPECS))
def test_whitening_and_refit_lower_the_error_on_new_columns(case: str) -> None:
    spec, rng = SPECS[case], np.random.default_rng(6)
    weight = rng.standard_normal(spec.weight_shape)
    x, held_out = np.split(columns(spec, rng, 8000), 2, axis=1)
    moments, fresh = moments_of(x), moments_of(held_out)
    rank = (4, 4, 2)
    specs = btd.chain_specs(spec, rank)

    def error(weights: tuple[np.ndarray, ...]) -> float:
        return output_power(grouped(weight - compose(specs, weights, spec.groups), spec), fresh)

    plain = btd.factorise(weight, spec).weights(rank)
    whitened = btd.factorise(weight, spec, moments).weights(rank)
    refit = refit_last(weight, spec, specs, plain, moments)
    assert error(whitened) < error(refit) < error(plain)
    assert error(refit_last(weight, spec, specs, whitened, moments)) == pytest.approx(error(whitened), rel=1e-4)


def test_a_solved_rank_is_a_start_for_others() -> None:
    spec, rng = ConvSpec(16, 24, (3, 3)), np.random.default_rng(7)
    weight = rng.standard_normal(spec.weight_shape)
    warm = btd.factorise(weight, spec)
    for rank in ((8, 12, 4), (12, 16, 4), (4, 8, 4), (8, 8, 2)):
        cold = btd.factorise(weight, spec).error(rank)
        assert warm.error(rank) == pytest.approx(cold, rel=0.03)
        assert warm.weights(rank) is warm.weights(rank)


def test_dead_channels_and_few_images() -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(8)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng, 20) * 1e-3
    x[:, :, :9] = 0
    moments = moments_of(x)
    factors = btd.factorise(weight, spec, moments)
    for rank in ((2, 2, 2), (8, 12, 4), (8, 12, 1)):
        assert all(np.isfinite(part).all() and np.abs(part).max() < 1e3 for part in factors.weights(rank))
        assert factors.error(rank) < output_power(grouped(weight, spec), moments)


@pytest.mark.parametrize("dead", ["inputs", "weights"])
def test_nothing_to_approximate(dead: str) -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(9)
    weight = rng.standard_normal(spec.weight_shape) * (dead == "inputs")
    moments = moments_of(columns(spec, rng, 100) * (dead == "weights"))
    for factors in (btd.factorise(weight, spec, moments), btd.factorise(0 * weight, spec)):
        assert factors.error((4, 6, 2)) == 0
        assert all(np.isfinite(part).all() for part in factors.weights((4, 6, 2)))


def test_candidates_divide_into_blocks_of_whole_lanes_and_are_cheaper() -> None:
    for spec in (ConvSpec(256, 256, (3, 3)), ConvSpec(128, 256, (3, 3), strides=(2, 2)), ConvSpec(64, 32, (5, 5))):
        found = btd.ranks(spec, 8)
        assert 4 <= len(found) <= 12 and len(set(found)) == len(found)
        limits = btd.max_rank(spec)
        for rank in found:
            assert isinstance(rank, tuple)
            inner, outer, blocks = rank
            assert inner % (8 * blocks) == 0 and outer % (8 * blocks) == 0
            assert all(0 < n <= limit for n, limit in zip(rank, limits, strict=True))
            assert chain_macs(btd.chain_specs(spec, rank), (32, 32)) < spec.macs((32, 32))
    assert list(btd.ranks(ConvSpec(8, 8, (3, 3)), 16)) == []


def test_macs_are_those_of_the_paper() -> None:
    """VGG-16's conv5 at (224, 224, 4): 6.9 times fewer."""
    spec = ConvSpec(512, 512, (3, 3), padding=(1, 1, 1, 1))
    ratio = spec.macs((14, 14)) / chain_macs(btd.chain_specs(spec, (224, 224, 4)), (14, 14))
    assert ratio == pytest.approx(6.9, abs=0.05)


def test_other_ranks_are_refused() -> None:
    spec = SPECS["3x3"]
    factors = btd.factorise(np.ones(spec.weight_shape), spec)
    for call in (lambda rank: btd.chain_specs(spec, rank), factors.weights, factors.error):
        with pytest.raises(ValueError, match="4 blocks do not divide the 6 and 8 channels"):
            call((6, 8, 4))
        with pytest.raises(ValueError, match="is not a tuple of 3 numbers"):
            call((6, 8))


def test_a_trained_layer_has_blocks() -> None:
    """On the example's sixth convolution, too, blocks keep more than Tucker-2 of the same cost."""
    weight, spec = conv6(), ConvSpec(256, 256, (3, 3), padding=(1, 1, 1, 1))
    rank, rival = (128, 128, 4), (80, 80)
    macs = [chain_macs(module.chain_specs(spec, r), (8, 8)) for module, r in ((btd, rank), (tucker2, rival))]
    assert macs[0] == pytest.approx(macs[1], rel=0.05)
    tensor = weight.reshape(256, 256, 9).astype(float)
    blocks = btd_solver.solve(tensor, rank, starts=1, sweeps=10).errors[-1]
    assert blocks < 0.9 * tucker2.factorise(weight, spec).error(rival)
