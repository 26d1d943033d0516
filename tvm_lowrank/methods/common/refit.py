"""The last factor of any chain, refit exactly: least squares on the features that the other factors compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.chain import ConvSpec, compose
from tvm_lowrank.methods.moments import Moments, grouped, lifted_cholesky


def refit_last(
    weight: np.ndarray,
    spec: ConvSpec,
    specs: Sequence[ConvSpec],
    weights: Sequence[np.ndarray],
    moments: Moments,
) -> tuple[np.ndarray, ...]:
    """The chain's OIHW weights, with the last one minimising the expected output error.

    With x the columns of the site, z = Fx what the last convolution sees of the chain's front, and W the site's
    weights, the minimiser of E|Wx - Pz|^2 is P = W S F^T (F S F^T)^-1, for each group of the last convolution alone.

    Parameters
    ----------
    weight, spec : the site's OIHW weight and geometry.
    specs, weights : the chain's geometries and OIHW weights.
    moments : the site's input statistics.
    """
    last = specs[-1]
    front = compose(specs[:-1], weights[:-1])  # (R, C, fh, fw), without groups
    rows = grouped(weight, spec)
    features = _features(front, last.kernel)  # (R, lh, lw, C, kh, kw)
    per_last, per_site = last.in_channels // last.groups, spec.in_channels // spec.groups
    solved = []
    for group in range(last.groups):
        site = group * spec.groups // last.groups
        inner = features[group * per_last : (group + 1) * per_last, :, :, site * per_site : (site + 1) * per_site]
        matrix = inner.reshape(-1, rows.shape[2])
        outputs = _rows_of(rows, group, last.groups)
        spread = matrix @ moments.covariance[site]
        lower = lifted_cholesky(spread @ matrix.T)
        solved.append(linalg.cho_solve((lower, True), spread @ outputs.T).T)
    return (*weights[:-1], np.concatenate(solved).reshape(last.weight_shape))


def _features(front: np.ndarray, kernel: tuple[int, int]) -> np.ndarray:
    """What the last convolution's window holds as a linear map of the site's columns: (R, lh, lw, C, kh, kw)."""
    _, _, height, width = front.shape
    return np.einsum("rcab,alh,bmw->rlmchw", front, _taps(height, kernel[0]), _taps(width, kernel[1]), optimize=True)


def _taps(front: int, last: int) -> np.ndarray:
    """1 where tap a of the front and tap l of the last factor make tap a + l of the site (one of them is 0)."""
    a, tap, site = np.ogrid[:front, :last, : front * last]
    return (a + tap == site).astype(float)


def _rows_of(rows: np.ndarray, group: int, groups: int) -> np.ndarray:
    """The (N/groups, D) rows of the site's (g, N/g, D) matrices that a group of the last convolution makes."""
    flat = rows.reshape(-1, rows.shape[2])
    size = len(flat) // groups
    return flat[group * size : (group + 1) * size]
