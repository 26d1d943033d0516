"""What every decomposition must keep to, as checks of one method on one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, Factors, Moments, Rank, compose
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import grouped, output_power


class Recipe(NamedTuple):
    """The functions of a decomposition method."""

    max_rank: Callable[[ConvSpec], Rank]
    chain_specs: Callable[[ConvSpec, Rank], tuple[ConvSpec, ...]]
    factorise: Callable[[np.ndarray, ConvSpec, Moments | None], Factors]

    def kernel(self, factors: Factors, rank: Rank) -> np.ndarray:
        """The OIHW kernel that the chain of a rank computes."""
        return compose(self.chain_specs(factors.spec, rank), factors.weights(rank), factors.spec.groups)


def distance(spec: ConvSpec, weight: np.ndarray, kernel: np.ndarray, moments: Moments | None) -> float:
    """Expected squared error of the centred outputs; that of the weights without moments."""
    return output_power(grouped(weight - kernel, spec), moments)


def check_errors(recipe: Recipe, spec: ConvSpec, ranks: Sequence[Rank]) -> None:
    """Predicted errors are the true ones, in both norms, and the highest rank is exact."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(spec.weight_shape)
    for moments in (None, moments_of(columns(spec, rng))):
        factors = recipe.factorise(weight, spec, moments)
        power = output_power(grouped(weight, spec), moments)
        for rank in ranks:
            error = distance(spec, weight, recipe.kernel(factors, rank), moments)
            assert error == pytest.approx(factors.error(rank), rel=1e-3, abs=1e-6 * power), rank
            assert error < power
        highest = recipe.max_rank(spec)
        np.testing.assert_allclose(recipe.kernel(factors, highest), weight, atol=1e-3)
        assert factors.error(highest) <= 1e-6 * power


def check_data_norm(recipe: Recipe, spec: ConvSpec, rank: Rank) -> None:
    """On columns held out, a refit of the last factor helps, and so does choosing the others in the data's norm."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal(spec.weight_shape)
    known, unknown = (moments_of(x) for x in np.split(columns(spec, rng, 8000), 2, axis=1))
    specs = recipe.chain_specs(spec, rank)
    weights = recipe.factorise(weight, spec, None).weights(rank)
    refit = refit_last(weight, spec, specs, weights, known)
    whitened = recipe.factorise(weight, spec, known).weights(rank)
    kernels = [compose(specs, parts, spec.groups) for parts in (weights, refit, whitened)]
    plain, after, best = (distance(spec, weight, kernel, unknown) for kernel in kernels)
    assert best < after < plain
    again = refit_last(weight, spec, specs, whitened, known)
    np.testing.assert_allclose(compose(specs, again, spec.groups), kernels[2], atol=1e-3)


def geometries(kernels: Sequence[tuple[int, int]] = ((1, 3), (2, 3), (3, 2), (3, 3))) -> st.SearchStrategy[ConvSpec]:
    """Convolutions of up to three groups with strides, dilation and asymmetric padding."""

    def build(
        groups: int,
        channels: tuple[int, int],
        kernel: tuple[int, int],
        strides: tuple[int, int],
        dilation: tuple[int, int],
        padding: tuple[int, int, int, int],
    ) -> ConvSpec:
        return ConvSpec(groups * channels[0], groups * channels[1], kernel, strides, padding, dilation, groups)

    def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    pads = st.tuples(*[st.integers(0, 2)] * 4)
    return st.builds(build, st.integers(1, 3), pairs(1, 5), st.sampled_from(kernels), pairs(1, 2), pairs(1, 2), pads)


def check_chain(recipe: Recipe, spec: ConvSpec, share: float) -> None:
    """The chain, run by torch, computes what the kernel that it composes to does; ranks are a share of the largest."""
    rng = np.random.default_rng(0)
    highest = recipe.max_rank(spec)
    pick = [max(round(share * number), 1) for number in (highest if isinstance(highest, tuple) else (highest,))]
    rank = tuple(pick) if isinstance(highest, tuple) else pick[0]
    factors = recipe.factorise(rng.standard_normal(spec.weight_shape), spec, None)
    y = x = torch.from_numpy(rng.standard_normal((2, spec.in_channels, 9, 8)))
    for part, weight in zip(recipe.chain_specs(spec, rank), factors.weights(rank), strict=True):
        assert weight.shape == part.weight_shape
        y = _convolve(y, part, weight)
    torch.testing.assert_close(_convolve(x, spec, recipe.kernel(factors, rank)), y)


def _convolve(x: torch.Tensor, spec: ConvSpec, weight: np.ndarray) -> torch.Tensor:
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    kernel = torch.from_numpy(np.ascontiguousarray(weight))
    return F.conv2d(padded, kernel, stride=spec.strides, dilation=spec.dilation, groups=spec.groups)


def least_by_als(matrices: np.ndarray, rank: int, restarts: int = 5) -> float:
    """Summed over (n, a, b) matrices, the least squared error of `rank` that ALS finds from random starts."""
    rng, best = np.random.default_rng(4), np.full(len(matrices), np.inf)
    for _ in range(restarts):
        right = rng.standard_normal((len(matrices), rank, matrices.shape[2]))
        for _ in range(100):
            left = matrices @ np.linalg.pinv(right)
            right = np.linalg.pinv(left) @ matrices
        best = np.minimum(best, np.sum((matrices - left @ right) ** 2, axis=(1, 2)))
    return float(best.sum())


def kronecker_moments(spec: ConvSpec, axes: str, rng: np.random.Generator) -> tuple[Moments, np.ndarray, np.ndarray]:
    """Moments whose covariance is a product P x Q, of the axes named (of "cij") and the others; P and Q too.

    One group only.
    """
    sizes = dict(zip("cij", spec.weight_shape[1:], strict=True))
    rest = "".join(axis for axis in "cij" if axis not in axes)
    first, second = (_covariance(int(np.prod([sizes[axis] for axis in part])), rng) for part in (axes, rest))
    shape = [sizes[axis] for axis in axes + rest]
    order = [(axes + rest).index(axis) for axis in "cij"]
    product = np.kron(first, second).reshape(*shape, *shape).transpose(*order, *(3 + axis for axis in order))
    depth = int(np.prod(shape))
    return Moments(np.zeros((1, depth)), product.reshape(1, depth, depth)), first, second


def _covariance(size: int, rng: np.random.Generator) -> np.ndarray:
    mixing = rng.standard_normal((size, size)) * np.linspace(0.1, 1, size)
    return mixing @ mixing.T
