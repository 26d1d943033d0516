"""Which schedules are worth measuring: tiles that fill the vector registers, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tvm_lowrank.schedule import Tiling, Workload, default_tiling

MAX_CHANNEL_VECTORS = 8
LATENCY = 8  # independent accumulators that keep two FMA units of latency four busy
LOAD_COST = 0.02  # what a load costs beside the FMAs that hide it; breaks ties between full tiles


def register_tiles(space: Workload, *, lanes: int, registers: int) -> list[Tiling]:
    """All tiles whose accumulators fit the registers, the most promising first.

    A step of the reduction loads one vector of weights per channel vector and broadcasts one input value per
    position; both must leave room for the accumulators and be hidden behind the multiplications.
    """
    tiles = [
        Tiling((*positions, vectors * vector), vector)
        for vector in _vectors(space.group, lanes)
        for vectors in _divisors(space.group // vector)
        if vectors <= MAX_CHANNEL_VECTORS
        for positions in _positions(space.spatial[:-1], max(1, (registers - 1 - vectors) // vectors))
    ]
    return sorted(tiles, key=lambda tiling: (tile_cost(tiling, lanes), -tiling.tile[-1], tiling.tile))


def variants(tiling: Tiling, space: Workload) -> list[Tiling]:
    """The same register tile with other orders of the outer loops."""
    other = replace(tiling, channels_first=not tiling.channels_first)
    found = [other] if prod(space.spatial) > prod(tiling.tile) else []
    if space.padded:
        rows, tile = space.spatial[1], tiling.tile[1]
        stripes = sorted({tile * d for d in _divisors(rows // tile) if tile * d < rows}, key=lambda s: abs(s - 4))
        for stripe in stripes[:2]:
            found += [replace(tiling, stripe=stripe), replace(other, stripe=stripe)]
    return found


def first_candidates(space: Workload | None, *, lanes: int, registers: int, limit: int) -> list[Tiling | None]:
    """What to measure first: at most ``limit`` schedules; a kernel without a reduction has one, None."""
    if space is None:
        return [None]
    tiles = register_tiles(space, lanes=lanes, registers=registers)
    return list(_distinct(tiles, limit)) or [default_tiling(space, lanes)]


def _distinct(tiles: list[Tiling], limit: int) -> Iterator[Tiling]:
    """The best tiles, at most two of one channel extent before the others had their turn."""
    taken: dict[int, int] = {}
    late = []
    for tiling in tiles:
        if limit == 0:
            return
        channels = tiling.tile[-1]
        if taken.get(channels, 0) < 2:
            taken[channels] = taken.get(channels, 0) + 1
            limit -= 1
            yield tiling
        else:
            late.append(tiling)
    yield from late[:limit]


def tile_cost(tiling: Tiling, lanes: int) -> float:
    """Estimated cycles per multiply-accumulate of a lane, with two FMAs and two loads per cycle."""
    positions, vectors = prod(tiling.tile[:-1]), tiling.tile[-1] // tiling.vector
    accumulators, loads = positions * vectors, positions + vectors
    cycles = max(accumulators, loads, LATENCY) + LOAD_COST * loads * LATENCY
    return cycles / (accumulators * min(tiling.vector, lanes))


def _vectors(channels: int, lanes: int) -> list[int]:
    """Full vectors, or the two longest that divide the channels."""
    return [d for d in reversed(_divisors(channels)) if d <= lanes][: 1 if channels % lanes == 0 else 2]


def _positions(extents: tuple[int, ...], limit: int) -> Iterator[tuple[int, ...]]:
    """Extents of tiles over the axes in front of the channels, at most ``limit`` positions in all."""
    if not extents:
        yield ()
        return
    for first in _divisors(extents[0]):
        if first <= limit:
            for rest in _positions(extents[1:], limit // first):
                yield (first, *rest)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
