"""Separable decompositions: the closed form of Tai et al. 2016 (Jaderberg 2014, scheme 2), in both orders.

`spatial` puts K vertical filters over all input channels in front of K -> N horizontal ones, kh x 1 -> 1 x kw;
`spatial_rows` is the same with the kernel's axes exchanged, 1 x kw -> kh x 1. Which of them is cheaper or closer
depends on strides and data. The truncated SVD of the kernel, unfolded to a (C*kh) x (kw*N) matrix, is the global
optimum for the weights. With moments the SVD is taken in the data's norm, and the second factor is the best one for
the true outputs (see `nested`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.moments import Moments
from tvm_lowrank.methods.solvers import nested


def max_rank(spec: ConvSpec) -> int:
    """The rank, per group, at which `spatial` is exact."""
    out, inner, height, width = spec.weight_shape
    return min(inner * height, out // spec.groups * width)


def max_rank_rows(spec: ConvSpec) -> int:
    """The rank, per group, at which `spatial_rows` is exact."""
    out, inner, height, width = spec.weight_shape
    return min(inner * width, out // spec.groups * height)


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of `spatial`: kh x 1 to `rank` channels a group, then 1 x kw."""
    middle = spec.groups * as_int(rank)
    return replace(spec.columns(), out_channels=middle), replace(spec.rows(), in_channels=middle)


def chain_specs_rows(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of `spatial_rows`: 1 x kw to `rank` channels a group, then kh x 1."""
    middle = spec.groups * as_int(rank)
    return replace(spec.rows(), out_channels=middle), replace(spec.columns(), in_channels=middle)


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> nested.NestedFactors:
    """Decompose an OIHW weight by `spatial`, for all ranks at once."""
    return nested.factorise(weight, spec, moments, chain_specs, "ci")


def factorise_rows(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> nested.NestedFactors:
    """Decompose an OIHW weight by `spatial_rows`, for all ranks at once."""
    return nested.factorise(weight, spec, moments, chain_specs_rows, "cj")
