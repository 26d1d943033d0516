"""Channel decomposition on the input side."""

from __future__ import annotations

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
from tvm_lowrank.methods import ConvSpec, chain_macs, channel_in

RECIPE = Recipe(channel_in.max_rank, channel_in.chain_specs, channel_in.factorise)
SPECS = {
    "3x3": ConvSpec(12, 16, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 6, (3, 5), strides=(2, 1), groups=2),
    "one output": ConvSpec(20, 1, (3, 2)),
}
SPEC = SPECS["3x3"]


@pytest.mark.parametrize("case", sorted(SPECS))
def test_errors(case: str) -> None:
    check_errors(RECIPE, SPECS[case], range(1, channel_in.max_rank(SPECS[case])))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(), st.floats(0, 1))
def test_chain(spec: ConvSpec, share: float) -> None:
    check_chain(RECIPE, spec, share)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_data_norm(rank: int) -> None:
    check_data_norm(RECIPE, SPEC, rank)


def test_optimal_for_the_weights_and_where_channels_and_taps_are_independent() -> None:
    rng, rank = np.random.default_rng(3), 3
    weight = rng.standard_normal(SPEC.weight_shape)
    slices = weight.reshape(16, 12, 9)
    moments, channels, taps = kronecker_moments(SPEC, "c", rng)
    whitened = np.linalg.cholesky(channels).T @ slices @ np.linalg.cholesky(taps)
    for target, given_moments in ((slices, None), (whitened, moments)):
        least = least_by_als(target.transpose(1, 2, 0).reshape(1, 12, -1), rank)
        assert channel_in.factorise(weight, SPEC, given_moments).error(rank) <= least * (1 + 1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_macs_are_those_of_the_notes(strides: tuple[int, int]) -> None:
    spec, rank = ConvSpec(12, 20, (3, 5), strides=strides, padding=(1, 2, 1, 2)), 4
    rows, cols = spec.output_size((9, 10))
    expected = 90 * 12 * rank + rows * cols * rank * 15 * 20
    assert chain_macs(channel_in.chain_specs(spec, rank), (9, 10)) == expected


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        channel_in.factorise(np.ones((16, 12, 3, 2)), SPEC)
    with pytest.raises(ValueError, match="this method takes one"):
        channel_in.chain_specs(SPEC, (1, 2))
