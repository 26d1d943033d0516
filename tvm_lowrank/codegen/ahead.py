"""Fetch weights ahead: while a tile of channels is computed, the weights of the next one come from memory.

In a network that no cache holds, weights are read from memory once for each image. Where a kernel runs over the
positions of one tile of channels before it turns to the next tile, the first position waits for memory, and the others
do not need it. So each step of the reduction asks for a part of what the next tile will read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.s_tir import Schedule

from tvm_lowrank.codegen.blocks import number_of, unravelled

LINE = 64  # bytes that come at once; with longer lines some are asked for twice
PACKING = "meta_schedule.layout_rewrite_preproc"  # annotates the block that packs a constant operand
READ, NEAREST, DATA = 0, 3, 1  # LLVM's prefetch: for reading, to the first cache, of data


@dataclass(frozen=True)
class Walk:
    """How a kernel runs over its tiles: ``tiles`` are the loops over tiles of channels and, inside, of positions.

    ``positions`` is the number of tiles of positions. ``reduction`` are the loops over what a tile adds up, and
    ``weights`` is the constant operand before it is packed.
    """

    tiles: Sequence[Any]
    positions: int
    reduction: Sequence[Any]
    weights: Any


def fetch(sch: Schedule, walk: Walk) -> None:
    """Ask in each step of the reduction for weights of the next tile of channels, if another one reads them again.

    The weights must have been packed in the order in which they are read.
    """
    packed = _packed(sch, walk.weights)
    channels, steps = _extent(sch, walk.tiles) // walk.positions, _extent(sch, walk.reduction)
    if packed is None or channels == 1 or walk.positions == 1:
        return
    of_tile = prod(map(int, packed.shape)) // channels
    number, step = (
        number_of((loop.loop_var, loop.extent) for loop in map(sch.get, loops))
        for loops in (walk.tiles, walk.reduction)
    )
    tile, position = tirx.floordiv(number, walk.positions), tirx.floormod(number, walk.positions)
    share = Share(position, walk.positions, step, steps)
    asked = ask(packed, (tile + 1) * of_tile, of_tile, share)
    stmt = sch.get(walk.reduction[-1])
    body = tirx.SeqStmt([asked, stmt.body])
    made = tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, annotations=stmt.annotations)
    sch.state.replace(sch.get_sref(walk.reduction[-1]), made)


@dataclass(frozen=True)
class Share:
    """A step of a tile of positions, which asks for its share: their numbers, and how many there are."""

    position: Any
    positions: int
    step: Any
    steps: int


def ask(packed: Any, first: Any, count: int, share: Share) -> tirx.Stmt:
    """Ask for a step's share of so many elements of the packed weights, from the ``first`` on."""
    in_line = LINE // np.dtype(str(packed.ty.dtype)).itemsize
    lines = -(-count // in_line)
    each = -(-lines // (share.positions * share.steps))  # lines a step
    own = first + (share.position * share.steps + share.step) * (each * in_line)
    asked: tirx.Stmt = tirx.stmt_seq(*(_ask(packed, own + line * in_line) for line in range(each)))
    needed = -(-lines // (each * share.steps))  # tiles of positions that have something to ask for
    return asked if needed == share.positions else tirx.IfThenElse(share.position < needed, asked, None)


def _packed(sch: Schedule, weights: Any) -> Any:
    """What the weights are packed into, or None."""
    blocks = map(sch.get, sch.get_child_blocks(sch.get_sblock("root")))
    packing = (block for block in blocks if PACKING in block.annotations)
    return next((block.writes[0].source for block in packing if block.reads[0].source.same_as(weights)), None)


def _extent(sch: Schedule, loops: Sequence[Any]) -> int:
    return prod(int(sch.get(loop).extent) for loop in loops)


def _ask(buffer: Any, number: Any) -> tirx.Stmt:
    """Ask for the line of an element of a buffer without gaps; one beyond its end does no harm."""
    constants = (tirx.const(value, "int32") for value in (READ, NEAREST, DATA))
    address = tirx.address_of(buffer[unravelled(number, buffer)])
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *constants))
