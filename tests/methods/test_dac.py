"""DAC and its reverse: depthwise and pointwise factors from the SVDs of single channels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.factors import (
    Recipe,
    check_chain,
    check_data_norm,
    check_errors,
    geometries,
    kronecker_moments,
    least_by_als,
)
from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, chain_macs, dac
from tvm_lowrank.methods.chain import as_int
from tvm_lowrank.methods.solvers import dac_solver

RECIPES = {
    "dac": Recipe(dac.max_rank, dac.chain_specs, dac.factorise),
    "dac_out": Recipe(dac.max_rank_out, dac.chain_specs_out, dac.factorise_out),
}
SPECS = {
    "3x3": ConvSpec(12, 16, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 6, (3, 5), strides=(2, 1), groups=2),
    "one channel": ConvSpec(1, 20, (3, 3)),
    "more blocks than are worked on at once": ConvSpec(4, 36, (2, 2), groups=2),
}
SPEC = SPECS["3x3"]


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("case", sorted(SPECS))
def test_errors(name: str, case: str) -> None:
    recipe, spec = RECIPES[name], SPECS[case]
    check_errors(recipe, spec, range(1, as_int(recipe.max_rank(spec))))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(RECIPES)), geometries(), st.floats(0, 1))
def test_chain(name: str, spec: ConvSpec, share: float) -> None:
    check_chain(RECIPES[name], spec, share)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_data_norm(rank: int) -> None:
    for recipe in RECIPES.values():
        check_data_norm(recipe, SPEC, rank)


@pytest.mark.parametrize("rank", [1, 3])
def test_optimal_for_the_weights(rank: int) -> None:
    weight = np.random.default_rng(3).standard_normal(SPEC.weight_shape)
    slices = weight.reshape(16, 12, 9)
    assert dac.factorise(weight, SPEC).error(rank) <= least_by_als(slices.transpose(1, 0, 2), rank) * (1 + 1e-9)
    assert dac.factorise_out(weight, SPEC).error(rank) <= least_by_als(slices, rank) * (1 + 1e-9)


def test_output_side_is_optimal_where_channels_and_taps_are_independent() -> None:
    rng, rank = np.random.default_rng(3), 2
    weight = rng.standard_normal(SPEC.weight_shape)
    moments, channels, taps = kronecker_moments(SPEC, "c", rng)
    whitened = np.linalg.cholesky(channels).T @ weight.reshape(16, 12, 9) @ np.linalg.cholesky(taps)
    assert dac.factorise_out(weight, SPEC, moments).error(rank) <= least_by_als(whitened, rank) * (1 + 1e-5)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("case", ["3x3", "3x5 in 2 groups"])
def test_every_sweep_lowers_the_error(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, rng = SPECS[case], np.random.default_rng(5)
    weight, moments = rng.standard_normal(spec.weight_shape), moments_of(columns(spec, rng))
    errors = []
    for sweeps in (0, 1, 2, 4, 8):
        monkeypatch.setattr(dac_solver, "SWEEPS", sweeps)
        errors.append(RECIPES[name].factorise(weight, spec, moments).error(2))
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_filters_of_a_single_channel_are_optimal() -> None:
    spec, rng, rank = SPECS["one channel"], np.random.default_rng(6), 3
    weight, moments = rng.standard_normal(spec.weight_shape), moments_of(columns(spec, rng))
    whitened = weight.reshape(1, 20, 9) @ np.linalg.cholesky(moments.covariance)
    assert dac.factorise(weight, spec, moments).error(rank) <= least_by_als(whitened, rank) * (1 + 1e-5)


def test_mixtures_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dac_solver, "STEPS", 100)
    spec, rng, rank = ConvSpec(5, 3, (2, 3)), np.random.default_rng(7), 2
    targets, depthwise = rng.standard_normal((3, 5, 6, 1)), rng.standard_normal((3, 1, rank, 6))
    covariance = moments_of(columns(spec, rng)).covariance[0]
    start = rng.standard_normal((3, 1, rank, 5))
    found = dac_solver.mixtures(targets, start, depthwise, covariance)
    root = np.linalg.cholesky(covariance)
    for output in range(3):
        # a mixture of the channels as a map to the whitened columns
        design = np.einsum("kp,cd->kcdp", depthwise[output, 0], np.eye(5)).reshape(rank * 5, -1) @ root
        expected = np.linalg.lstsq(design.T, targets[output].reshape(-1) @ root, rcond=None)[0]
        np.testing.assert_allclose(found[output].reshape(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_macs_are_those_of_the_notes(strides: tuple[int, int]) -> None:
    spec, rank = ConvSpec(12, 20, (3, 5), strides=strides, padding=(1, 2, 1, 2)), 4
    (rows, cols), taps = spec.output_size((9, 10)), 15
    assert chain_macs(dac.chain_specs(spec, rank), (9, 10)) == rows * cols * rank * 12 * (taps + 20)
    reverse = rank * 20 * (90 * 12 + rows * cols * taps)
    assert chain_macs(dac.chain_specs_out(spec, rank), (9, 10)) == reverse


def test_ranks_save_weights() -> None:
    for spec in (SPEC, ConvSpec(64, 32, (7, 7), groups=2), ConvSpec(256, 512, (3, 3))):
        dense = np.prod(spec.weight_shape)
        for ranks, recipe in ((dac.ranks, RECIPES["dac"]), (dac.ranks_out, RECIPES["dac_out"])):
            numbers = [as_int(rank) for rank in ranks(spec, 16)]
            assert 1 <= len(numbers) <= dac.CANDIDATES
            assert sorted(set(numbers)) == numbers and numbers[0] >= 1 and numbers[-1] <= as_int(recipe.max_rank(spec))
            for rank in numbers:
                assert sum(np.prod(part.weight_shape) for part in recipe.chain_specs(spec, rank)) < dense
    assert list(dac.ranks(ConvSpec(4, 4, (1, 1)), 16)) == []


def test_bad_input_is_named() -> None:
    weight = np.ones(SPEC.weight_shape)
    for factorise, chain_specs in ((dac.factorise, dac.chain_specs), (dac.factorise_out, dac.chain_specs_out)):
        with pytest.raises(ValueError, match="does not fit"):
            factorise(weight[1:], SPEC)
        with pytest.raises(ValueError, match="this method takes one"):
            chain_specs(SPEC, (1, 2))
