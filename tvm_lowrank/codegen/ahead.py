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

from tvm_lowrank.codegen.blocks import unravelled

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
    in_line = LINE // np.dtype(str(packed.ty.dtype)).itemsize
    of_tile = prod(map(int, packed.shape)) // channels
    lines = -(-of_tile // in_line)
    each = -(-lines // (walk.positions * steps))  # lines a step
    number, step = _number(sch, walk.tiles), _number(sch, walk.reduction)
    tile, position = tirx.floordiv(number, walk.positions), tirx.floormod(number, walk.positions)
    first = (tile + 1) * of_tile + (position * steps + step) * (each * in_line)
    asked: tirx.Stmt = tirx.stmt_seq(*(_ask(packed, first + line * in_line) for line in range(each)))
    needed = -(-lines // (each * steps))  # tiles of positions that have something to ask for
    if needed < walk.positions:
        asked = tirx.IfThenElse(position < needed, asked, None)
    stmt = sch.get(walk.reduction[-1])
    body = tirx.SeqStmt([asked, stmt.body])
    made = tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, annotations=stmt.annotations)
    sch.state.replace(sch.get_sref(walk.reduction[-1]), made)


def _packed(sch: Schedule, weights: Any) -> Any:
    """What the weights are packed into, or None."""
    blocks = map(sch.get, sch.get_child_blocks(sch.get_sblock("root")))
    packing = (block for block in blocks if PACKING in block.annotations)
    return next((block.writes[0].source for block in packing if block.reads[0].source.same_as(weights)), None)


def _extent(sch: Schedule, loops: Sequence[Any]) -> int:
    return prod(int(sch.get(loop).extent) for loop in loops)


def _number(sch: Schedule, loops: Sequence[Any]) -> Any:
    """The number of an iteration of nested loops."""
    number: Any = 0
    for loop in map(sch.get, loops):
        number = number * loop.extent + loop.loop_var
    return number


def _ask(buffer: Any, number: Any) -> tirx.Stmt:
    """Ask for the line of an element of a buffer without gaps; one beyond its end does no harm."""
    constants = (tirx.const(value, "int32") for value in (READ, NEAREST, DATA))
    address = tirx.address_of(buffer[unravelled(number, buffer)])
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *constants))
