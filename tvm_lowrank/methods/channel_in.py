"""Channel decomposition on the input side, 1 x 1 -> kh x kw: the twin of Zhang's (`channel`).

The input's C channels are mapped to d by the leading left singular vectors of the mode-C unfolding, the
C x (kh*kw*N) matrix: the best choice for the weights. With moments the SVD is taken of P^(1/2) T (Q^(1/2) x I), with P
the C x C covariance of the channels and Q that of the kernel's taps, and the kh x kw factor is then the best one for
the true outputs (see `nested`). For strides the 1 x 1 runs at the input's resolution.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.moments import Moments
from tvm_lowrank.methods.solvers import nested


def max_rank(spec: ConvSpec) -> int:
    """The rank, per group, at which the decomposition is exact."""
    out, inner, height, width = spec.weight_shape
    return min(inner, out // spec.groups * height * width)


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: 1 x 1 to `rank` channels a group, then kh x kw."""
    middle = spec.groups * as_int(rank)
    return replace(spec.pointwise(), out_channels=middle), replace(spec, in_channels=middle)


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> nested.NestedFactors:
    """Decompose an OIHW weight for all ranks at once."""
    return nested.factorise(weight, spec, moments, chain_specs, "c")
