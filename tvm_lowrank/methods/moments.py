"""Second-order input statistics of a convolution, and the error that a changed weight has under them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.chain import ConvSpec

RIDGE = 1e-7  # relative to the mean eigenvalue
SHRINKAGE = 1e-3  # likewise, for whitening that nothing repairs later: dead channels must not make factors blow up


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the columns (patches) that a convolution multiplies, one entry per group, float64.

    A column has D = C/g * kh * kw entries in the order of an OIHW kernel's last three axes; zero padding counts as
    input, since the convolution sees it. ``mean`` is (g, D), ``covariance`` (g, D, D).
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        groups, size = self.mean.shape
        if self.covariance.shape != (groups, size, size):
            raise ValueError(f"covariance {self.covariance.shape} does not fit mean {self.mean.shape}")


def grouped(weight: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """An OIHW weight as one float64 matrix per group: (g, N/g, C/g * kh * kw)."""
    if weight.shape != spec.weight_shape:
        raise ValueError(f"weight {weight.shape} does not fit {spec}")
    return weight.astype(np.float64).reshape(spec.groups, spec.out_channels // spec.groups, -1)


def output_power(matrices: np.ndarray, moments: Moments | None) -> float:
    """Expected squared norm of the centred output of (g, N/g, D) matrices; the squared weights without moments."""
    if moments is None:
        return float(np.sum(matrices**2))
    return float(np.einsum("gnd,gde,gne->", matrices, moments.covariance, matrices, optimize=True))


def square_roots(matrix: np.ndarray, shrinkage: float = SHRINKAGE) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric positive matrix, shrunk towards its mean eigenvalue, to the powers 1/2 and -1/2."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, 0)
    values += shrinkage * (values.mean() or 1)  # without any variance all directions are the same
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def lifted_cholesky(gram: np.ndarray) -> np.ndarray:
    """L with L L^T a symmetric positive semi-definite matrix plus the least ridge, in steps of 10, that allows it.

    Covariances of few images or dead channels are singular, and rounding leaves some eigenvalues below zero.
    """
    gram = (gram + gram.T) / 2
    diagonal = np.diag_indices_from(gram)
    unit = np.trace(gram) / len(gram) + np.finfo(float).tiny
    ridge = RIDGE
    while True:
        lifted = gram.copy()
        lifted[diagonal] += ridge * unit
        try:
            return linalg.cholesky(lifted, lower=True, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError:
            if ridge > 1:
                raise
            ridge *= 10
