"""Depthwise and pointwise convolutions: DAC (Li et al. 2019) and its reverse, in network decoupling (Guo et al. 2018).

`dac` gives each input channel r filters of kh x kw, then mixes all their responses: depthwise kh x kw -> 1 x 1. Its
factors are the truncated SVDs of the N x kh*kw slices of the input channels. `dac_out` mixes the input channels first,
r times for each output channel, and filters the mixtures: 1 x 1 -> depthwise kh x kw, from the SVDs of the C x kh*kw
slices of the output channels. Both are the global optimum for the weights.

With moments both factors are fitted together to the true outputs, from these closed forms (see `dac_solver`).

Unlike elsewhere the rank counts filters for each input (or output) channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.moments import Moments
from tvm_lowrank.methods.solvers import nested
from tvm_lowrank.methods.solvers.dac_solver import JointFactors, filters, mixtures

Factors = nested.NestedFactors | JointFactors

CANDIDATES = 10  # at most this many ranks of large kernels


def max_rank(spec: ConvSpec) -> int:
    """The filters for each input channel at which `dac` is exact."""
    return min(spec.out_channels // spec.groups, int(np.prod(spec.kernel)))


def max_rank_out(spec: ConvSpec) -> int:
    """The filters for each output channel at which `dac_out` is exact."""
    return min(spec.in_channels // spec.groups, int(np.prod(spec.kernel)))


def ranks(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """Ranks of `dac` with fewer weights than the convolution; any number, for the channels fill the vectors."""
    return _below_break_even(max_rank(spec), spec.out_channels // spec.groups, int(np.prod(spec.kernel)))


def ranks_out(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """Ranks of `dac_out` with fewer weights than the convolution."""
    return _below_break_even(max_rank_out(spec), spec.in_channels // spec.groups, int(np.prod(spec.kernel)))


def _below_break_even(highest: int, channels: int, taps: int) -> list[Rank]:
    """Ranks r, denser where small, at which r * (channels + taps) weights are fewer than channels * taps."""
    end = min(highest, (channels * taps - 1) // (channels + taps))
    if end <= CANDIDATES:
        return list(range(1, end + 1))
    return [int(rank) for rank in np.unique(np.geomspace(1, end, CANDIDATES).round())]


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of `dac`: kh x kw to `rank` channels for each input channel, then 1 x 1 in the site's groups."""
    middle = spec.in_channels * as_int(rank)
    return (
        replace(spec, out_channels=middle, groups=spec.in_channels),
        replace(spec.pointwise(), in_channels=middle),
    )


def chain_specs_out(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of `dac_out`: 1 x 1 to `rank` channels for each output channel, then kh x kw in N groups."""
    middle = spec.out_channels * as_int(rank)
    return (
        replace(spec.pointwise(), out_channels=middle),
        replace(spec, in_channels=middle, groups=spec.out_channels),
    )


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> Factors:
    """Decompose an OIHW weight by `dac`: for all ranks at once, or with moments for each when it is asked for."""
    start = nested.factorise(weight, spec, moments, chain_specs, "ij", own=True)
    return start if moments is None else JointFactors(start, filters)


def factorise_out(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> Factors:
    """Decompose an OIHW weight by `dac_out`, likewise."""
    start = nested.factorise(weight, spec, moments, chain_specs_out, "c", blocks=spec.out_channels)
    return start if moments is None else JointFactors(start, mixtures)
