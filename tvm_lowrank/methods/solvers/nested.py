"""Chains of two factors, every rank of which is cut from one factorisation.

A convolution sums over three axes of its kernel: input channels c, rows i, columns j. In a chain of two factors the
first one sums over some of them (A values) and hands the others (B values) on to the second:

    method          the first sums over    the second over
    spatial         c, i                   j
    spatial_rows    c, j                   i
    channel_in      c                      i, j
    dac_out         c                      i, j    each output channel has first filters of its own
    dac             i, j                   c       each input channel has first filters of its own

Unfolded to an A x (B*M) matrix T, where M outputs share first filters, the kernel's best rank-r approximation is the
truncated SVD; with filters for each of the B values, it is the SVD of each A x M slice. With moments the SVD is
taken in the norm of the outputs: of P^(1/2) T (Q^(1/2) x I), where P and Q are the partial traces of the covariance S
of the input columns (exact where S = P x Q). Only `dac` starts from the filters of the weights: of a channel's response
there matters what the other channels do not tell, and filters chosen in the norm of the channel's own covariance are
worse (on three of the bundled example's layers by 3 to 37 % of the output error, at ranks 1 to 4). The second factor
is then refit to the true outputs by least squares under the whole S. First filters come most important first, so that
the normal equations of a rank are a leading block of those of any larger one: a single Cholesky factorisation serves
all ranks up to its own, and tells their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.methods.moments import Moments, grouped, lifted_cholesky, output_power, square_roots

TINY = float(np.finfo(float).tiny)
CHUNK = 16  # blocks whose normal equations are made together
LIGHTLY = 1e-5  # shrinkage of the whitening; the exact second factor repairs what it misjudges


class Normal(NamedTuple):
    """The second factor's normal equations for some number of first filters.

    With z the features that these compute, ordered by rank, then by the B values, and L L^T the covariance of z,
    ``cholesky`` is L, (blocks, rank * B, rank * B), or None for the identity, and ``whitened`` is L^-1 E[z y^T] for the
    outputs y, (blocks, rank * B, M). ``explained`` is the part of E|y|^2 that each filter adds, (rank,).
    """

    cholesky: np.ndarray | None
    whitened: np.ndarray
    explained: np.ndarray


@dataclass(frozen=True, eq=False)
class NestedFactors:
    """The first filters of each block of outputs, most important first; the second factor follows from them.

    ``targets`` is the kernel, (blocks, A, B, M), and ``first`` (blocks, 1 or B, max_rank, A) the filters, of each of
    the B values where they have their own. Normal equations are set up for the largest rank asked for so far.
    """

    spec: ConvSpec
    chain_specs: Callable[[ConvSpec, Rank], tuple[ConvSpec, ...]]
    axes: str  # as in `factorise`
    moments: Moments | None
    power: float  # expected squared output
    targets: np.ndarray
    first: np.ndarray
    solved: dict[int, Normal] = field(default_factory=dict, repr=False)

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        rank = as_int(rank)
        return max(self.power - float(self._normal(rank).explained[:rank].sum()), 0.0)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's two convolutions, with the same norm for each pair of filters."""
        rank = as_int(rank)
        first, second = self.first[:, :, :rank], self.second(rank)
        if first.shape[1] > 1:  # the features of an input channel lie next to each other
            second = second.transpose(0, 1, 3, 2)
        specs = self.chain_specs(self.spec, rank)
        return balance(specs, (first.reshape(specs[0].weight_shape), second.reshape(specs[1].weight_shape)))

    def second(self, rank: int) -> np.ndarray:
        """The best second factor for the first `rank` filters: (blocks, M, rank, B)."""
        solved, cholesky = self.whitened(rank), self._normal(rank).cholesky
        blocks, size, outputs = solved.shape
        if cholesky is not None:
            solved = np.stack(
                [
                    linalg.solve_triangular(lower[:size, :size], right, lower=True, trans="T")
                    for lower, right in zip(cholesky, solved, strict=True)
                ]
            )
        return solved.transpose(0, 2, 1).reshape(blocks, outputs, rank, -1)

    def whitened(self, rank: int) -> np.ndarray:
        """What uncorrelated features of the first `rank` filters have in common with the outputs: (.., rank * B, M)."""
        return self._normal(rank).whitened[:, : rank * self.targets.shape[2]]

    def _normal(self, rank: int) -> Normal:
        """Normal equations of at least `rank` filters.

        Their number doubles, so that going through all ranks costs a third more than the highest at once.
        """
        known = max(self.solved, default=0)
        if rank > known:
            known = min(max(rank, 2 * known), self.first.shape[2])
            self.solved.clear()
            self.solved[known] = self._equations(known)
        return self.solved[known]

    def _equations(self, rank: int) -> Normal:
        first, kept = self.first[:, :, :rank], self.targets.shape[2]
        if self.moments is None:  # the filters are orthonormal
            cholesky = None
            whitened = (first @ self.targets.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
            whitened = whitened.reshape(len(first), rank * kept, -1)
        else:
            lowers: list[np.ndarray] = []
            crosses: list[np.ndarray] = []
            for group, members in enumerate(np.split(np.arange(len(first)), self.spec.groups)):
                window = _window(self.moments.covariance[group], self.spec, self.axes)
                for part in np.split(members, range(CHUNK, len(members), CHUNK)):
                    gram, cross = _normal_equations(first[part], self.targets[part], window)
                    lowers.extend(lifted_cholesky(block) for block in gram)
                    crosses.extend(cross)
            cholesky = np.stack(lowers)
            pairs = zip(cholesky, crosses, strict=True)
            whitened = np.stack([linalg.solve_triangular(lower, cross, lower=True) for lower, cross in pairs])
        return Normal(cholesky, whitened, np.sum(whitened**2, axis=(0, 2)).reshape(rank, kept).sum(axis=1))


def factorise(
    weight: np.ndarray,
    spec: ConvSpec,
    moments: Moments | None,
    chain_specs: Callable[[ConvSpec, Rank], tuple[ConvSpec, ...]],
    axes: str,
    *,
    own: bool = False,
    blocks: int | None = None,
) -> NestedFactors:
    """Decompose an OIHW weight for all ranks at once.

    Parameters
    ----------
    chain_specs : the method's geometry.
    axes : the kernel's axes that the first factor sums over, of "cij".
    own : whether each value of the other axes has first filters of its own.
    blocks : how many equal blocks of outputs have first filters of their own; without it, the groups of the site.
    """
    matrices = grouped(weight, spec)
    blocks = blocks or spec.groups
    targets = _unfolded(matrices.reshape(blocks, spec.out_channels // blocks, -1), spec, axes).transpose(0, 2, 3, 1)
    first = []
    for group, members in enumerate(np.split(targets, spec.groups)):
        window = None if own or moments is None else _window(moments.covariance[group], spec, axes)
        first.append(_filters(members, own, window))
    power = output_power(matrices, moments)
    return NestedFactors(spec, chain_specs, axes, moments, power, targets, np.concatenate(first))


def _unfolded(array: np.ndarray, spec: ConvSpec, axes: str) -> np.ndarray:
    """Columns (..., D) as (..., A, B); tensorly's matricize has no batch axes."""
    sizes = spec.weight_shape[1:]
    array = array.reshape(*array.shape[:-1], *sizes)
    front = array.ndim - 3
    order = axes + "".join(axis for axis in "cij" if axis not in axes)
    array = array.transpose(*range(front), *(front + "cij".index(axis) for axis in order))
    summed = int(np.prod([size for axis, size in zip("cij", sizes, strict=True) if axis in axes]))
    return array.reshape(*array.shape[:front], summed, -1)


def _window(covariance: np.ndarray, spec: ConvSpec, axes: str) -> np.ndarray:
    """The covariance of a group's columns, (D, D), as (B, A, A, B)."""
    half = _unfolded(covariance, spec, axes)  # (D, A, B)
    return np.ascontiguousarray(_unfolded(np.moveaxis(half, 0, -1), spec, axes).transpose(1, 0, 2, 3))


def _filters(targets: np.ndarray, own: bool, window: np.ndarray | None) -> np.ndarray:
    """All first filters of (blocks, A, B, M), of norm 1, most important first: (blocks, 1 or B, max_rank, A)."""
    blocks, summed, _, _ = targets.shape
    if own:
        return _left(targets.transpose(0, 2, 1, 3)).swapaxes(2, 3)
    if window is None:
        return _left(targets.reshape(blocks, 1, summed, -1)).swapaxes(2, 3)
    root, inverse = square_roots(np.einsum("bacb->ac", window), LIGHTLY)
    trace = max(float(np.einsum("baab->", window)), TINY)
    kept, _ = square_roots(np.einsum("baac->bc", window) / trace, LIGHTLY)
    matrices = root @ (kept @ targets).reshape(blocks, summed, -1)
    first = (inverse @ _left(matrices)).swapaxes(1, 2)
    return (first / np.maximum(np.linalg.norm(first, axis=2, keepdims=True), TINY))[:, None]


def _left(matrices: np.ndarray) -> np.ndarray:
    """Left singular vectors of (..., m, n) matrices, those of the largest singular values first: (..., m, min(m, n)).

    Those of wide matrices are the eigenvectors of their squares, several times as fast; the accuracy that this costs
    is that of vectors whose singular values are next to nothing, and these still span all the rest.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return np.linalg.svd(matrices, full_matrices=False)[0]
    return np.linalg.eigh(matrices @ matrices.swapaxes(-1, -2))[1][..., ::-1]


def _normal_equations(first: np.ndarray, targets: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features' covariances, (blocks, rank * B, rank * B), and those with the outputs, (..., M)."""
    blocks, summed, kept, outputs = targets.shape
    owners, rank = first.shape[1:3]
    filters = first.transpose(1, 0, 2, 3).reshape(owners, blocks * rank, summed)
    half = (filters @ window.reshape(kept, summed, -1)).reshape(kept, blocks, rank, -1)
    rows = half.transpose(1, 2, 0, 3).reshape(blocks, rank * kept, -1)  # one large product instead of many small ones
    cross = rows @ targets.reshape(blocks, -1, outputs)
    columns = half.reshape(kept, blocks, rank, summed, kept).transpose(1, 4, 3, 2, 0)
    gram = first @ columns.reshape(blocks, kept, summed, rank * kept)
    return gram.transpose(0, 2, 1, 3).reshape(blocks, rank * kept, -1), cross
