"""Second-order input statistics of a convolution, and the error that a changed weight has under them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.chain import ConvSpec

RIDGE = 1e-7  # relative to the mean eigenvalue
SHRINKAGE = 1e-3  # likewise, for whitening that nothing repairs later: dead channels must not make factors blow up
FEW = 4  # samples for each entry of a column, below which a covariance is shrunk: rank and error would be those of luck
WIDEST = 8192  # inputs of an output whose covariance is made; that of VGG-16's first linear layer would take 5 GB


def wide(spec: ConvSpec) -> bool:
    """Whether an output has too many inputs for their covariance."""
    return math.prod(spec.weight_shape[1:]) > WIDEST


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

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> Moments:
        """Those of so many samples; of few, the covariance is `shrunk_to_few`."""
        return cls(mean, shrunk_to_few(covariance, count))

    def white(self) -> Moments:
        """The same mean and total variance, without directions."""
        return Moments(self.mean, white(self.covariance))

    def between(self, matrices: np.ndarray) -> np.ndarray:
        """The covariance of the outputs of (g, N/g, D) matrices, (g, N/g, N/g)."""
        return matrices @ self.covariance @ matrices.transpose(0, 2, 1)


@dataclass(frozen=True, eq=False)
class SampledMoments:
    """Mean of the columns of a wide convolution, and their covariance as the samples that it is made of.

    With X the centred samples the covariance is (1 - s) X^T X / n + s t I, t the mean variance of an entry. The
    samples are far fewer than the entries, so X^T X alone would take most changes to be free. s is the shrinkage that
    is best for Gaussians (OAS; Chen, Wiesel, Eldar & Hero 2010, equation 23). ``mean`` is (g, D), ``samples``
    (g, n, D) float32, ``shrinkage`` (g,).
    """

    mean: np.ndarray
    samples: np.ndarray
    shrinkage: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray) -> SampledMoments:
        """Those of (g, n, D) columns."""
        _, count, size = columns.shape
        mean = columns.mean(axis=1, dtype=np.float64)
        centred = columns - mean[:, None].astype(np.float32)
        gram = centred @ centred.transpose(0, 2, 1) / count  # has the eigenvalues of the covariance
        trace = np.trace(gram, axis1=1, axis2=2).astype(np.float64)
        squares = np.sum(np.square(gram, dtype=np.float64), axis=(1, 2))
        return cls(mean, centred, shrinkage_of(count, size, trace, squares))

    def white(self) -> SampledMoments:
        """The same mean and total variance, without directions."""
        return SampledMoments(self.mean, self.samples, np.ones_like(self.shrinkage))

    def between(self, matrices: np.ndarray) -> np.ndarray:
        """The covariance of the outputs of (g, N/g, D) matrices, (g, N/g, N/g)."""
        _, count, size = self.samples.shape
        outputs = matrices.astype(np.float32) @ self.samples.transpose(0, 2, 1)
        seen = (outputs @ outputs.transpose(0, 2, 1)).astype(np.float64) / count
        variance = np.einsum("gnd,gnd->g", self.samples, self.samples) / (count * size)
        alike = variance[:, None, None] * (matrices @ matrices.transpose(0, 2, 1))
        share = self.shrinkage[:, None, None]
        return (1 - share) * seen + share * alike


def shrinkage_of(count: int, size: int, trace: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """How much to shrink covariances (g,) of so many samples, by their traces and those of their squares (OAS)."""
    apart = (count + 1 - 2 / size) * (squares - trace**2 / size)
    whole = (1 - 2 / size) * squares + trace**2
    return np.clip(np.divide(whole, apart, out=np.ones_like(trace), where=apart > 0), 0, 1)


def shrunk_to_few(matrices: np.ndarray, count: int) -> np.ndarray:
    """Second moments (g, D, D) of so many samples, shrunk as in `SampledMoments` if these are few."""
    size = matrices.shape[1]
    if count >= FEW * size:
        return matrices
    trace = np.trace(matrices, axis1=1, axis2=2)
    share = shrinkage_of(count, size, trace, np.sum(matrices**2, axis=(1, 2)))[:, None, None]
    return (1 - share) * matrices + share * white(matrices)


def white(matrices: np.ndarray) -> np.ndarray:
    """Multiples of the identity with the traces of (g, D, D)."""
    size = matrices.shape[1]
    return np.trace(matrices, axis1=1, axis2=2)[:, None, None] / size * np.eye(size)


AnyMoments = Moments | SampledMoments


def grouped(weight: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """An OIHW weight as one matrix per group, (g, N/g, C/g * kh * kw): float64, of wide convolutions float32."""
    if weight.shape != spec.weight_shape:
        raise ValueError(f"weight {weight.shape} does not fit {spec}")
    matrices = weight.reshape(spec.groups, spec.out_channels // spec.groups, -1)
    return matrices.astype(np.float32 if wide(spec) else np.float64, copy=False)


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
