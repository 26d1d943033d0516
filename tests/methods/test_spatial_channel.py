"""Zhang's "3D": spatial decomposition, then channel decomposition of its second layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.factors import Recipe, check_chain, check_data_norm, check_errors, distance, geometries
from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, chain_macs, compose, spatial, spatial_channel
from tvm_lowrank.methods.moments import grouped

RECIPE = Recipe(spatial_channel.max_rank, spatial_channel.chain_specs, spatial_channel.factorise)
SPECS = {
    "3x3": ConvSpec(6, 8, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 6, (3, 5), strides=(2, 1), groups=2),
    "wide": ConvSpec(2, 20, (3, 2)),
}
SPEC = SPECS["3x3"]


@pytest.mark.parametrize("case", sorted(SPECS))
def test_errors(case: str) -> None:
    highest = spatial_channel.max_rank(SPECS[case])
    check_errors(RECIPE, SPECS[case], [(k, d) for k in (1, 3, 5, highest[0]) for d in (1, 2, highest[1])])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(), st.floats(0, 1))
def test_chain(spec: ConvSpec, share: float) -> None:
    check_chain(RECIPE, spec, share)


@pytest.mark.parametrize("rank", [(3, 2), (6, 4), (10, 6)])
def test_data_norm(rank: tuple[int, int]) -> None:
    check_data_norm(RECIPE, SPEC, rank)


@pytest.mark.parametrize("whitened", [False, True])
def test_last_two_layers_are_the_best_for_the_first(whitened: bool) -> None:
    """No pair of 1 x kw and 1 x 1 layers that ALS finds from random starts has a smaller expected error."""
    rng, rank = np.random.default_rng(3), (7, 3)
    weight = rng.standard_normal(SPEC.weight_shape)
    moments = moments_of(columns(SPEC, rng)) if whitened else None
    factors = spatial_channel.factorise(weight, SPEC, moments)
    vertical = factors.weights(rank)[0]
    # the features as a map of the columns: (K, tap) by (c, i, j)
    matrix = np.einsum("kcix,jl->kjcil", vertical, np.eye(3)).reshape(rank[0] * 3, -1)
    rows = grouped(weight, SPEC)[0]
    spread = np.eye(rows.shape[1]) if moments is None else moments.covariance[0]
    gram, cross = matrix @ spread @ matrix.T, rows @ spread @ matrix.T
    best = np.inf
    for _ in range(5):
        inner = rng.standard_normal((rank[1], len(matrix)))
        for _ in range(200):
            outer = cross @ inner.T @ np.linalg.pinv(inner @ gram @ inner.T)
            inner = np.linalg.pinv(outer) @ cross @ np.linalg.inv(gram)
        kernel = (outer @ inner @ matrix).reshape(weight.shape)
        best = min(best, distance(SPEC, weight, kernel, moments))
    assert factors.error(rank) <= best * (1 + 1e-5)


def test_without_reduction_it_is_the_spatial_decomposition() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(SPEC.weight_shape)
    moments = moments_of(columns(SPEC, rng))
    ours, theirs = spatial_channel.factorise(weight, SPEC, moments), spatial.factorise(weight, SPEC, moments)
    assert ours.error((5, 8)) == pytest.approx(theirs.error(5))
    expected = compose(spatial.chain_specs(SPEC, 5), theirs.weights(5))
    np.testing.assert_allclose(RECIPE.kernel(ours, (5, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_macs_are_those_of_the_notes(strides: tuple[int, int]) -> None:
    spec, (vertical, reduced) = ConvSpec(12, 20, (3, 5), strides=strides, padding=(1, 2, 1, 2)), (7, 4)
    rows, cols = spec.output_size((9, 10))
    expected = vertical * 12 * 3 * rows * 10 + rows * cols * (vertical * 5 * reduced + reduced * 20)
    assert chain_macs(spatial_channel.chain_specs(spec, (vertical, reduced)), (9, 10)) == expected


@pytest.mark.parametrize("lanes", [8, 16])
def test_ranks_are_worth_their_third_layer(lanes: int) -> None:
    for spec in (ConvSpec(128, 256, (3, 3)), ConvSpec(256, 256, (3, 5), groups=2), ConvSpec(512, 512, (3, 3))):
        ranks = spatial_channel.ranks(spec, lanes)
        assert 10 <= len(ranks) <= 16 and len(set(ranks)) == len(ranks)
        for vertical, reduced in map(spatial_channel.as_pair, ranks):
            assert vertical % lanes == reduced % lanes == 0
            assert vertical <= spatial_channel.max_rank(spec)[0] and reduced <= spatial_channel.max_rank(spec)[1]
            three = chain_macs(spatial_channel.chain_specs(spec, (vertical, reduced)), (20, 20))
            assert three < chain_macs(spatial.chain_specs(spec, vertical), (20, 20))


def test_merged_where_the_third_layer_saves_nothing() -> None:
    """3d >= 2N where K = N, as in the paper's released code, here with kw * K * d + d * N >= kw * K * N."""
    spec = ConvSpec(64, 96, (3, 3))
    assert spatial_channel.worthwhile(spec, (96, 71))
    assert not spatial_channel.worthwhile(spec, (96, 72))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        spatial_channel.factorise(np.ones((8, 6, 3, 2)), SPEC)
    for rank in (3, (1, 2, 3)):
        with pytest.raises(ValueError, match="is not a pair"):
            spatial_channel.chain_specs(SPEC, rank)
