"""Decompositions of convolution weights: pure functions of numpy arrays.

A **method** turns (weight, geometry, moments) into factors from which the chain of any rank is cut:

    chain = decompose(weight, spec, method="spatial", rank=48, moments=moments)

or, one factorisation for many ranks:

    factors = factorise(weight, spec, method="spatial", moments=moments)
    factors.error(48)                                      # expected squared output error
    chain = cut("spatial", factors, 48, weight, moments)

A rank counts the channels between the convolutions, per group of the site; methods with several such numbers take a
tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tvm_lowrank.methods import btd, channel, channel_in, cp, dac, spatial, spatial_channel, svd, tucker2
from tvm_lowrank.methods.chain import Chain, Conv, ConvSpec, Pair, Rank, chain_macs, compose, response
from tvm_lowrank.methods.common.fisher import Weighted, mixed, roots
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import AnyMoments, Moments, SampledMoments, grouped, wide

__all__ = [
    "METHODS",
    "AnyMoments",
    "Chain",
    "Conv",
    "ConvSpec",
    "Factors",
    "Method",
    "Moments",
    "Pair",
    "Rank",
    "SampledMoments",
    "chain_macs",
    "compose",
    "cut",
    "decompose",
    "factorise",
    "grouped",
]


class Factors(Protocol):
    """What a method makes of a weight, for all ranks."""

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution that was factorised."""

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels (squared weight error without moments)."""

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's convolutions."""


@dataclass(frozen=True)
class Method:
    """A decomposition method: geometry without weights, and the factorisation itself.

    ``applies(spec)`` says whether the method makes sense of a geometry; ``max_rank(spec)`` is the largest rank (for a
    tuple, of each number); ``ranks(spec, lanes)`` lists ranks worth considering where vectors hold `lanes` values;
    ``chain_specs(spec, rank)`` is the chain's geometry. ``refits`` says that `factorise` leaves the last factor to be
    refit; otherwise it is already the best one. ``solves``: every rank takes a solve of its own, of up to a minute,
    where the other methods cut all ranks from one factorisation. ``mixable(spec)`` is the number of groups of the
    last convolution. ``starts``: the solve can start near another's result. ``wide``: it needs the covariance of the
    outputs only, so it serves convolutions too wide for that of their inputs.
    """

    name: str
    applies: Callable[[ConvSpec], bool]
    max_rank: Callable[[ConvSpec], Rank]
    ranks: Callable[[ConvSpec, int], Sequence[Rank]]
    chain_specs: Callable[[ConvSpec, Rank], tuple[ConvSpec, ...]]
    factorise: Callable[[np.ndarray, ConvSpec, Any], Factors]
    refits: bool = False
    solves: bool = False
    starts: bool = False
    wide: bool = False
    mixable: Callable[[ConvSpec], int] = lambda spec: spec.groups

    def check(self, spec: ConvSpec, rank: Rank) -> None:
        """Raise ValueError, naming the range, unless the rank is possible here."""
        if not self.applies(spec):
            kernel = f"{spec.kernel[0]}x{spec.kernel[1]}"
            raise ValueError(f"{self.name} does not apply to a {kernel} convolution of {spec.groups} groups")
        highest = self.max_rank(spec)
        numbers, limits = _numbers(rank), _numbers(highest)
        whole = all(isinstance(number, int | np.integer) for number in numbers)
        if (
            len(numbers) != len(limits)
            or not whole
            or not all(1 <= n <= m for n, m in zip(numbers, limits, strict=True))
        ):
            span = ", ".join(f"1..{limit}" for limit in limits)
            raise ValueError(f"rank {rank!r} of {self.name} is outside {span}")


def _numbers(rank: Rank) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)


def _not_depthwise(spec: ConvSpec) -> bool:
    return spec.groups == 1 or spec.groups < spec.in_channels


def _larger(spec: ConvSpec) -> bool:
    return _not_depthwise(spec) and max(spec.kernel) > 1


def _both_axes(spec: ConvSpec) -> bool:
    return _not_depthwise(spec) and min(spec.kernel) > 1


def _grid(max_rank: Callable[[ConvSpec], int]) -> Callable[[ConvSpec, int], Sequence[Rank]]:
    """Multiples of the vector lanes: other ranks cost the time of the next multiple."""
    return lambda spec, lanes: range(lanes, max_rank(spec) + 1, lanes)


METHODS = {
    method.name: method
    for method in (
        Method(
            "channel",
            _larger,
            channel.max_rank,
            _grid(channel.max_rank),
            channel.chain_specs,
            channel.factorise,
            wide=True,
        ),
        Method(
            "channel_in",
            _larger,
            channel_in.max_rank,
            _grid(channel_in.max_rank),
            channel_in.chain_specs,
            channel_in.factorise,
        ),
        Method(
            "spatial", _both_axes, spatial.max_rank, _grid(spatial.max_rank), spatial.chain_specs, spatial.factorise
        ),
        Method(
            "spatial_rows",
            _both_axes,
            spatial.max_rank_rows,
            _grid(spatial.max_rank_rows),
            spatial.chain_specs_rows,
            spatial.factorise_rows,
        ),
        Method(
            "spatial_channel",
            _both_axes,
            spatial_channel.max_rank,
            spatial_channel.ranks,
            spatial_channel.chain_specs,
            spatial_channel.factorise,
        ),
        Method(
            "tucker2",
            _larger,
            tucker2.max_rank,
            tucker2.ranks,
            tucker2.chain_specs,
            tucker2.factorise,
            solves=True,
        ),
        Method("btd", _larger, btd.max_rank, btd.ranks, btd.chain_specs, btd.factorise, solves=True),
        *(
            Method(
                name,
                form.applies,
                form.max_rank,
                form.ranks,
                form.chain_specs,
                form.factorise,
                solves=True,
                starts=True,
            )
            for name, form in (("cp4", cp.CP4), ("cp3", cp.CP3))
        ),
        Method("dac", _larger, dac.max_rank, dac.ranks, dac.chain_specs, dac.factorise, solves=True),
        Method(
            "dac_out",
            _larger,
            dac.max_rank_out,
            dac.ranks_out,
            dac.chain_specs_out,
            dac.factorise_out,
            solves=True,
            mixable=lambda spec: spec.out_channels,
        ),
        Method("svd", svd.applies, svd.max_rank, _grid(svd.max_rank), svd.chain_specs, svd.factorise, wide=True),
    )
}


def factorise(
    weight: np.ndarray,
    spec: ConvSpec,
    *,
    method: str,
    moments: AnyMoments | None = None,
    fisher: np.ndarray | None = None,
    near: Sequence[np.ndarray] | None = None,
) -> Factors:
    """Factors of an OIHW weight for all ranks.

    ``fisher`` is the Fisher information (N, N) of the outputs, summed over the positions of an image: with it the
    error counts as far as it moves the network's answer (see `tvm_lowrank.methods.common.fisher`). ``near`` holds the
    OIHW weights of the chain of a similar kernel: the CP solver starts from them at their rank, which is much quicker.
    """
    recipe = METHODS[method]
    root, inverse = (None, None) if fisher is None else roots(fisher, recipe.mixable(spec))
    kernel = weight if root is None else mixed(root, weight if wide(spec) else weight.astype(np.float64))
    known = None if isinstance(moments, SampledMoments) and not recipe.wide else moments
    factors = recipe.factorise(kernel, spec, known)
    if near is not None and recipe.starts:
        assert isinstance(factors, cp.CPFactors)
        factors = factors.starting_from(tuple(near))
    return factors if inverse is None else Weighted(factors, inverse)


def cut(method: str, factors: Factors, rank: Rank, weight: np.ndarray, moments: AnyMoments | None = None) -> Chain:
    """The chain of one rank of factors of `weight` (OIHW).

    With moments the last factor is the best one for the features that the others compute, and the bias takes back
    the mean of the error.
    """
    recipe, spec = METHODS[method], factors.spec
    recipe.check(spec, rank)
    specs, weights = recipe.chain_specs(spec, rank), factors.weights(rank)
    if isinstance(moments, Moments) and recipe.refits:
        weights = refit_last(weight, spec, specs, weights, moments)
    convs = tuple(
        Conv(part, np.ascontiguousarray(array, dtype=np.float32)) for part, array in zip(specs, weights, strict=True)
    )
    if moments is None:
        return Chain(convs)
    mean = moments.mean.reshape(-1, *spec.weight_shape[2:])
    correction = response([spec], [weight], mean) - response(specs, weights, mean)
    return Chain(convs, correction.astype(np.float32))


def decompose(
    weight: np.ndarray,
    spec: ConvSpec,
    *,
    method: str,
    rank: Rank,
    moments: AnyMoments | None = None,
    fisher: np.ndarray | None = None,
    near: Sequence[np.ndarray] | None = None,
) -> Chain:
    """Replace one convolution by a chain.

    Parameters
    ----------
    weight : OIHW array.
    method : one of ``METHODS``.
    rank : channels between the convolutions, per group; a tuple where the method has several such numbers.
    moments : input statistics; with them the expected output error is minimised and the bias corrected.
    fisher : Fisher information (N, N) of the outputs; with it that error is weighted by what it does to the answer.
    near : OIHW weights of a chain of this method and rank for a similar kernel, from which a CP solve starts.

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
    factors = factorise(weight, spec, method=method, moments=moments, fisher=fisher, near=near)
    return cut(method, factors, rank, weight, moments)
