"""Which schedules are worth measuring: tiles that fill the vector registers, best first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

from tvm_lowrank.codegen.lower import Kernel
from tvm_lowrank.codegen.schedule import Tiling, Workload, default_tiling, largest_divisor, workload
from tvm_lowrank.codegen.tiles import ACCUMULATORS
from tvm_lowrank.codegen.units import UNITS, Unit, lanes_of

MAX_CHANNEL_VECTORS = 8
CHANNELWISE_VECTORS = 2  # there, more of them share nothing
CHANNELWISE_PART = 4  # of the registers for accumulators there; every one needs its own inputs, and more are spilt
STRIPE = 4  # rows, of which the padded input usually fits the first cache
LATENCY = 8  # independent accumulators that keep two FMA units of latency four busy
TILE_DOT, TILE_LOAD, TILE_LATENCY = 16, 8, 52  # cycles of AMX, by Intel's manual
FMAS = 2  # a cycle
LOAD_COST = 0.02  # what a load costs beside the FMAs that hide it; breaks ties between full tiles


def register_tiles(space: Workload, *, lanes: int, registers: int) -> list[Tiling]:
    """All tiles whose accumulators fit the registers, the most promising first.

    A step of the reduction loads one vector of weights per channel vector and broadcasts one input value per
    position; both must leave room for the accumulators and be hidden behind the multiplications.
    """
    most_vectors, accumulators = MAX_CHANNEL_VECTORS, registers - 1
    if space.channelwise:
        most_vectors, accumulators = CHANNELWISE_VECTORS, registers // CHANNELWISE_PART
    tiles = [
        Tiling((*positions, vectors * vector), vector, unit=unit)
        for unit, vector in _instructions(space, lanes)
        if not unit or UNITS[unit].rows == 1
        for vectors in _divisors(space.group // vector)
        if vectors <= most_vectors
        for positions in _positions(space.spatial[:-1], max(1, accumulators // vectors - (not space.channelwise)))
    ]
    tiles += [
        Tiling((*positions, vectors * unit.lanes), unit.lanes, unit=unit.name)
        for unit in map(UNITS.__getitem__, space.units)
        if unit.rows > 1 and space.group % unit.lanes == 0
        for vectors in _divisors(space.group // unit.lanes)
        if vectors <= ACCUMULATORS
        for positions in _positions(space.spatial[:-1], ACCUMULATORS // vectors * unit.rows)
        if _registers(positions, unit) * vectors <= ACCUMULATORS
    ]
    return sorted(tiles, key=lambda tiling: (tile_cost(tiling, space, lanes), -tiling.tile[-1], tiling.tile))


def variants(tiling: Tiling, space: Workload) -> list[Tiling]:
    """The same register tile with other orders of the outer loops and other stripes."""
    orders = [tiling.channels_first, not tiling.channels_first]
    stripes = [tiling.stripe, *(stripe for stripe in _stripes(space, tiling) if stripe != tiling.stripe)]
    found = [replace(tiling, channels_first=order, stripe=stripe) for stripe in stripes for order in orders]
    return [other for other in dict.fromkeys(canonical(other, space) for other in found) if other != tiling]


def canonical(tiling: Tiling, space: Workload) -> Tiling:
    """The one of several equal schedules that is tried: where one outer loop is all there is, order means nothing."""
    channels = tiling.tile[-1] == space.spatial[-1]
    positions = tiling.tile[:-1] == space.spatial[:-1]
    whole = tiling.stripe and tiling.stripe == space.spatial[1] and not space.channelwise
    first = tiling.channels_first or channels or positions
    return replace(tiling, channels_first=first, stripe=0 if whole else tiling.stripe)


def first_candidates(space: Workload | None, *, lanes: int, registers: int, limit: int) -> list[Tiling | None]:
    """What to measure first: at most ``limit`` schedules; a kernel without a reduction has one, None."""
    if space is None:
        return [None]
    tiles = list(_distinct(register_tiles(space, lanes=lanes, registers=registers), limit))
    if space.padded and space.channelwise:
        # all tiles are alike here, and how the padding is done is not
        for i, tiling in enumerate(tiles):
            ways = [*_stripes(space, tiling), 0]
            tiles[i] = replace(tiling, stripe=ways[i % len(ways)])
    return [*tiles] or [default_tiling(space, lanes)]


def first_schedules(kernels: Iterable[Kernel], *, lanes: int, registers: int) -> dict[str, Tiling | None]:
    """What to build kernels with, by their keys, where nothing can be measured: the first of their candidates."""
    spaces = {kernel.key: workload(kernel.func) for kernel in kernels}
    return {key: first_candidates(space, lanes=lanes, registers=registers, limit=1)[0] for key, space in spaces.items()}


def _stripes(space: Workload, tiling: Tiling) -> list[int]:
    """The numbers of rows that are worth padding at a time, beside the whole input.

    The two nearest to four; where a channel tile is padded by itself, all rows and the nearest to four.
    """
    if not space.padded:
        return []
    rows, tile = space.spatial[1], tiling.tile[1]
    some = [tile * d for d in _divisors(rows // tile) if tile * d < rows]
    nearest = sorted(some, key=lambda stripe: abs(stripe - STRIPE))
    return [rows, *nearest[:1]] if space.channelwise else nearest[:2]


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


def tile_cost(tiling: Tiling, space: Workload, lanes: int) -> float:
    """Estimated cycles per multiply-accumulate of a lane, with two FMAs and two loads per cycle."""
    positions, vectors = prod(tiling.tile[:-1]), tiling.tile[-1] // tiling.vector
    if tiling.unit and UNITS[tiling.unit].rows > 1:
        unit = UNITS[tiling.unit]
        registers = _registers(tiling.tile[:-1], unit)
        loads = TILE_LOAD * (registers + vectors)
        cycles = max(TILE_DOT * registers * vectors, loads, TILE_LATENCY) + LOAD_COST * loads
        steps = largest_divisor(space.reduction[-1] // unit.depth, unit.steps)
        return FMAS * cycles / (positions * tiling.tile[-1] * unit.depth * steps)
    accumulators = positions * vectors
    loads = vectors + (accumulators if space.channelwise else positions)
    cycles = max(accumulators, loads, LATENCY) + LOAD_COST * loads * LATENCY
    at_once = min(tiling.vector, lanes_of(space.format, lanes)) * (UNITS[tiling.unit].depth if tiling.unit else 1)
    return cycles / (accumulators * at_once)


def _registers(positions: Sequence[int], unit: Unit) -> int:
    """How many registers of rows a tile has."""
    return prod(positions) // largest_divisor(positions[-1], unit.rows)


def _instructions(space: Workload, lanes: int) -> list[tuple[str, int]]:
    """The instructions for dot products that a kernel may use, with their lanes; else none, with its vectors."""
    found = [(name, UNITS[name].lanes) for name in space.units if space.group % UNITS[name].lanes == 0]
    return found or [("", vector) for vector in _vectors(space.group, lanes_of(space.format, lanes))]


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
