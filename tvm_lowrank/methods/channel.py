"""Channel decomposition, kh x kw -> 1 x 1: the linear response reconstruction of Zhang et al. 2015 (section 3.1).

The outputs y = Wx of a convolution lie near a subspace of the N channels. With U_d the leading d eigenvectors of their
covariance W S W^T (S the covariance of the input columns), W ~ U_d (U_d^T W) is the best rank-d approximation of the
outputs. Without moments S is the identity and this is the truncated SVD of the N x C*kh*kw matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.moments import AnyMoments, grouped


def max_rank(spec: ConvSpec) -> int:
    """The rank, per group, at which the decomposition is exact."""
    out, *inner = spec.weight_shape
    return min(out // spec.groups, int(np.prod(inner)))


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: kh x kw to `rank` channels a group, then 1 x 1."""
    middle = spec.groups * as_int(rank)
    return (
        replace(spec, out_channels=middle),
        ConvSpec(middle, spec.out_channels, (1, 1), groups=spec.groups),
    )


@dataclass(frozen=True, eq=False)
class ChannelFactors:
    """One eigendecomposition per group, from which every rank is cut."""

    spec: ConvSpec
    matrices: np.ndarray  # (g, N/g, D)
    basis: np.ndarray  # (g, N/g, max_rank), orthonormal columns, most important first
    errors: np.ndarray  # (max_rank + 1,): expected squared output error at each rank

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's two convolutions."""
        cut = self.basis[:, :, : as_int(rank)]
        inner = cut.swapaxes(1, 2).astype(self.matrices.dtype) @ self.matrices
        first, second = chain_specs(self.spec, rank)
        return inner.reshape(first.weight_shape), cut.reshape(second.weight_shape)

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        return float(self.errors[as_int(rank)])


def factorise(weight: np.ndarray, spec: ConvSpec, moments: AnyMoments | None = None) -> ChannelFactors:
    """Decompose an OIHW weight for all ranks at once."""
    matrices = grouped(weight, spec)
    covariance = matrices @ matrices.transpose(0, 2, 1) if moments is None else moments.between(matrices)
    values, vectors = np.linalg.eigh((covariance + covariance.transpose(0, 2, 1)) / 2)
    rank = max_rank(spec)
    kept = np.maximum(values[:, ::-1], 0)[:, :rank].sum(axis=0)
    power = float(np.trace(covariance, axis1=1, axis2=2).sum())
    errors = np.maximum(power - np.concatenate([[0], np.cumsum(kept)]), 0)
    errors[rank] = 0
    return ChannelFactors(spec, matrices, vectors[:, :, ::-1][:, :, :rank], errors)
