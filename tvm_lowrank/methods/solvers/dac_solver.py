"""Both factors of `dac` and of `dac_out` together, in the norm of the outputs.

The closed forms of `nested` choose the first filters without regard to what the other channels tell about the outputs
(`dac`), or as if channels and taps of the input were independent (`dac_out`). Here they are only the start: first
filters are improved, given the second factor, under the full covariance S of the input columns; the best second factor
is found for these, and so on in turn. The expected output error falls with every sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec, Rank, as_int
from tvm_lowrank.methods.moments import RIDGE, square_roots
from tvm_lowrank.methods.solvers.nested import LIGHTLY, TINY, NestedFactors
from tvm_lowrank.methods.solvers.tucker2_solver import leading

SWEEPS = 10
TOLERANCE = 5e-3  # stop when a sweep lowers the error by less than this part of it
STEPS = 5  # of conjugate gradients in a sweep

# better first filters of one group, from its (targets, first, second, covariance), shaped as in `nested`
Improve = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Solution(NamedTuple):
    """One rank: OIHW weights and their expected squared output error."""

    weights: tuple[np.ndarray, ...]
    error: float


@dataclass(frozen=True, eq=False)
class JointFactors:
    """Factors fitted together, for each rank when it is asked for, from where the closed form leads."""

    start: NestedFactors
    improve: Improve
    solved: dict[int, Solution] = field(default_factory=dict, repr=False)

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution that was factorised."""
        return self.start.spec

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels."""
        return self._solution(as_int(rank)).error

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's two convolutions, with the same norm for each pair of filters."""
        return self._solution(as_int(rank)).weights

    def _solution(self, rank: int) -> Solution:
        if rank not in self.solved:
            best = replace(self.start, first=self.start.first[:, :, :rank], solved={})
            exact = rank == self.start.first.shape[2]
            for _ in range(0 if exact else SWEEPS):
                found = replace(best, first=self._improved(best, rank), solved={})
                gain = best.error(rank) - found.error(rank)
                best = found if gain > 0 else best
                if gain <= TOLERANCE * best.error(rank):
                    break
            self.solved[rank] = Solution(best.weights(rank), best.error(rank))
        return self.solved[rank]

    def _improved(self, factors: NestedFactors, rank: int) -> np.ndarray:
        assert factors.moments is not None
        groups = (np.split(array, self.spec.groups) for array in (factors.targets, factors.first, factors.second(rank)))
        return np.concatenate([self.improve(*parts) for parts in zip(*groups, factors.moments.covariance, strict=True)])


def filters(targets: np.ndarray, first: np.ndarray, second: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Better depthwise filters for `dac`, channel by channel.

    With what the other channels leave of the outputs, y, each channel's r filters and their pointwise weights become
    the reduced-rank regression of y on the channel's window x: for Cov(y, x) Cov(x)^(-1/2) the truncated SVD.

    Parameters
    ----------
    targets : the kernel, (1, p, C, N).
    first, second : filters (1, C, r, p) and pointwise weights (1, N, r, C).
    covariance : of the columns, (C * p, C * p).
    """
    _, taps, _, outputs = targets.shape
    matrix = targets[0].transpose(2, 1, 0).reshape(outputs, -1)
    left = matrix - (second[0].transpose(2, 0, 1) @ first[0]).transpose(1, 0, 2).reshape(outputs, -1)
    improved = first.copy()
    for channel, found in enumerate(improved[0]):
        own = slice(channel * taps, (channel + 1) * taps)
        _, inverse = square_roots(covariance[own, own], LIGHTLY)
        left[:, own] = matrix[:, own]
        target = left @ covariance[own].T @ inverse
        basis = leading(target.T @ target, len(found))[1]
        found[...] = basis.T @ inverse
        left[:, own] -= target @ basis @ found
    return improved


def mixtures(targets: np.ndarray, first: np.ndarray, second: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Better mixtures of the input channels for `dac_out`.

    Least squares given the depthwise filters: for each output a system of r * C unknowns, solved by conjugate gradients
    that are preconditioned with the systems' form for S ~ P x Q, P over channels and Q over taps.

    Parameters
    ----------
    targets : the kernel, (N, C, p, 1).
    first, second : mixtures (N, 1, r, C) and depthwise filters (N, 1, r, p).
    covariance : of the columns, (C * p, C * p).
    """
    outputs, inner, taps, _ = targets.shape
    found, depthwise = first[:, 0], second[:, 0]
    window = covariance.reshape(inner, taps, inner, taps)
    _, root = square_roots(np.einsum("cpdp->cd", window), LIGHTLY)
    channels = root @ root
    gram = depthwise @ np.einsum("cpcq->pq", window) @ depthwise.swapaxes(1, 2) / max(np.trace(covariance), TINY)
    unit = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    local = np.linalg.inv(gram + np.where(unit > 0, RIDGE * unit, 1) * np.eye(gram.shape[1]))

    def gradient(kernels: np.ndarray) -> np.ndarray:
        return depthwise @ (kernels.reshape(outputs, -1) @ covariance).reshape(kernels.shape).swapaxes(1, 2)

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * b, axis=(1, 2), keepdims=True)

    residual = gradient(targets[..., 0] - found.swapaxes(1, 2) @ depthwise)
    direction = local @ residual @ channels
    slope = dot(residual, direction)
    for _ in range(STEPS):
        image = gradient(direction.swapaxes(1, 2) @ depthwise)
        length = slope / np.maximum(dot(direction, image), TINY)
        found = found + length * direction
        residual -= length * image
        step = local @ residual @ channels
        previous, slope = slope, dot(residual, step)
        direction = step + slope / np.maximum(previous, TINY) * direction
    return found[:, None]
