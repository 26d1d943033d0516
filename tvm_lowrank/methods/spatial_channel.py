"""Zhang et al.'s "3D" decomposition (2015, section 3.4): kh x 1 -> 1 x kw -> 1 x 1.

The spatial decomposition to K channels comes first; then the outputs H z of its horizontal layer (z the features of
the vertical one) are reduced to d channels by the channel decomposition. H is the best second factor for the true
outputs, so their error splits into what the vertical filters miss and what the leading d eigenvectors of the
covariance of H z leave out: the last two layers are the best ones, of rank d, for the vertical filters
(reduced-rank regression). One spatial factorisation serves all pairs (K, d), one N x N eigendecomposition all d of a K.

Where d is so large that the last two layers cost no less than the 1 x kw layer they come from, the two are one: such
pairs are not proposed, since they are `spatial` of rank K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvm_lowrank.methods import spatial
from tvm_lowrank.methods.chain import ConvSpec, Rank
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.methods.moments import Moments
from tvm_lowrank.methods.solvers import nested

VERTICAL = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)  # candidates for K, of the K at which `spatial` saves nothing
HORIZONTAL = (0.6, 0.75, 0.9)  # candidates for d, of the d at which the last two layers save nothing


def as_pair(rank: Rank) -> tuple[int, int]:
    """The two numbers of a rank (K, d)."""
    if not isinstance(rank, tuple) or len(rank) != 2:
        raise ValueError(f"rank {rank} is not a pair (channels after the first layer, after the second)")
    return int(rank[0]), int(rank[1])


def max_rank(spec: ConvSpec) -> tuple[int, int]:
    """The ranks, per group, at which the decomposition is exact."""
    return spatial.max_rank(spec), spec.out_channels // spec.groups


def worthwhile(spec: ConvSpec, rank: Rank) -> bool:
    """Whether the last two layers cost less than the one they come from."""
    vertical, reduced = as_pair(rank)
    out, width = spec.out_channels // spec.groups, spec.kernel[1]
    return reduced * (vertical * width + out) < vertical * width * out


def ranks(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """A sparse grid of worthwhile pairs of multiples of the vector lanes."""
    out, inner, height, width = spec.weight_shape
    out //= spec.groups
    most = min(spatial.max_rank(spec), out * inner * height * width / (inner * height + out * width))
    pairs = set()
    for vertical in _multiples(most, VERTICAL, lanes):
        limit = vertical * width * out / (vertical * width + out)
        pairs |= {(vertical, reduced) for reduced in _multiples(limit, HORIZONTAL, lanes)}
    return sorted(pair for pair in pairs if pair[0] <= spatial.max_rank(spec) and worthwhile(spec, pair))


def _multiples(whole: float, fractions: tuple[float, ...], lanes: int) -> list[int]:
    """Fractions of a number, rounded to positive multiples of the lanes."""
    return [max(round(whole * fraction / lanes), 1) * lanes for fraction in fractions]


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: kh x 1 to K channels a group, 1 x kw to d, 1 x 1."""
    vertical, reduced = as_pair(rank)
    narrow = replace(spec, out_channels=spec.groups * reduced)
    return (
        *spatial.chain_specs(narrow, vertical),
        replace(spec.pointwise(), in_channels=narrow.out_channels),
    )


@dataclass(frozen=True, eq=False)
class SpatialChannelFactors:
    """The spatial decomposition, and for each K met so far the principal components of its outputs."""

    spatial: nested.NestedFactors
    components: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution that was factorised."""
        return self.spatial.spec

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        vertical, reduced = as_pair(rank)
        kept, _ = self._outputs(vertical)
        return max(self.spatial.power - float(kept[:, :reduced].sum()), 0.0)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's three convolutions."""
        vertical, reduced = as_pair(rank)
        basis = self._outputs(vertical)[1][:, :, :reduced]  # (g, N/g, d)
        specs = chain_specs(self.spec, rank)
        first, second = self.spatial.weights(vertical)
        # the regression onto the components U^T y of the outputs is U^T times that onto y
        narrow = basis.swapaxes(1, 2) @ second.reshape(*basis.shape[:2], -1)
        return balance(specs, (first, narrow.reshape(specs[1].weight_shape), basis.reshape(specs[2].weight_shape)))

    def _outputs(self, vertical: int) -> tuple[np.ndarray, np.ndarray]:
        """Variances (g, N/g), largest first, and components (g, N/g, N/g) of the spatial decomposition's outputs."""
        if vertical not in self.components:
            features = self.spatial.whitened(vertical)
            values, vectors = np.linalg.eigh(features.transpose(0, 2, 1) @ features)
            self.components[vertical] = np.maximum(values[:, ::-1], 0), vectors[:, :, ::-1]
        return self.components[vertical]


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> SpatialChannelFactors:
    """Decompose an OIHW weight for all pairs of ranks."""
    return SpatialChannelFactors(spatial.factorise(weight, spec, moments))
