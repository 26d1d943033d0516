"""Composition of chains, and the last factor's exact refit, for any chain of random factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, compose
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import grouped, output_power

# chains of every structure: (site, the chain's geometries)
CHAINS = {
    "1x1, kxk, 1x1": (
        ConvSpec(8, 12, (3, 3), padding=(1, 1, 1, 1)),
        (ConvSpec(8, 4, (1, 1)), ConvSpec(4, 6, (3, 3), padding=(1, 1, 1, 1)), ConvSpec(6, 12, (1, 1))),
    ),
    "1x1, grouped kxk, 1x1": (
        ConvSpec(8, 12, (2, 3)),
        (ConvSpec(8, 4, (1, 1)), ConvSpec(4, 6, (2, 3), groups=2), ConvSpec(6, 12, (1, 1))),
    ),
    "1x1, two depthwise, 1x1": (
        ConvSpec(8, 12, (3, 2)),
        (
            ConvSpec(8, 5, (1, 1)),
            ConvSpec(5, 5, (3, 1), groups=5),
            ConvSpec(5, 5, (1, 2), groups=5),
            ConvSpec(5, 12, (1, 1)),
        ),
    ),
    "columns, rows in two groups": (
        ConvSpec(8, 12, (3, 3), groups=2),
        (ConvSpec(8, 6, (3, 1), groups=2), ConvSpec(6, 12, (1, 3), groups=2)),
    ),
    "depthwise, 1x1": (ConvSpec(4, 12, (3, 3)), (ConvSpec(4, 8, (3, 3), groups=4), ConvSpec(8, 12, (1, 1)))),
    "1x1, depthwise last": (ConvSpec(4, 12, (3, 3)), (ConvSpec(4, 24, (1, 1)), ConvSpec(24, 12, (3, 3), groups=12))),
}


def random_weights(specs: tuple[ConvSpec, ...], rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(spec.weight_shape) for spec in specs]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(CHAINS)), st.integers(0, 1000))
def test_composed_kernel_computes_what_the_chain_does(name: str, seed: int) -> None:
    site, specs = CHAINS[name]
    weights = random_weights(specs, np.random.default_rng(seed))
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, site.in_channels, 7, 8)))

    def convolve(x: torch.Tensor, spec: ConvSpec, weight: np.ndarray) -> torch.Tensor:
        top, left, bottom, right = spec.padding
        return F.conv2d(F.pad(x, (left, right, top, bottom)), torch.from_numpy(weight), groups=spec.groups)

    expected = x
    for spec, weight in zip(specs, weights, strict=True):
        expected = convolve(expected, spec, weight)
    kernel = compose(specs, weights, site.groups)
    assert kernel.shape == site.weight_shape
    torch.testing.assert_close(convolve(x, site, kernel), expected)


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_balance(name: str) -> None:
    """The kernel stays, and each channel in between is made and read with one norm."""
    site, specs = CHAINS[name]
    weights = random_weights(specs, np.random.default_rng(1))
    balanced = balance(specs, weights)
    np.testing.assert_allclose(compose(specs, balanced, site.groups), compose(specs, weights, site.groups))
    for spec, made, read in zip(specs[1:], balanced, balanced[1:], strict=False):
        readers = read.reshape(spec.groups, -1, *spec.weight_shape[1:]).swapaxes(1, 2).reshape(len(made), -1)
        makers = made.reshape(len(made), -1)
        np.testing.assert_allclose(np.linalg.norm(readers, axis=1), np.linalg.norm(makers, axis=1), rtol=1e-2)


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_refit_is_the_least_squares_solution(name: str) -> None:
    """No small change of the last factor lowers the error; the refit is never worse than what it started from."""
    site, specs = CHAINS[name]
    rng = np.random.default_rng(0)
    weight, weights = rng.standard_normal(site.weight_shape), random_weights(specs, rng)
    moments = moments_of(columns(site, rng))

    def error(weights: list[np.ndarray]) -> float:
        return output_power(grouped(weight - compose(specs, weights, site.groups), site), moments)

    refitted = list(refit_last(weight, site, specs, weights, moments))
    least = error(refitted)
    assert least <= error(weights)
    for _ in range(30):
        step = 1e-2 * rng.standard_normal(refitted[-1].shape)
        assert error([*refitted[:-1], refitted[-1] + step]) >= least * (1 - 1e-9)


def test_two_factors_along_one_axis_are_refused() -> None:
    specs = (ConvSpec(2, 2, (3, 1)), ConvSpec(2, 2, (3, 1)))
    with pytest.raises(ValueError, match="same axis"):
        compose(specs, random_weights(specs, np.random.default_rng(0)))
