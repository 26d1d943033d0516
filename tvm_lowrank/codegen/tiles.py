"""Tiles: matrix products of whole blocks in registers (Intel's AMX), in the place of a kernel's innermost loops.

A register holds up to 16 rows of 64 bytes. The rows of the left operand are neighbouring output positions, at any
distance of each other in memory, so nothing is copied together beforehand; those of the right one are packed weights.
Up to four accumulators stay in registers over the whole reduction. They are stored once, and what follows (bias,
activation, residual) reads them while they are in the first cache.

A thread says once, before it works on a kernel, how many rows and bytes its registers have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from tvm_lowrank.codegen.ahead import Share, ask
from tvm_lowrank.codegen.blocks import call, number_of, put, unravelled
from tvm_lowrank.codegen.units import Unit, inlined

ACCUMULATORS = 4
LEFT, RIGHT = (4, 5), (6, 7)  # registers of the operands
REGISTERS = 8
ROW = 64  # bytes
SPATIAL = 0  # tvm.tirx.IterVar.DataPar


@dataclass(frozen=True)
class Nest:
    """The loops that a matrix product takes the place of: how long they are, and how the left operand is walked.

    Attributes
    ----------
    kernel
        The loops of the reduction in front of that over channels; each belongs to one of the last ``positions``.
    steps
        Of channels: how many products, and how many steps of the unit's depth in each.
    positions
        The axes of the tile but the channels; the last one is cut into registers of ``rows``.
    vectors
        How many registers of output channels.
    strides, dilations
        What a step of an axis of ``positions``, and of its loop of ``kernel``, is in the left operand.
    """

    kernel: tuple[int, ...]
    steps: tuple[int, int]
    positions: tuple[int, ...]
    rows: int
    vectors: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def tiles(self) -> list[tuple[int, ...]]:
        """The first position of each register of rows."""
        *outer, columns = self.positions
        return [(*at, column) for at in product(*map(range, outer)) for column in range(0, columns, self.rows)]


def functions(unit: Unit, target: tvm.target.Target, *, rows: int, steps: int) -> str:
    """What a kernel calls, in LLVM IR; it is inlined only where its processor and features are those of its caller."""
    name, width = unit.function, 4 * steps
    # the first register's bytes are at 16, its rows at 48; the right operand has a row for each step
    shape = bytearray(64)
    shape[0] = 1
    for register in range(REGISTERS):
        bytes_of_row, count = (width, rows) if register in LEFT else (ROW, steps if register in RIGHT else rows)
        shape[16 + 2 * register], shape[48 + register] = bytes_of_row, count
    text = "".join(f"\\{byte:02x}" for byte in shape)
    own = f"{name}_{rows}_{steps}"
    lines = [
        f'@{own}_shape = internal constant [64 x i8] c"{text}", align 64',
        f"define void @{own}_begin() #0 {{ call void @llvm.x86.ldtilecfg(ptr @{own}_shape) ret void }}",
        f"define void @{name}_end() #0 {{ call void @llvm.x86.tilerelease() ret void }}",
    ]
    for register in range(REGISTERS):
        lines += [
            f"define void @{name}_load_{register}(ptr %from, i64 %stride) #0 {{ "
            f"call void @llvm.x86.tileloadd64(i8 {register}, ptr %from, i64 %stride) ret void }}",
            f"define void @{name}_store_{register}(ptr %to, i64 %stride) #0 {{ "
            f"call void @llvm.x86.tilestored64(i8 {register}, ptr %to, i64 %stride) ret void }}",
            f"define void @{name}_zero_{register}() #0 {{ call void @llvm.x86.tilezero(i8 {register}) ret void }}",
        ]
    for sums, left, right in product(range(ACCUMULATORS), LEFT, RIGHT):
        lines.append(
            f"define void @{name}_dot_{sums}_{left}_{right}() #0 {{ "
            f"call void @{unit.instruction}(i8 {sums}, i8 {left}, i8 {right}) ret void }}"
        )
    lines += [
        "declare void @llvm.x86.ldtilecfg(ptr)",
        "declare void @llvm.x86.tilerelease()",
        "declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)",
        "declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)",
        "declare void @llvm.x86.tilezero(i8 immarg)",
        f"declare void @{unit.instruction}(i8 immarg, i8 immarg, i8 immarg)",
        inlined(target, 0),
    ]
    return "\n".join(lines) + "\n"


def place(sch: Schedule, block: Any, nest: Nest, unit: Unit, *, again: bool) -> None:
    """Put products of tiles in the place of a block that holds a nest; it loses its initial values.

    ``again`` says whether the kernel runs over all positions of a tile of channels before it turns to the next one, the
    weights of which are then fetched ahead.

    Raises
    ------
    ValueError
        If the accumulators do not fit the registers.
    """
    if len(nest.tiles) * nest.vectors > ACCUMULATORS:
        raise ValueError(f"{len(nest.tiles)}x{nest.vectors} accumulators, but {ACCUMULATORS} registers for them")
    *places, _ = [axis for axis in sch.get(block).iter_vars if int(axis.iter_type) == SPATIAL]
    positions = prod(int(axis.dom.extent) for axis in places)
    position = number_of((axis.var, axis.dom.extent) for axis in places)
    share = (position, positions) if again and positions > 1 else None
    put(sch, block, "tiles", partial(_products, nest, unit, share))


def _products(nest: Nest, unit: Unit, share: tuple[Any, int] | None, left: Any, right: Any, sums: Any) -> tirx.Stmt:
    """The products of all tiles, and their sums stored.

    ``share`` is the number of the tile of positions, and how many there are, if the next weights are fetched ahead.
    """
    name, (count, steps) = unit.function, nest.steps
    loops = [tirx.Var(f"k{axis}", "int32") for axis in range(len(nest.kernel) + 1)]
    extents = (*nest.kernel, count)
    walked = [*[0] * (len(nest.positions) - len(nest.kernel)), *loops[:-1]]
    columns = ROW // 4  # of a register of sums
    packed = steps * columns * unit.depth  # numbers of a register of the right operand
    number = number_of(zip(loops, extents, strict=True))

    def do(what: str, *arguments: Any) -> tirx.Stmt:
        return call(f"{name}_{what}", *arguments)

    def bytes_of(stride: Any, buffer: Any) -> Any:
        return (stride * np.dtype(str(buffer.ty.dtype)).itemsize).astype("int64")

    def load(tile: int) -> tirx.Stmt:
        steps_of = zip(nest.tiles[tile], nest.strides, walked, nest.dilations, strict=True)
        at = [position * stride + loop * dilation for position, stride, loop, dilation in steps_of]
        start = tirx.address_of(left[(*at, loops[-1] * (steps * unit.depth))])
        return do(f"load_{LEFT[tile % 2]}", start, bytes_of(nest.strides[-1] * left.ty.strides[-2], left))

    def load_weights(vector: int) -> tirx.Stmt:
        start = tirx.address_of(right[unravelled((number * nest.vectors + vector) * packed, right)])
        return do(f"load_{RIGHT[vector % 2]}", start, tirx.const(ROW, "int64"))

    def store(tile: int, vector: int) -> tirx.Stmt:
        start = tirx.address_of(sums[(*nest.tiles[tile], vector * columns)])
        return do(f"store_{tile * nest.vectors + vector}", start, bytes_of(sums.ty.strides[-2], sums))

    pairs = list(product(range(len(nest.tiles)), range(nest.vectors)))
    work = []
    for tile, vector in pairs:
        work += [load(tile)] if vector == 0 else []
        # two registers hold all weights of a step, or they take turns
        work += [load_weights(vector)] if tile == 0 or nest.vectors > len(RIGHT) else []
        work.append(do(f"dot_{tile * nest.vectors + vector}_{LEFT[tile % 2]}_{RIGHT[vector % 2]}"))
    if share is not None:
        of_tile = prod(extents) * nest.vectors * packed
        work.insert(0, ask(right, of_tile, of_tile, Share(*share, number, prod(extents))))
    body: tirx.Stmt = tirx.SeqStmt(work)
    for loop, extent in reversed(list(zip(loops, extents, strict=True))):
        body = tirx.For(loop, 0, extent, tirx.ForKind.SERIAL, body)
    zeros = [do(f"zero_{number}") for number in range(len(pairs))]
    return tirx.SeqStmt([*zeros, body, *(store(*pair) for pair in pairs)])


def begin(sch: Schedule, loop: Any, nest: Nest, unit: Unit) -> None:
    """Shape the registers before a loop's body is run, and give them back after it."""
    own = f"{unit.function}_{nest.rows}_{nest.steps[1]}_begin"
    stmt = sch.get(loop)
    body = tirx.SeqStmt([call(own), stmt.body, call(f"{unit.function}_end")])
    made = tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, annotations=stmt.annotations)
    sch.state.replace(sch.get_sref(loop), made)
