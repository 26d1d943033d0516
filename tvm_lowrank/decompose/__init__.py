"""Decompositions of convolution weights: pure functions of numpy arrays.

A **method** turns (weight, geometry, moments) into factors from which the chain of any rank is cut:

    factors = METHODS["spatial"].factorise(weight, spec, moments)
    factors.errors[rank]      # expected squared output error, before a rank is chosen
    chain = decompose(weight, spec, method="spatial", rank=48, moments=moments)

Ranks count the channels between the convolutions, per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tvm_lowrank.decompose import channel, spatial
from tvm_lowrank.decompose.chain import Chain, Conv, ConvSpec, Pair, chain_macs
from tvm_lowrank.decompose.moments import Moments, grouped

__all__ = [
    "METHODS",
    "Chain",
    "Conv",
    "ConvSpec",
    "Factors",
    "Method",
    "Moments",
    "Pair",
    "chain_macs",
    "cut",
    "decompose",
    "grouped",
]


class Factors(Protocol):
    """What a method makes of a weight: all its ranks."""

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution that was factorised."""

    @property
    def errors(self) -> np.ndarray:
        """Expected squared output error, summed over channels, at ranks 0..max_rank: shape (max_rank + 1,)."""

    def weights(self, rank: int) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's convolutions."""

    def kernel(self, rank: int) -> np.ndarray:
        """The OIHW kernel that the chain composes to."""


@dataclass(frozen=True)
class Method:
    """A decomposition method: geometry without weights, and the factorisation itself."""

    name: str
    max_rank: Callable[[ConvSpec], int]
    chain_specs: Callable[[ConvSpec, int], tuple[ConvSpec, ...]]
    factorise: Callable[[np.ndarray, ConvSpec, Moments | None], Factors]
    applies: Callable[[ConvSpec], bool]

    def check(self, spec: ConvSpec, rank: int) -> None:
        """Raise ValueError, naming the range, unless the rank is possible here."""
        highest = self.max_rank(spec)
        if not self.applies(spec):
            raise ValueError(
                f"{self.name} does not apply to a {spec.kernel[0]}x{spec.kernel[1]} convolution of {spec.groups} groups"
            )
        if not isinstance(rank, int | np.integer) or not 1 <= rank <= highest:
            raise ValueError(f"rank {rank!r} of {self.name} is outside 1..{highest}")


def _not_depthwise(spec: ConvSpec) -> bool:
    return spec.groups == 1 or spec.groups < spec.in_channels


METHODS = {
    method.name: method
    for method in (
        Method("channel", channel.max_rank, channel.chain_specs, channel.factorise, _not_depthwise),
        Method(
            "spatial",
            spatial.max_rank,
            spatial.chain_specs,
            spatial.factorise,
            lambda spec: _not_depthwise(spec) and min(spec.kernel) > 1,
        ),
    )
}


def cut(method: str, factors: Factors, rank: int, weight: np.ndarray, moments: Moments | None = None) -> Chain:
    """The chain of one rank of factors of `weight`; with moments, the bias takes back the mean of the error."""
    spec, recipe = factors.spec, METHODS[method]
    recipe.check(spec, rank)
    convs = tuple(
        Conv(part, np.ascontiguousarray(array, dtype=np.float32))
        for part, array in zip(recipe.chain_specs(spec, rank), factors.weights(rank), strict=True)
    )
    if moments is None:
        return Chain(convs)
    missing = grouped(weight - factors.kernel(rank), spec)
    correction = np.einsum("gnd,gd->gn", missing, moments.mean).reshape(-1)
    return Chain(convs, correction.astype(np.float32))


def decompose(weight: np.ndarray, spec: ConvSpec, *, method: str, rank: int, moments: Moments | None = None) -> Chain:
    """Replace one convolution by a chain.

    Parameters
    ----------
    weight : OIHW array.
    method : one of ``METHODS``.
    rank : channels between the convolutions, per group.
    moments : input statistics; with them the expected output error is minimised and the bias corrected.

    Raises
    ------
    ValueError
        Unknown method (the known ones are named), a rank outside its range (which is named), a weight that does not
        fit the geometry or is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite")
    METHODS[method].check(spec, rank)
    return cut(method, METHODS[method].factorise(weight, spec, moments), rank, weight, moments)
