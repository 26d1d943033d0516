"""CP decomposition: pointwise, depthwise along the kernel, pointwise (Lebedev et al. 2015, Astrid & Lee 2017).

    cp4:  W[n,c,i,j] ~ sum_r Kt[n,r] Ks[c,r] Ky[i,r] Kx[j,r]     1x1 -> kh x 1 depthwise -> 1 x kw depthwise -> 1x1
    cp3:  W[n,c,i,j] ~ sum_r Kt[n,r] Ks[c,r] Kyx[(i,j),r]        1x1 -> kh x kw depthwise -> 1x1

With moments the tensor is whitened first: the covariance S of the input columns is approximated by A x B (cp4:
A x B_i x B_j) with A over channels and B over taps from the partial traces, W multiplied by their square roots, and
Ks, Ky, Kx by the inverse ones afterwards. Kt is then refit to the true outputs under S (`refit.refit_last`).

There is no closed form, so each rank costs a solve (`cp_solver`). It begins at the top of a fixed ladder of ranks, 2^k
and 3 * 2^k, each of which adds terms for what the last one misses; the solve ends up to 3 % lower than without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int, compose
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import Moments, grouped, output_power, square_roots
from tvm_lowrank.methods.solvers.algebra import mode_dot
from tvm_lowrank.methods.solvers.cp_als import Report, start, with_best_first
from tvm_lowrank.methods.solvers.cp_solver import affordable, climb, solve
from tvm_lowrank.methods.solvers.cp_terms import balanced, exact, norms, split

FRESH = 16  # the ladder begins at this part of the dense convolution's MACs
WARM = 12  # sweeps and steps from the terms of a similar kernel
SINGLE = 20_000  # entries from which precision and starts are single; for 64 x 64 x 9 more gain nothing from rank 24 on


@dataclass(frozen=True)
class Format:
    """CP over (n, c, i, j) where `separable`, else over (n, c, (i, j)): what a `Method` needs of it."""

    separable: bool

    def applies(self, spec: ConvSpec) -> bool:
        """Whether there is an axis for each factor, and channels to mix."""
        extent = min(spec.kernel) if self.separable else spec.kernel[0] * spec.kernel[1]
        return (spec.groups == 1 or spec.groups < spec.in_channels) and extent > 1

    def shape(self, spec: ConvSpec) -> tuple[int, ...]:
        """Mode sizes of one group's tensor."""
        out, inner, height, width = spec.weight_shape
        taps = (height, width) if self.separable else (height * width,)
        return (out // spec.groups, inner, *taps)

    def max_rank(self, spec: ConvSpec) -> int:
        """A rank, per group, at which the decomposition is exact: the smallest product of all modes but one."""
        shape = self.shape(spec)
        return int(np.prod(shape)) // max(shape)

    def ranks(self, spec: ConvSpec, lanes: int) -> list[int]:
        """At most eight ranks of the ladder, up to half of the dense convolution's MACs at stride 1.

        Beyond that the closed forms lose no more, and the solves take longest.
        """
        highest = min(self.parity(spec) // 2, self.max_rank(spec))
        return [rank for rank in ladder(highest) if rank % lanes == 0][-8:]

    def parity(self, spec: ConvSpec) -> int:
        """The rank, per group, with as many MACs as the dense convolution has at stride 1."""
        shape = self.shape(spec)
        return int(np.prod(shape)) // sum(shape)

    def chain_specs(self, spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """The geometry of the chain."""
        middle = spec.groups * as_int(rank)
        taps = (spec.columns(), spec.rows()) if self.separable else (spec,)
        return (
            ConvSpec(spec.in_channels, middle, (1, 1), groups=spec.groups),
            *(replace(part, in_channels=middle, out_channels=middle, groups=middle) for part in taps),
            ConvSpec(middle, spec.out_channels, (1, 1), groups=spec.groups),
        )

    def factorise(
        self, weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None, *, report: Report | None = None
    ) -> CPFactors:
        """Prepare an OIHW weight; each rank is solved when asked for, calling ``report(iteration, relative_error)``."""
        shape, matrices = self.shape(spec), grouped(weight, spec)
        tensors, undo = [], []
        for group, matrix in enumerate(matrices):
            tensor = matrix.reshape(shape)
            roots = (
                [] if moments is None else [square_roots(part) for part in _margins(moments.covariance[group], shape)]
            )
            for mode, (root, _) in enumerate(roots, 1):
                tensor = mode_dot(tensor, root, mode)
            length = np.linalg.norm(tensor)
            tensors.append(tensor / (length if length > 0 else 1.0))
            undo.append((np.eye(shape[0]) * length, *(inverse for _, inverse in roots)))
        kind = np.float32 if tensors[0].size >= SINGLE else np.float64
        return CPFactors(
            spec, self, weight.astype(np.float64), moments, tuple(t.astype(kind) for t in tensors), tuple(undo), report
        )


CP4, CP3 = Format(separable=True), Format(separable=False)


class Solution(NamedTuple):
    """A decomposition of one rank."""

    stacks: tuple[np.ndarray, ...]  # per group the terms, of the whitened tensor
    weights: tuple[np.ndarray, ...]  # OIHW, of the chain
    error: float


@dataclass(frozen=True, eq=False)
class CPFactors:
    """The tensors of the groups, whitened and of norm 1, and the terms found for the ranks asked for so far."""

    spec: ConvSpec
    format: Format
    weight: np.ndarray  # OIHW
    moments: Moments | None
    tensors: tuple[np.ndarray, ...]
    undo: tuple[tuple[np.ndarray, ...], ...]  # per group and mode (the last may be missing) what turns factors back
    report: Report | None = None
    near: tuple[np.ndarray, ...] | None = None  # OIHW weights of the chain of a similar kernel, where the solver starts
    solved: dict[int, Solution] = field(default_factory=dict, repr=False)
    climbed: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)  # by group and rung

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's convolutions, the last one refit where there are moments."""
        return self.solution(rank).weights

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels; squared weight error without moments."""
        return self.solution(rank).error

    def solution(self, rank: Rank) -> Solution:
        """The decomposition of a rank, solved when first asked for."""
        rank = as_int(rank)
        highest = self.format.max_rank(self.spec)
        if not 1 <= rank <= highest:
            raise ValueError(f"rank {rank} of a CP decomposition is outside 1..{highest}")
        if rank not in self.solved:
            every = rank == highest
            groups = range(len(self.tensors))
            self.solved[rank] = self._rated(
                [exact(self.tensors[g]) if every else self._fitted(g, rank) for g in groups]
            )
        return self.solved[rank]

    def _fitted(self, group: int, rank: int) -> np.ndarray:
        """The solver's result, on one thread: its many small products run up to twenty times slower on two."""
        with threadpool_limits(1, user_api="blas"):
            warm = self._warm(group, rank)
            if warm is None:
                return self._found(group, rank)
            most = affordable(self.tensors[group].shape, rank)
            few = replace(most, sweeps=min(WARM, most.sweeps), iterations=min(WARM, most.iterations))
            return solve(self.tensors[group], [warm], few, report=self.report)

    def _warm(self, group: int, rank: int) -> np.ndarray | None:
        """The terms of the similar kernel's chain with the best output factor for this one; None without such."""
        if self.near is None or self.near[-1].shape[1] != rank:
            return None
        tensor, factors = self.tensors[group], []
        for undo, weight in zip(self.undo[group][1:] or repeat(None), self.near[:-1], strict=False):
            plain = weight[group * rank : (group + 1) * rank].reshape(rank, -1).T.astype(np.float64)
            factors.append((plain if undo is None else np.linalg.solve(undo, plain)).astype(tensor.dtype))
        return with_best_first(tensor, factors)

    def _found(self, group: int, rank: int) -> np.ndarray:
        """The solver's result from the top of the ladder, and from random starts where that is cheap."""
        tensor = self.tensors[group]
        starts = [self._climbed(group, rank)]
        if tensor.size < SINGLE:
            rng = np.random.default_rng(rank)
            starts.extend(start(tensor, rank, rng, hosvd=False) for _ in range(2))
        if 2 * rank > self.format.max_rank(self.spec):  # the exact terms without the smallest come close
            terms = exact(tensor)
            starts.append(terms[:, np.argsort(-norms(terms, tensor.shape), kind="stable")[:rank]])
        return solve(tensor, starts, affordable(tensor.shape, rank), report=self.report)

    def _climbed(self, group: int, rank: int) -> np.ndarray:
        """The top of a ladder whose last rung is a rank; the rungs are kept for higher ones."""
        if (group, rank) not in self.climbed:
            below = [rung for rung in ladder(rank - 1) if FRESH * rung >= self.format.parity(self.spec)]
            tensor = self.tensors[group]
            lower = self._climbed(group, below[-1]) if below else np.zeros((sum(tensor.shape), 0), tensor.dtype)
            self.climbed[group, rank] = climb(tensor, lower, rank)
        return self.climbed[group, rank]

    def starting_from(self, weights: tuple[np.ndarray, ...]) -> CPFactors:
        """The same with the solver starting from the OIHW weights of the chain of a similar kernel, at its rank."""
        return replace(self, near=weights, solved={})

    def _rated(self, stacks: Sequence[np.ndarray]) -> Solution:
        """The chain that the terms of all groups make."""
        weights = self._weights(stacks)
        specs = self.format.chain_specs(self.spec, stacks[0].shape[1])
        if self.moments is not None:
            weights = refit_last(self.weight, self.spec, specs, weights, self.moments)
        missing = grouped(self.weight - compose(specs, weights, self.spec.groups), self.spec)
        return Solution(tuple(stacks), weights, output_power(missing, self.moments))

    def _weights(self, stacks: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """OIHW weights before the refit; the factors of a term have the same norm."""
        factors = []
        for stack, tensor, undo in zip(stacks, self.tensors, self.undo, strict=True):
            parts = split(stack.astype(np.float64), tensor.shape)
            plain = [undo[m] @ part if m < len(undo) else part for m, part in enumerate(parts)]
            factors.append(split(balanced(np.concatenate(plain), tensor.shape), tensor.shape))
        outputs, *inner = zip(*factors, strict=True)  # each mode's (I_m, R) factors of all groups
        arrays = [*(np.concatenate([part.T for part in parts]) for parts in inner), np.concatenate(outputs)]
        specs = self.format.chain_specs(self.spec, stacks[0].shape[1])
        return tuple(array.reshape(spec.weight_shape) for array, spec in zip(arrays, specs, strict=True))


def ladder(highest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ...: 2^k and 3 * 2^k up to `highest`."""
    return sorted(base << k for base in (1, 3) for k in range(highest.bit_length()) if base << k <= highest)


def _margins(covariance: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Partial traces of a column covariance (D, D): one matrix per mode after the first.

    All but the channels' one have trace 1, so that their Kronecker product has the covariance's trace.
    """
    sizes = shape[1:]
    parts = []
    for mode, size in enumerate(sizes):
        before, after = int(np.prod(sizes[:mode])), int(np.prod(sizes[mode + 1 :]))
        margin = np.einsum("aibajb->ij", covariance.reshape(before, size, after, before, size, after))
        parts.append(margin if mode == 0 else margin / max(np.trace(margin), np.finfo(float).tiny))
    return parts
