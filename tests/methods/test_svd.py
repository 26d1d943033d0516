"""The SVD of 1 x 1 convolutions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.factors import Recipe, check_chain, check_data_norm, check_errors, geometries, least_by_als
from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, chain_macs, svd

RECIPE = Recipe(svd.max_rank, svd.chain_specs, svd.factorise)
SPECS = {
    "narrow": ConvSpec(20, 12, (1, 1)),
    "wide": ConvSpec(8, 30, (1, 1), strides=(2, 2)),
    "3 groups": ConvSpec(18, 12, (1, 1), groups=3),
}


@pytest.mark.parametrize("case", sorted(SPECS))
def test_errors(case: str) -> None:
    check_errors(RECIPE, SPECS[case], range(1, svd.max_rank(SPECS[case])))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(((1, 1),)), st.floats(0, 1))
def test_chain(spec: ConvSpec, share: float) -> None:
    check_chain(RECIPE, spec, share)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_data_norm(rank: int) -> None:
    check_data_norm(RECIPE, SPECS["narrow"], rank)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("case", sorted(SPECS))
def test_optimal(case: str, whitened: bool) -> None:
    """In either norm, nothing that ALS finds from random starts comes closer."""
    spec, rng, rank = SPECS[case], np.random.default_rng(3), 2
    weight = rng.standard_normal(spec.weight_shape)
    moments = moments_of(columns(spec, rng)) if whitened else None
    target = weight.reshape(spec.groups, spec.out_channels // spec.groups, -1)
    if moments is not None:
        target = target @ np.linalg.cholesky(moments.covariance)
    assert svd.factorise(weight, spec, moments).error(rank) <= least_by_als(target, rank) * (1 + 1e-9)


def test_strides_come_first() -> None:
    spec, rank = ConvSpec(12, 20, (1, 1), strides=(2, 2)), 4
    first, second = svd.chain_specs(spec, rank)
    assert (first.strides, second.strides) == ((2, 2), (1, 1))
    assert chain_macs((first, second), (9, 10)) == 5 * 5 * rank * (12 + 20)


def test_applies_to_pointwise_convolutions_that_mix_channels() -> None:
    assert svd.applies(ConvSpec(8, 8, (1, 1), groups=2)) and svd.applies(ConvSpec(1, 8, (1, 1)))
    assert not svd.applies(ConvSpec(8, 8, (3, 3))) and not svd.applies(ConvSpec(8, 8, (1, 1), groups=8))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        svd.factorise(np.ones((12, 20, 1, 2)), SPECS["narrow"])
    with pytest.raises(ValueError, match="this method takes one"):
        svd.chain_specs(SPECS["narrow"], (1, 2))
