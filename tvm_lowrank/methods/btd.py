"""Block-term decomposition, 1x1 -> grouped kh x kw -> 1x1: the group-sparse kernels of Wang & Cheng 2016.

The kernel, a tensor T of (N, C, p) with p = kh * kw taps, is approximated by a sum of B Tucker-2 blocks: P_b (N, t), a
core G_b (t, s, p) and A_b (C, s) each. Stacked they are a Tucker-2 decomposition whose core is block diagonal, that is,
a convolution in B groups; it has B times the channels of a dense core of the same cost.

Blocks are found by principal component iteration (:mod:`tvm_lowrank.methods.solvers.btd_solver`). With moments T is
whitened as in :mod:`tvm_lowrank.methods.tucker2`, and P is refit under the full covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, compose
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import Moments, grouped, output_power
from tvm_lowrank.methods.solvers.algebra import mode_dot
from tvm_lowrank.methods.solvers.btd_solver import Blocks, checked, solve
from tvm_lowrank.methods.solvers.tucker2_solver import Whitened, whiten
from tvm_lowrank.methods.tucker2 import proportional, saves, spread

BLOCKS = (2, 4, 8)
CANDIDATES = 4  # ranks of the grid for each number of blocks


def max_rank(spec: ConvSpec) -> tuple[int, int, int]:
    """The largest (S, T, B) per group: all channels, in blocks of one. One block of all channels is exact."""
    inner, outer = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return inner, outer, min(inner, outer)


def ranks(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """For 2, 4 and 8 blocks up to four (S, T, B) each, in the proportion of the channels, cheaper than dense.

    The channels of each block are multiples of `lanes`.
    """
    found: list[Rank] = []
    limits = max_rank(spec)[:2]
    for blocks in BLOCKS:
        grid = [
            (blocks * inner, blocks * outer, blocks)
            for inner, outer in proportional((limits[0] // blocks, limits[1] // blocks), lanes)
        ]
        cheaper = [rank for rank in grid if saves(spec, chain_specs(spec, rank))]
        found += [cheaper[i] for i in spread(len(cheaper), CANDIDATES)]
    return found


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: 1x1 to S channels a group, kh x kw in B blocks to T, 1x1."""
    inner, outer, blocks = checked(rank)
    inner, outer, groups = inner * spec.groups, outer * spec.groups, spec.groups
    return (
        ConvSpec(spec.in_channels, inner, (1, 1), groups=groups),
        ConvSpec(inner, outer, spec.kernel, spec.strides, spec.padding, spec.dilation, groups * blocks),
        ConvSpec(outer, spec.out_channels, (1, 1), groups=groups),
    )


@dataclass(frozen=True, eq=False)
class Solution:
    """One rank: OIHW weights, their expected squared output error, and each group's blocks (of the whitened kernel)."""

    weights: tuple[np.ndarray, ...]
    error: float
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True, eq=False)
class BlockTermFactors:
    """The whitened kernel of each group, and the ranks solved so far; a new one starts from the nearest of them."""

    spec: ConvSpec
    weight: np.ndarray  # OIHW
    moments: Moments | None
    kernels: tuple[Whitened, ...]
    solved: dict[tuple[int, ...], Solution] = field(default_factory=dict)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's three convolutions, balanced; with moments the last one is already refit."""
        return self._solution(checked(rank)).weights

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels (squared weight error without moments)."""
        return self._solution(checked(rank)).error

    def _solution(self, rank: tuple[int, ...]) -> Solution:
        if rank not in self.solved:
            self.solved[rank] = self._solve(rank)
        return self.solved[rank]

    def _solve(self, rank: tuple[int, ...]) -> Solution:
        alike = [known for known in self.solved if known[2] == rank[2]]
        nearest = min(alike, key=lambda known: np.abs(np.log(np.divide(known, rank))).sum(), default=None)
        starts = (None,) * self.spec.groups if nearest is None else self.solved[nearest].blocks
        found = tuple(solve(kernel.tensor, rank, known) for kernel, known in zip(self.kernels, starts, strict=True))
        parts: tuple[list[np.ndarray], ...] = ([], [], [])
        for kernel, blocks in zip(self.kernels, found, strict=True):
            parts[0].extend((kernel.channels @ inputs).T for inputs in blocks.inputs)
            parts[1].append(mode_dot(blocks.cores, kernel.taps, 2, transpose=True).transpose(0, 1, 3, 2))
            parts[2].append(blocks.outputs.transpose(1, 0, 2))
        specs = chain_specs(self.spec, rank)
        weights = tuple(
            np.concatenate(arrays).reshape(spec.weight_shape) for arrays, spec in zip(parts, specs, strict=True)
        )
        if self.moments is not None:
            weights = refit_last(self.weight, self.spec, specs, balance(specs, weights), self.moments)
        missing = grouped(self.weight - compose(specs, weights, self.spec.groups), self.spec)
        return Solution(balance(specs, weights), output_power(missing, self.moments), found)


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> BlockTermFactors:
    """Prepare an OIHW weight; ranks are solved when they are asked for."""
    _, inner, height, width = spec.weight_shape
    kernels = tuple(
        whiten(matrix.reshape(-1, inner, height * width), None if moments is None else moments.covariance[g])
        for g, matrix in enumerate(grouped(weight, spec))
    )
    return BlockTermFactors(spec, weight.astype(np.float64), moments, kernels)
