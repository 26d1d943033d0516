"""How many components of a noisy matrix are signal: empirical variational Bayes (Nakajima et al. 2013).

The global analytic solution of fully observed empirical variational Bayes matrix factorisation needs the singular
values s_h alone. For an L x M matrix, L <= M, it keeps those with s_h^2 > M sigma^2 x, where x is a threshold that
depends on L/M only and the noise variance sigma^2 minimises a scalar free energy. Kim et al. 2016 set Tucker-2's ranks
by it; MUSCO (Gusak et al. 2019) weakens them.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from tvm_lowrank.methods.solvers.algebra import unfold

FLOOR = 1e-14  # of the largest squared singular value: what rounding makes of a zero


def evbmf_rank(matrix: np.ndarray) -> int:
    """The number of signal components in an (L, M) matrix of unknown noise variance; 0 for noise alone."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("the matrix has entries that are not finite")
    low, high = sorted(matrix.shape)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    if squares[0] == 0:
        return 0
    squares = np.maximum(squares, FLOOR * squares[0])
    alpha = low / high
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)

    def energy(log_variance: float) -> float:
        x = squares / (high * math.exp(log_variance))
        noise, signal = x[x <= threshold], x[x > threshold]
        gain = ((signal - 1 - alpha) + np.sqrt((signal - 1 - alpha) ** 2 - 4 * alpha)) / 2
        return float(
            np.sum(noise - np.log(noise))
            + np.sum(signal - gain + np.log((gain + 1) / signal) + alpha * np.log(gain / alpha + 1))
        )

    # the variance is at most the mean square, and at least what leaves L / (1 + alpha) components
    most = min(math.ceil(low / (1 + alpha)), low) - 1
    rest = squares[most:]
    lowest, highest = sorted((max(rest[0] / threshold, rest.mean()) / high, squares.sum() / (low * high)))
    # the free energy has kinks and may have several minima
    grid = np.linspace(math.log(lowest), math.log(highest), 64)
    best = int(np.argmin([energy(value) for value in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(energy, bounds=bounds, method="bounded").x if bounds[1] > bounds[0] else grid[best]
    variance = math.exp(min(found, grid[best], key=energy))
    return int(np.sum(squares > high * variance * threshold))


def suggest_ranks(weight: np.ndarray, *, weakening: float = 0.0) -> tuple[int, int]:
    """Tucker-2 ranks (R3, R4) for the OIHW weight of one group, from its unfoldings along C and N.

    Parameters
    ----------
    weakening : how far to go from the estimated ranks (0) back to the full ones (1). MUSCO's factor is 1 - weakening.
    """
    if not 0 <= weakening <= 1:
        raise ValueError(f"weakening {weakening} is outside 0..1")
    if weight.ndim != 4:
        raise ValueError(f"expected an OIHW weight, got shape {weight.shape}")
    unfolded = unfold(weight, 1), unfold(weight, 0)
    found, full = [evbmf_rank(matrix) for matrix in unfolded], [min(matrix.shape) for matrix in unfolded]
    inner, outer = (max(1, round(few + weakening * (all_ - few))) for few, all_ in zip(found, full, strict=True))
    return inner, outer
