"""The separable decomposition in its other order, 1 x kw first."""

from __future__ import annotations

from dataclasses import replace

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
from tvm_lowrank.methods import ConvSpec, Moments, chain_macs, spatial

RECIPE = Recipe(spatial.max_rank_rows, spatial.chain_specs_rows, spatial.factorise_rows)
SPECS = {
    "3x3": ConvSpec(6, 8, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 6, (3, 5), strides=(2, 1), groups=2),
    "wide": ConvSpec(2, 20, (3, 2)),
}
SPEC = SPECS["3x3"]


@pytest.mark.parametrize("case", sorted(SPECS))
def test_errors(case: str) -> None:
    check_errors(RECIPE, SPECS[case], range(1, spatial.max_rank_rows(SPECS[case])))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(), st.floats(0, 1))
def test_chain(spec: ConvSpec, share: float) -> None:
    check_chain(RECIPE, spec, share)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_data_norm(rank: int) -> None:
    check_data_norm(RECIPE, SPEC, rank)


@pytest.mark.parametrize("whitened", [False, True])
def test_it_is_the_other_order_of_the_transposed_kernel(whitened: bool) -> None:
    spec = SPECS["3x5 in 2 groups"]
    turned = replace(spec, kernel=spec.kernel[::-1], strides=spec.strides[::-1])
    rng = np.random.default_rng(5)
    weight = rng.standard_normal(spec.weight_shape)
    moments = transposed = None
    if whitened:
        moments = moments_of(columns(spec, rng))
        order = np.arange(4 * 3 * 5).reshape(4, 3, 5).swapaxes(1, 2).reshape(-1)
        transposed = Moments(moments.mean[:, order], moments.covariance[:, order][:, :, order])
    rows = spatial.factorise_rows(weight, spec, moments)
    cols = spatial.factorise(np.ascontiguousarray(weight.swapaxes(2, 3)), turned, transposed)
    for rank in range(1, spatial.max_rank_rows(spec) + 1):
        assert rows.error(rank) == pytest.approx(cols.error(rank), rel=1e-6, abs=1e-6 * rows.power)
    for ours, theirs in zip(rows.weights(3), cols.weights(3), strict=True):
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs.swapaxes(2, 3)), atol=1e-6)


def test_optimal_for_the_weights_and_where_the_axes_are_independent() -> None:
    rng, rank = np.random.default_rng(3), 3
    weight = rng.standard_normal(SPEC.weight_shape)
    slices = weight.transpose(0, 1, 3, 2).reshape(8, 18, 3)  # (c, j) by i
    moments, first, second = kronecker_moments(SPEC, "cj", rng)
    whitened = np.linalg.cholesky(first).T @ slices @ np.linalg.cholesky(second)
    for target, given_moments in ((slices, None), (whitened, moments)):
        least = least_by_als(target.transpose(1, 2, 0).reshape(1, 18, -1), rank)
        assert spatial.factorise_rows(weight, SPEC, given_moments).error(rank) <= least * (1 + 1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2)])
def test_macs_are_those_of_the_notes(strides: tuple[int, int]) -> None:
    """The notes' formula with the axes exchanged."""
    spec, rank = ConvSpec(12, 20, (3, 5), strides=strides, padding=(1, 2, 1, 2)), 4
    rows, cols = spec.output_size((9, 10))
    expected = rank * (12 * 5 * 9 * cols + 20 * 3 * rows * cols)
    assert chain_macs(spatial.chain_specs_rows(spec, rank), (9, 10)) == expected


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        spatial.factorise_rows(np.ones((8, 6, 3, 2)), SPEC)
    with pytest.raises(ValueError, match="this method takes one"):
        spatial.chain_specs_rows(SPEC, (1, 2))
