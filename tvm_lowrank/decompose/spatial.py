"""Separable decomposition, kh x 1 -> 1 x kw: the closed form of Tai et al. 2016 (Jaderberg 2014, scheme 2).

The kernel, unfolded to a (C*kh) x (kw*N) matrix T, is approximated by K vertical filters V over all input channels
followed by K -> N horizontal filters H. The truncated SVD of T is the global optimum for the weights. With moments the
SVD is taken of A^(1/2) T (B^(1/2) x I), where A (over channel and row) and B (over column) are the partial traces of
the covariance S of the input columns (S ~ A x B), and H is then refit to the true outputs by least squares under S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from tvm_lowrank.decompose.chain import ConvSpec, Rank, as_int
from tvm_lowrank.decompose.moments import Moments, grouped, output_power

RIDGE = 1e-7  # relative to the mean eigenvalue; keeps a singular covariance solvable


def max_rank(spec: ConvSpec) -> int:
    """The rank, per group, at which the decomposition is exact."""
    out, inner, height, width = spec.weight_shape
    return min(inner * height, out // spec.groups * width)


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: kh x 1 to `rank` channels a group, then 1 x kw."""
    vertical, horizontal, middle = spec.columns(), spec.rows(), spec.groups * as_int(rank)
    return (
        ConvSpec(
            spec.in_channels,
            middle,
            vertical.kernel,
            vertical.strides,
            vertical.padding,
            vertical.dilation,
            spec.groups,
        ),
        ConvSpec(
            middle,
            spec.out_channels,
            horizontal.kernel,
            horizontal.strides,
            horizontal.padding,
            horizontal.dilation,
            spec.groups,
        ),
    )


@dataclass(frozen=True, eq=False)
class SpatialFactors:
    """Per group the vertical filters, most important first, and what the refit of the horizontal ones needs.

    ``vertical`` is (g, max_rank, C/g * kh). ``gram`` is the covariance of the vertical filters' responses in the
    1 x kw window, (g, max_rank * kw, max_rank * kw), and ``cross`` their covariance with the outputs,
    (g, max_rank * kw, N/g); both are ordered by rank, then column, so that a rank is a leading block.
    """

    spec: ConvSpec
    vertical: np.ndarray
    gram: np.ndarray
    cross: np.ndarray
    errors: np.ndarray  # (max_rank + 1,): expected squared output error at each rank

    def horizontal(self, rank: int) -> np.ndarray:
        """The best horizontal filters for the first `rank` vertical ones: (g, N/g, rank, kw)."""
        size = rank * self.spec.kernel[1]
        solved = [
            linalg.cho_solve((linalg.cholesky(gram[:size, :size], lower=True), True), cross[:size])
            for gram, cross in zip(self.gram, self.cross, strict=True)
        ]
        return np.stack(solved).transpose(0, 2, 1).reshape(self.spec.groups, -1, rank, self.spec.kernel[1])

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's two convolutions, with the same norm for each pair of filters."""
        vertical, horizontal = self.vertical[:, : as_int(rank)], self.horizontal(as_int(rank))
        lengths = np.linalg.norm(vertical, axis=2), np.linalg.norm(horizontal, axis=(1, 3))
        scale = np.sqrt(np.divide(lengths[1], lengths[0], out=np.ones_like(lengths[0]), where=np.min(lengths, 0) > 0))
        first, second = chain_specs(self.spec, rank)
        return (
            (vertical * scale[:, :, None]).reshape(first.weight_shape),
            (horizontal / scale[:, None, :, None]).reshape(second.weight_shape),
        )

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        return float(self.errors[as_int(rank)])


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> SpatialFactors:
    """Decompose an OIHW weight for all ranks at once: one SVD, one Cholesky factorisation."""
    matrices = grouped(weight, spec)
    groups, rank, width = spec.groups, max_rank(spec), spec.kernel[1]
    parts = [
        _factorise_group(matrices[g], spec, None if moments is None else moments.covariance[g]) for g in range(groups)
    ]
    vertical, gram, cross = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    explained = np.zeros(rank)
    for g in range(groups):
        whitened = linalg.solve_triangular(linalg.cholesky(gram[g], lower=True), cross[g], lower=True)
        explained += np.sum(whitened**2, axis=1).reshape(rank, width).sum(axis=1)
    errors = np.maximum(output_power(matrices, moments) - np.concatenate([[0], np.cumsum(explained)]), 0)
    return SpatialFactors(spec, vertical, gram, cross, errors)


def _factorise_group(
    matrix: np.ndarray, spec: ConvSpec, covariance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vertical, gram, cross) of one group's (N/g, C/g * kh * kw) matrix."""
    out = len(matrix)
    _, inner, height, width = spec.weight_shape
    rank = max_rank(spec)
    unfolded = matrix.reshape(out, inner * height, width).transpose(1, 2, 0)  # T: (C*kh, kw, N)
    if covariance is None:
        left, values, right = np.linalg.svd(unfolded.reshape(inner * height, width * out), full_matrices=False)
        vertical = left[:, :rank].T
        cross = (values[:rank, None] * right[:rank]).reshape(rank * width, out)
        return vertical, np.eye(rank * width), cross
    window = covariance.reshape(inner * height, width, inner * height, width)
    root, inverse = _square_roots(np.einsum("ajbj->ab", window))
    column_root, _ = _square_roots(np.einsum("aiaj->ij", window) / max(np.trace(covariance), np.finfo(float).tiny))
    whitened = np.einsum("ab,bjn,ij->ain", root, unfolded, column_root, optimize=True)
    left, _, _ = np.linalg.svd(whitened.reshape(inner * height, width * out), full_matrices=False)
    vertical = (inverse @ left[:, :rank]).T
    vertical /= np.maximum(np.linalg.norm(vertical, axis=1, keepdims=True), np.finfo(float).tiny)
    half = np.einsum("ka,ajbi->kjbi", vertical, window, optimize=True)
    gram = np.einsum("kjbi,lb->kjli", half, vertical, optimize=True).reshape(rank * width, rank * width)
    gram = (gram + gram.T) / 2
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram) + np.finfo(float).tiny
    cross = np.einsum("kjbi,bin->kjn", half, unfolded, optimize=True).reshape(rank * width, out)
    return vertical, gram, cross


def _square_roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric positive matrix to the powers 1/2 and -1/2, with its smallest eigenvalues lifted."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, max(values[-1], np.finfo(float).tiny) * RIDGE)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
