"""Decomposition in the norm of the loss: errors weighted by the Fisher information of a site's outputs.

To second order a change dy of a site's outputs moves the network's answer by a Kullback-Leibler divergence of
1/2 dy^T G dy nats, G the Fisher information of the outputs. With G the same at all positions, and the columns x of the
convolution independent of it (the Kronecker approximation of Martens & Grosse 2015), a changed weight costs
1/2 tr(G E S E^T), E the error of the weight and S the covariance of the columns. So the factors of G^(1/2) W, with
the last one multiplied by G^(-1/2), are those of the least predicted damage, and the damages of all sites and methods
are in one unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank
from tvm_lowrank.methods.moments import square_roots

if TYPE_CHECKING:
    from tvm_lowrank.methods import Factors

FISHER_SHRINKAGE = 0.1  # relative to the mean eigenvalue: what few images do not see is not free


@dataclass(frozen=True, eq=False)
class Weighted:
    """Factors of G^(1/2) W, as factors of W; `error` is tr(G E S E^T), twice the predicted damage in nats."""

    factors: Factors
    inverse: np.ndarray  # G^(-1/2) by blocks of output channels: (blocks, N/blocks, N/blocks)

    @property
    def spec(self) -> ConvSpec:
        return self.factors.spec

    def error(self, rank: Rank) -> float:
        """Expected squared output error, weighted."""
        return self.factors.error(rank)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's convolutions."""
        *front, last = self.factors.weights(rank)
        return (*front, mixed(self.inverse, last))


def roots(fisher: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal blocks of a Fisher information (N, N) to the powers 1/2 and -1/2: (blocks, N/blocks, N/blocks)."""
    unit = max(np.trace(fisher) / len(fisher), np.finfo(float).tiny)
    lifted = _diagonal_blocks(fisher + FISHER_SHRINKAGE * unit * np.eye(len(fisher)), blocks)
    pairs = [square_roots(part, 0.0) for part in lifted]
    return np.stack([root for root, _ in pairs]), np.stack([inverse for _, inverse in pairs])


def mixed(matrices: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """An OIHW weight with its output channels combined by (blocks, N/blocks, N/blocks) matrices."""
    blocks, size, _ = matrices.shape
    return (matrices.astype(weight.dtype) @ weight.reshape(blocks, size, -1)).reshape(weight.shape)


def _diagonal_blocks(matrix: np.ndarray, count: int) -> np.ndarray:
    """(N, N) to its (count, N/count, N/count) blocks on the diagonal."""
    size = len(matrix) // count
    return matrix.reshape(count, size, count, size)[range(count), :, range(count)]
