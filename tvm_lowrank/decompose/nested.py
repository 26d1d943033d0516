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
of the input columns (exact where S = P x Q). Only `dac` keeps the filters of the weights: of a channel's response
there matters what the other channels do not tell, and filters chosen in the norm of the channel's own covariance are
worse after the refit (on three of the bundled example's layers by 3 to 37 % of the output error, at ranks 1 to 4). The
second factor is then refit to the true outputs by least squares under the whole S. First filters come most important
first, so that the normal equations of a rank are a leading block of those of any larger one: a single Cholesky
factorisation serves all ranks, and tells their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from tvm_lowrank.decompose.chain import ConvSpec, Rank, as_int
from tvm_lowrank.decompose.moments import Moments, grouped, output_power, positive, square_roots

TINY = float(np.finfo(float).tiny)
CHUNK = 16  # blocks whose normal equations are made together
LIGHTLY = 1e-5  # shrinkage of the whitening; the exact second factor repairs what it misjudges


@dataclass(frozen=True, eq=False)
class NestedFactors:
    """The first filters of each block of outputs, most important first, and the second factor's normal equations.

    ``first`` is (blocks, 1 or B, max_rank, A): the filters, of each of the B values where they have their own. With
    z the features they compute, ordered by rank, then value, and L L^T the covariance of z, ``cholesky`` is L,
    (blocks, max_rank * B, max_rank * B), or None for the identity, and ``whitened`` is L^-1 E[z y^T] for the outputs
    y, (blocks, max_rank * B, M).
    """

    spec: ConvSpec
    chain_specs: Callable[[ConvSpec, Rank], tuple[ConvSpec, ...]]
    first: np.ndarray
    cholesky: np.ndarray | None
    whitened: np.ndarray
    errors: np.ndarray  # (max_rank + 1,): expected squared output error at each rank

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        return float(self.errors[as_int(rank)])

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's two convolutions, with the same norm for each pair of filters."""
        rank = as_int(rank)
        first, second = self.first[:, :, :rank], self._second(rank)
        blocks, owners, _, _ = first.shape
        # one length for each first filter, (blocks, owners, rank)
        size = np.linalg.norm(first, axis=3)
        sums = np.sum(second**2, axis=1).reshape(blocks, rank, owners, -1).sum(axis=3).transpose(0, 2, 1)
        scale = np.sqrt(np.divide(np.sqrt(sums), size, out=np.ones_like(size), where=(sums > 0) & (size > 0)))
        second = second / np.repeat(scale, second.shape[3] // owners, axis=1).transpose(0, 2, 1)[:, None]
        if owners > 1:  # the features of an input channel lie next to each other
            second = second.transpose(0, 1, 3, 2)
        specs = self.chain_specs(self.spec, rank)
        return (first * scale[..., None]).reshape(specs[0].weight_shape), second.reshape(specs[1].weight_shape)

    def _second(self, rank: int) -> np.ndarray:
        """The best second factor for the first `rank` filters: (blocks, M, rank, B)."""
        blocks, size, outputs = self.whitened.shape
        size = size // self.first.shape[2] * rank
        solved = self.whitened[:, :size]
        if self.cholesky is not None:
            solved = np.stack(
                [
                    linalg.solve_triangular(lower[:size, :size], right, lower=True, trans="T")
                    for lower, right in zip(self.cholesky, solved, strict=True)
                ]
            )
        return solved.transpose(0, 2, 1).reshape(blocks, outputs, rank, -1)


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
    order = axes + "".join(axis for axis in "cij" if axis not in axes)
    sizes = dict(zip("cij", spec.weight_shape[1:], strict=True))
    summed = int(np.prod([sizes[axis] for axis in axes]))
    kept = int(np.prod(list(sizes.values()))) // summed

    def unfolded(array: np.ndarray) -> np.ndarray:
        """(..., D) to (..., A, B)."""
        array = array.reshape(*array.shape[:-1], *sizes.values())
        last = [array.ndim - 3 + "cij".index(axis) for axis in order]
        array = array.transpose(*range(array.ndim - 3), *last)
        return array.reshape(*array.shape[:-3], summed, kept)

    targets = unfolded(matrices.reshape(blocks, spec.out_channels // blocks, -1)).transpose(0, 2, 3, 1)
    parts = []
    for group, members in enumerate(np.split(targets, spec.groups)):
        window = None
        if moments is not None:
            half = unfolded(moments.covariance[group])  # (D, A, B)
            window = np.ascontiguousarray(unfolded(np.moveaxis(half, 0, -1)).transpose(1, 0, 2, 3))
        parts.append(_factorise_group(members, window, own))
    first, whitened = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    lower = [part[2] for part in parts if part[2] is not None]
    explained = np.sum(whitened**2, axis=(0, 2)).reshape(first.shape[2], kept).sum(axis=1)
    errors = np.maximum(output_power(matrices, moments) - np.concatenate([[0], np.cumsum(explained)]), 0)
    return NestedFactors(spec, chain_specs, first, np.concatenate(lower) if lower else None, whitened, errors)


def _factorise_group(
    targets: np.ndarray, window: np.ndarray | None, own: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(first, whitened, cholesky), as in `NestedFactors`, of the blocks of one group of the site.

    ``targets`` is (blocks, A, B, M), ``window`` the covariance of the columns, (B, A, A, B).
    """
    if window is None:
        first = _filters(targets, own)
        cross = (first @ targets.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        return first, cross.reshape(len(targets), -1, targets.shape[3]), None  # the filters are orthonormal
    first = _filters(targets, own, None if own else window)
    whitened, cholesky = [], []
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        for gram, cross in zip(*_normal_equations(first[part], targets[part], window), strict=True):
            cholesky.append(linalg.cholesky(positive(gram), lower=True))
            whitened.append(linalg.solve_triangular(cholesky[-1], cross, lower=True))
    return first, np.stack(whitened), np.stack(cholesky)


def _filters(targets: np.ndarray, own: bool, window: np.ndarray | None = None) -> np.ndarray:
    """All first filters of (blocks, A, B, M), of norm 1, most important first: (blocks, 1 or B, max_rank, A)."""
    blocks, summed, _, _ = targets.shape
    if own:
        return np.linalg.svd(targets.transpose(0, 2, 1, 3), full_matrices=False)[0].swapaxes(2, 3)
    if window is None:
        return np.linalg.svd(targets.reshape(blocks, 1, summed, -1), full_matrices=False)[0].swapaxes(2, 3)
    root, inverse = square_roots(np.einsum("bacb->ac", window), LIGHTLY)
    trace = max(float(np.einsum("baab->", window)), TINY)
    kept, _ = square_roots(np.einsum("baac->bc", window) / trace, LIGHTLY)
    matrices = root @ (kept @ targets).reshape(blocks, summed, -1)
    first = (inverse @ np.linalg.svd(matrices, full_matrices=False)[0]).swapaxes(1, 2)
    return (first / np.maximum(np.linalg.norm(first, axis=2, keepdims=True), TINY))[:, None]


def _normal_equations(first: np.ndarray, targets: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features' covariances, (blocks, max_rank * B, max_rank * B), and those with the outputs, (..., M)."""
    blocks, summed, kept, outputs = targets.shape
    owners, rank = first.shape[1:3]
    filters = first.transpose(1, 0, 2, 3).reshape(owners, blocks * rank, summed)
    half = (filters @ window.reshape(kept, summed, -1)).reshape(kept, blocks, rank, summed, kept)
    cross = half.reshape(kept, blocks, rank, -1).transpose(1, 0, 2, 3) @ targets.reshape(blocks, 1, -1, outputs)
    half = half.transpose(1, 4, 3, 2, 0).reshape(blocks, kept, summed, rank * kept)
    gram = (first @ half).transpose(0, 2, 1, 3)
    return gram.reshape(blocks, rank * kept, -1), cross.transpose(0, 2, 1, 3).reshape(blocks, rank * kept, outputs)
