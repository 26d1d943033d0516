"""Tucker-2 decomposition, 1x1 -> kh x kw -> 1x1: Kim et al. 2016, with the output error as its norm.

The kernel, a tensor T of (N, C, p) with p = kh * kw taps, is approximated by P (N, R4), a core (R4, R3, p) and A (C,
R3) as T ~ core x_N P x_C A. For the weights alone, higher-order orthogonal iteration (HOOI; De Lathauwer et al. 2000)
finds P and A from the leading singular vectors of the unfoldings (HOSVD).

With moments, HOOI runs on T x_C Sc^(1/2) x_p Sp^(1/2), where Sc (over channels) and Sp (over taps) are the partial
traces of the covariance S of the input columns (S ~ Sc x Sp), and A is un-whitened. Given A, the core and P together
are the reduced-rank regression of the outputs on the features A^T x: exact, under the full S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_numbers, chain_macs
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.methods.moments import Moments, grouped, output_power
from tvm_lowrank.methods.solvers.tucker2_solver import Whitened, hooi, regress, whiten, widen

CANDIDATES = 10  # ranks of the grid
# the input on which a chain's MACs are compared with the dense ones; their ratio hardly depends on it
NOMINAL = (64, 64)


def max_rank(spec: ConvSpec) -> tuple[int, int]:
    """The rank (R3, R4), per group, at which the decomposition is exact."""
    out, inner, height, width = spec.weight_shape
    out //= spec.groups
    return min(inner, out * height * width), min(out, inner * height * width)


def ranks(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """Up to ten (R3, R4), spaced geometrically up to where the MACs reach the dense ones.

    Both numbers are multiples of `lanes`, in the proportion of the channels.
    """
    cheaper = [rank for rank in proportional(max_rank(spec), lanes) if saves(spec, chain_specs(spec, rank))]
    return [cheaper[i] for i in spread(len(cheaper), CANDIDATES)]


def proportional(limits: tuple[int, int], lanes: int) -> list[tuple[int, int]]:
    """Pairs of multiples of `lanes` in the proportion of two limits and up to them, in ascending order."""
    if min(limits) < lanes:
        return []

    def share(part: float, limit: int) -> int:
        return min(max(lanes, round(part * limit / lanes) * lanes), limit // lanes * lanes)

    steps = range(lanes, max(limits) + 1, lanes)
    return sorted({(share(n / max(limits), limits[0]), share(n / max(limits), limits[1])) for n in steps})


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices of a sequence, the last among them, spaced geometrically down to a sixteenth."""
    return sorted({round(i) - 1 for i in np.geomspace(max(1, length / 16), length, count)}) if length else []


def saves(spec: ConvSpec, specs: Iterable[ConvSpec]) -> bool:
    """Whether a chain needs fewer MACs than the convolution it replaces."""
    return chain_macs(specs, NOMINAL) < spec.macs(NOMINAL)


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: 1x1 to R3 channels a group, kh x kw to R4, 1x1."""
    inner, outer = (spec.groups * number for number in as_numbers(rank, 2))
    return (
        ConvSpec(spec.in_channels, inner, (1, 1), groups=spec.groups),
        replace(spec, in_channels=inner, out_channels=outer),
        ConvSpec(outer, spec.out_channels, (1, 1), groups=spec.groups),
    )


@dataclass(frozen=True, eq=False)
class Solution:
    """One rank: OIHW weights, their expected squared output error, and P of each group in whitened coordinates."""

    weights: tuple[np.ndarray, ...]
    error: float
    outputs: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """The whitened kernel of each group, and the ranks solved so far; a new one starts from the nearest of them."""

    spec: ConvSpec
    matrices: np.ndarray  # (g, N/g, D)
    moments: Moments | None
    kernels: tuple[Whitened, ...]
    power: float  # expected squared output
    solved: dict[tuple[int, ...], Solution] = field(default_factory=dict)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's three convolutions, balanced; the last two are the best ones for the first."""
        return self._solution(as_numbers(rank, 2)).weights

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels (squared weight error without moments)."""
        return self._solution(as_numbers(rank, 2)).error

    def _solution(self, rank: tuple[int, ...]) -> Solution:
        if rank not in self.solved:
            self.solved[rank] = self._solve(rank)
        return self.solved[rank]

    def _solve(self, rank: tuple[int, ...]) -> Solution:
        nearest = min(self.solved, key=lambda known: np.abs(np.log(np.divide(known, rank))).sum(), default=None)
        firsts, cores, lasts, starts = [], [], [], []
        explained = 0.0
        for g, kernel in enumerate(self.kernels):
            covariance = None if self.moments is None else self.moments.covariance[g]
            start = None if nearest is None else widen(self.solved[nearest].outputs[g], kernel.tensor, rank[1])
            outputs, inputs, _ = hooi(kernel.tensor, (rank[0], rank[1]), start)
            inputs = kernel.channels @ inputs
            last, core, part = regress(self.matrices[g], inputs, rank[1], covariance)
            firsts.append(inputs.T)
            cores.append(core)
            lasts.append(last)
            starts.append(outputs)
            explained += part
        specs = chain_specs(self.spec, rank)
        weights = (
            np.concatenate(arrays).reshape(spec.weight_shape)
            for arrays, spec in zip((firsts, cores, lasts), specs, strict=True)
        )
        return Solution(balance(specs, tuple(weights)), max(self.power - explained, 0.0), tuple(starts))


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> TuckerFactors:
    """Prepare an OIHW weight; ranks are solved when they are asked for."""
    matrices = grouped(weight, spec)
    _, inner, height, width = spec.weight_shape
    kernels = tuple(
        whiten(matrix.reshape(-1, inner, height * width), None if moments is None else moments.covariance[g])
        for g, matrix in enumerate(matrices)
    )
    return TuckerFactors(spec, matrices, moments, kernels, output_power(matrices, moments))
