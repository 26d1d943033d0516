"""The decompositions: exact at full rank, optimal where theory says so, and honest about their errors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.samples import columns, moments_of
from tvm_lowrank.methods import METHODS, ConvSpec, Factors, Moments, Rank, chain_macs, compose, decompose
from tvm_lowrank.methods.moments import grouped, output_power

# the methods with one number for a rank, all of whose ranks come from one factorisation
NESTED = ("channel", "channel_in", "dac", "dac_out", "spatial", "spatial_rows")
SPECS = {
    "3x3": ConvSpec(6, 8, (3, 3), padding=(1, 1, 1, 1)),
    "3x5 in 2 groups": ConvSpec(8, 6, (3, 5), strides=(2, 1), groups=2),
    "wide": ConvSpec(2, 20, (3, 3)),
}


def composed(name: str, factors: Factors, rank: Rank) -> np.ndarray:
    """The OIHW kernel that a method's chain computes."""
    return compose(METHODS[name].chain_specs(factors.spec, rank), factors.weights(rank), factors.spec.groups)


def true_error(spec: ConvSpec, weight: np.ndarray, kernel: np.ndarray, bias: np.ndarray, x: np.ndarray) -> float:
    """Mean squared output error over the columns, summed over channels; `bias` is (N,)."""
    missing = x @ grouped(weight - kernel, spec).transpose(0, 2, 1) - bias.reshape(spec.groups, 1, -1)
    return float(np.sum(missing**2) / x.shape[1])


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("case", sorted(SPECS))
@pytest.mark.parametrize("whitened", [False, True])
def test_predicted_errors_are_the_true_ones(name: str, case: str, whitened: bool) -> None:
    spec, rng = SPECS[case], np.random.default_rng(1)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng)
    moments = moments_of(x) if whitened else None
    factors = METHODS[name].factorise(weight, spec, moments)
    highest = METHODS[name].max_rank(spec)
    power = output_power(grouped(weight, spec), moments)
    errors = [factors.error(rank) for rank in range(1, highest + 1)]
    assert all(after <= before + 1e-9 * power for before, after in pairwise([power, *errors]))
    for rank in {1, highest // 2, highest - 1}:
        kernel = composed(name, factors, rank)
        chain = decompose(weight, spec, method=name, rank=rank, moments=moments)
        if moments is None:
            assert np.sum((weight - kernel) ** 2) == pytest.approx(factors.error(rank))
            assert chain.bias_correction is None
        else:
            assert chain.bias_correction is not None
            error = true_error(spec, weight, kernel, chain.bias_correction.astype(float), x)
            assert error == pytest.approx(factors.error(rank), rel=1e-3, abs=1e-6 * power)
    np.testing.assert_allclose(composed(name, factors, highest), weight, atol=1e-4)


@pytest.mark.parametrize("name", NESTED)
def test_whitening_lowers_the_output_error_and_bias_correction_does_too(name: str) -> None:
    spec, rng = SPECS["3x3"], np.random.default_rng(2)
    weight = rng.standard_normal(spec.weight_shape)
    x, held_out = np.split(columns(spec, rng, 8000), 2, axis=1)
    moments = moments_of(x)
    for rank in (2, 4):
        plain = composed(name, METHODS[name].factorise(weight, spec, None), rank)
        chain = decompose(weight, spec, method=name, rank=rank, moments=moments)
        kernel = composed(name, METHODS[name].factorise(weight, spec, moments), rank)
        assert chain.bias_correction is not None
        bias = chain.bias_correction.astype(float)
        zero = np.zeros(spec.out_channels)
        corrected = true_error(spec, weight, kernel, bias, held_out)
        assert corrected < true_error(spec, weight, plain, zero, held_out)
        assert corrected < true_error(spec, weight, kernel, zero, held_out)


@pytest.mark.parametrize("whitened", [False, True])
def test_channel_beats_alternating_least_squares(whitened: bool) -> None:
    """No pair of factors found by ALS from random starts has a smaller expected error."""
    spec, rng, rank = SPECS["3x3"], np.random.default_rng(3), 3
    weight = grouped(rng.standard_normal(spec.weight_shape), spec)[0]
    moments = moments_of(columns(spec, rng)) if whitened else None
    spread = np.eye(weight.shape[1]) if moments is None else moments.covariance[0]
    best = np.inf
    for _ in range(10):
        inner = rng.standard_normal((rank, weight.shape[1]))
        for _ in range(200):
            outer = weight @ spread @ inner.T @ np.linalg.pinv(inner @ spread @ inner.T)
            inner = np.linalg.pinv(outer) @ weight
        missing = weight - outer @ inner
        best = min(best, np.trace(missing @ spread @ missing.T))
    found = METHODS["channel"].factorise(weight.reshape(spec.weight_shape), spec, moments).error(rank)
    assert found <= best * (1 + 1e-6)


def test_spatial_beats_alternating_least_squares_on_the_weights() -> None:
    """Tai's closed form is the global optimum: no pair of 1-D filter banks comes closer."""
    spec, rng, rank = SPECS["3x3"], np.random.default_rng(4), 3
    weight = rng.standard_normal(spec.weight_shape)
    out, inner, height, width = weight.shape
    best = np.inf
    for _ in range(10):
        vertical = rng.standard_normal((rank, inner * height))
        target = weight.transpose(1, 2, 3, 0).reshape(inner * height, width * out)
        for _ in range(200):
            horizontal = np.linalg.lstsq(vertical.T, target, rcond=None)[0]
            vertical = np.linalg.lstsq(horizontal.T, target.T, rcond=None)[0]
        best = min(best, np.sum((target - vertical.T @ horizontal) ** 2))
    assert METHODS["spatial"].factorise(weight, spec, None).error(rank) <= best * (1 + 1e-9)


def test_spatial_refit_is_the_best_second_factor() -> None:
    """With the vertical filters given, no change of the horizontal ones lowers the expected error."""
    spec, rng, rank = SPECS["3x3"], np.random.default_rng(5), 4
    weight = rng.standard_normal(spec.weight_shape)
    moments = moments_of(columns(spec, rng))
    factors = METHODS["spatial"].factorise(weight, spec, moments)
    vertical, horizontal = factors.weights(rank)

    def error(horizontal: np.ndarray) -> float:
        kernel = np.einsum("kcix,nkyj->ncij", vertical, horizontal)
        return output_power(grouped(weight - kernel, spec), moments)

    least = error(horizontal)
    assert least == pytest.approx(factors.error(rank), rel=1e-4)
    for _ in range(50):
        assert error(horizontal + 1e-3 * rng.standard_normal(horizontal.shape)) > least


@pytest.mark.parametrize("name", NESTED)
def test_a_rank_does_not_depend_on_those_asked_for_before(name: str) -> None:
    spec, rng = SPECS["3x5 in 2 groups"], np.random.default_rng(8)
    weight, moments = rng.standard_normal(spec.weight_shape), moments_of(columns(spec, rng))
    power = output_power(grouped(weight, spec), moments)
    factors = METHODS[name].factorise(weight, spec, moments)
    for rank in range(1, METHODS[name].max_rank(spec) + 1):
        alone = METHODS[name].factorise(weight, spec, moments)
        assert factors.error(rank) == pytest.approx(alone.error(rank), rel=1e-4, abs=1e-6 * power)
        np.testing.assert_allclose(composed(name, factors, rank), composed(name, alone, rank), atol=1e-3)


@pytest.mark.parametrize("name", NESTED)
def test_singular_moments(name: str) -> None:
    """Dead input channels and fewer images than dimensions are no obstacle."""
    spec, rng = SPECS["3x3"], np.random.default_rng(6)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng, 20)
    x[:, :, :9] = 0
    factors = METHODS[name].factorise(weight, spec, moments_of(x))
    highest = METHODS[name].max_rank(spec)
    assert all(np.isfinite(factors.error(rank)) for rank in range(1, highest + 1))
    chain = decompose(weight, spec, method=name, rank=highest, moments=moments_of(x))
    assert all(np.isfinite(conv.weight).all() and np.abs(conv.weight).max() < 1e3 for conv in chain.convs)
    assert chain.bias_correction is not None
    error = true_error(spec, weight, composed(name, factors, highest), chain.bias_correction.astype(float), x)
    assert error <= 1e-3 * output_power(grouped(weight, spec), moments_of(x))


@pytest.mark.parametrize("name", NESTED)
def test_covariance_with_rounding_errors(name: str) -> None:
    """Eigenvalues a little below zero, as float32 sums over too few images leave them, are no obstacle."""
    spec, rng = ConvSpec(12, 16, (3, 3)), np.random.default_rng(7)
    weight = rng.standard_normal(spec.weight_shape)
    x = columns(spec, rng, 40)
    exact = moments_of(x)
    noise = rng.standard_normal(exact.covariance.shape) * 1e-7 * np.abs(exact.covariance).max()
    moments = Moments(exact.mean, exact.covariance + noise + noise.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(moments.covariance)[0, 0] < 0
    chain = decompose(weight, spec, method=name, rank=min(10, METHODS[name].max_rank(spec)), moments=moments)
    assert all(np.isfinite(conv.weight).all() and np.abs(conv.weight).max() < 1e3 for conv in chain.convs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(5, 20),
)
def test_macs_are_those_of_the_notes(
    c: int, n: int, kernel: tuple[int, int], strides: tuple[int, int], size: int
) -> None:
    """MACs of the chains against the closed formulas."""
    spec = ConvSpec(c, n, kernel, strides=strides, padding=(2, 2, 2, 2))
    (height, width), (rows, cols) = (size, size), spec.output_size((size, size))
    rank = 3
    expected = {
        "channel": rows * cols * rank * (c * kernel[0] * kernel[1] + n),
        "spatial": rank * (c * kernel[0] * rows * width + n * kernel[1] * rows * cols),
    }
    for name, macs in expected.items():
        assert chain_macs(METHODS[name].chain_specs(spec, rank), (height, width)) == macs


def test_bad_input_is_named() -> None:
    spec = SPECS["3x3"]
    weight = np.ones(spec.weight_shape)
    with pytest.raises(ValueError, match=r"rank 0 of spatial is outside 1\.\.18"):
        decompose(weight, spec, method="spatial", rank=0)
    with pytest.raises(ValueError, match="known are channel, "):
        decompose(weight, spec, method="winograd", rank=1)
    with pytest.raises(ValueError, match="does not fit"):
        decompose(weight[1:], spec, method="channel", rank=1)
    weight[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decompose(weight, spec, method="channel", rank=1)
    with pytest.raises(ValueError, match="does not apply to a 1x1"):
        decompose(np.ones((4, 4, 1, 1)), ConvSpec(4, 4, (1, 1)), method="spatial", rank=1)
    with pytest.raises(ValueError, match="does not apply"):
        decompose(np.ones((4, 1, 3, 3)), ConvSpec(4, 4, (3, 3), groups=4), method="channel", rank=1)
