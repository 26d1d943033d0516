"""Blocks of a schedule whose body is written by hand: calls of functions in LLVM IR, in the place of loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm import tirx
from tvm.ir import TensorRegion
from tvm.s_tir import MatchBufferRegion, SBlock, Schedule


def put(sch: Schedule, block: Any, name: str, make: Callable[..., tirx.Stmt]) -> None:
    """Give a block another body, which ``make`` makes of a buffer for each part that it reads, then that it writes.

    The block has no initial values any more: what it writes, the body computes from what it reads alone.
    """
    old = sch.get(block)
    parts = (*old.reads, *old.writes)
    buffers = [_buffer(part) for part in parts]
    regions = [MatchBufferRegion(buffer, part) for buffer, part in zip(buffers, parts, strict=True)]
    made = SBlock(old.iter_vars, old.reads, old.writes, name, make(*buffers), match_buffers=regions)
    sch.state.replace(sch.get_sref(block), made, {old: made})


def call(function: str, *arguments: Any) -> tirx.Stmt:
    """Call a function in LLVM IR that returns nothing."""
    return tirx.Evaluate(tirx.call_extern("void", function, *arguments))


def number_of(loops: Iterable[tuple[Any, Any]]) -> Any:
    """The number of an iteration of nested loops, by their variables and extents from outside in."""
    number: Any = 0
    for variable, extent in loops:
        number = number * extent + variable
    return number


def unravelled(number: Any, buffer: Any) -> tuple[Any, ...]:
    """The indices of the element of this number in a buffer without gaps."""
    indices: list[Any] = []
    for extent in reversed(buffer.ty.shape[1:]):
        indices.insert(0, tirx.floormod(number, extent))
        number = tirx.floordiv(number, extent)
    return (number, *indices)


def _buffer(part: TensorRegion) -> Any:
    """A buffer that stands for a part of another one, wherever that will lie."""
    shape = [int(extent.extent) for extent in part.region]
    strides = [tirx.Var(f"s{axis}", "int32") for axis in range(len(shape))]
    offset, type = tirx.Var("offset", "int32"), part.source.ty.dtype
    return tirx.decl_buffer(shape, type, "part", strides=strides, elem_offset=offset, offset_factor=1)
