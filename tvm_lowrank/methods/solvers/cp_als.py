"""Starts for the CP decomposition, and the two classic algorithms: alternating least squares and greedy deflation.

ALS gives the Gauss-Newton solver of `cp_solver` its starting point. Alone it is slow where terms nearly cancel; greedy
deflation (Denton et al. 2014) is not even locally optimal, since the best rank-R approximation does not contain the
best rank-1 approximation. Both are here to be compared with (Lebedev et al. 2015, table 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.solvers.algebra import unfold
from tvm_lowrank.methods.solvers.cp_terms import TINY, balanced, khatri_rao, mttkrps, split, squared, tensor_of

Report = Callable[[int, float], None]


def als(
    tensor: np.ndarray, stack: np.ndarray, *, penalty: float = 0.0, sweeps: int = 20, report: Report | None = None
) -> np.ndarray:
    """Alternating least squares: every mode's factor is the best one for the others, in turn.

    It minimises the penalised error of `cp_solver`. ``report`` is called with each sweep's number and relative error.
    tensorly's parafac has no such penalty, and takes 7 times as long at 256 x 256 x 9 and rank 64.
    """
    shape, total = tensor.shape, squared(tensor)
    stack = balanced(stack, shape)
    for sweep in range(sweeps):
        factors = split(stack, shape)
        grams = [factor.T @ factor for factor in factors]
        for mode, product in enumerate(mttkrps(tensor, factors)):
            gram = np.prod([gram for other, gram in enumerate(grams) if other != mode], axis=0)
            factors[mode][...] = _divided(product, gram, penalty)
            grams[mode] = factors[mode].T @ factors[mode]
        # column norms would drift apart
        stack = balanced(stack, shape)
        if report is not None:
            report(sweep, float(np.sqrt(squared(tensor - tensor_of(stack, shape)) / max(total, TINY))))
    return stack


def greedy(tensor: np.ndarray, rank: int, *, sweeps: int = 50, seed: int = 0) -> np.ndarray:
    """Rank-1 deflation: each term is the best one for what the others left (Denton et al. 2014)."""
    rng, missing, terms = np.random.default_rng(seed), tensor, []
    for _ in range(rank):
        term = als(missing, start(missing, 1, rng, hosvd=True), sweeps=sweeps)
        missing = missing - tensor_of(term, tensor.shape)
        terms.append(term)
    return np.concatenate(terms, axis=1)


def start(tensor: np.ndarray, rank: int, rng: np.random.Generator, *, hosvd: bool) -> np.ndarray:
    """A stack of unit columns to start from: leading singular vectors of each mode, then noise; or noise only."""
    factors = []
    for mode, size in enumerate(tensor.shape):
        factor = rng.standard_normal((size, rank)).astype(tensor.dtype)
        if hosvd:
            unfolded = unfold(tensor, mode)
            # tensorly's SVDs of the unfoldings take 9 times as long at 256 x 256 x 9
            vectors = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
            factor[:, : vectors.shape[1]] = vectors
        factors.append(factor / np.linalg.norm(factor, axis=0))
    return np.concatenate(factors)


def with_best_first(tensor: np.ndarray, rest: Sequence[np.ndarray]) -> np.ndarray:
    """A balanced stack of the (I_m, R) factors of all modes but the first, and the best first one for them."""
    grams = [factor.T @ factor for factor in rest]
    # tensorly's unfolding_dot_khatri_rao takes 1.4 times as long at 64 x 64 x 9 and rank 64, 1.1 times at 256 x 256 x 9
    product = tensor.reshape(len(tensor), -1) @ khatri_rao(rest)
    first = _divided(product, np.prod(grams, axis=0), 0.0)
    return balanced(np.concatenate([first, *rest]), tensor.shape)


def _divided(product: np.ndarray, gram: np.ndarray, penalty: float) -> np.ndarray:
    """product (gram + penalty diag(gram))^-1; a penalty above rounding keeps dependent columns solvable."""
    lengths = np.sqrt(np.maximum(np.diag(gram), np.finfo(gram.dtype).tiny))
    gram = gram / lengths[:, None] / lengths
    gram[np.diag_indices_from(gram)] += max(penalty, 2 * len(gram) * np.finfo(gram.dtype).eps)
    return linalg.cho_solve((linalg.cholesky(gram, lower=True), True), (product / lengths).T).T / lengths
