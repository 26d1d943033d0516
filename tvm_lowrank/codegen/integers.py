"""Convolutions in int8: what a lowered network computes in float32, in bytes and in int32.

Whole numbers q of a grid are kept as bytes: q itself, or q - 128 where the processor multiplies signed ones. Scales and
zeros are operands of the kernels, so that one kernel serves all grids. Each product in float32 is rounded by itself, as
it is in PyTorch; the compiler would otherwise add what follows in the same step.

A number is rounded by an addition: float32 has whole numbers only from 2²³ to 2²⁴ (`ROUNDING` is in the middle), and
the lowest byte of the sum is the one that is wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Op, Tuple

from tvm_lowrank.codegen.kept import BYTES, ROUNDING, SUMS
from tvm_lowrank.codegen.units import units_of
from tvm_lowrank.formats import FLOAT32, LEVELS, Grid, quantised
from tvm_lowrank.methods import ConvSpec
from tvm_lowrank.precision import CHOOSING

LEAST = float(np.finfo(np.float32).min)
ADD, ASTYPE, PERMUTE_DIMS = (Op.get(f"relax.{name}") for name in ("add", "astype", "permute_dims"))


def byte_of(target: tvm.target.Target) -> str:
    """The type of the bytes that a target's processor multiplies with signed weights."""
    return next((unit.left for unit in units_of(target) if unit.left in BYTES), "uint8")


def whole(builder: relax.BlockBuilder, value: relax.Expr, grid: Grid, byte: str) -> relax.Var:
    """A float32 value (N, C, H, W) as bytes: the nearest whole numbers of a grid."""
    rank = len(value.ty.shape)
    inverses = np.broadcast_to(grid.inverses, (1, int(value.ty.shape[1]), 1, 1))
    steps = builder.emit(relax.op.multiply(value, _constant(inverses)))
    below = builder.emit(relax.op.minimum(steps, _each(LEVELS - grid.zero, rank)))
    within = builder.emit(relax.op.maximum(below, _each(-grid.zero, rank)))
    nearest = builder.emit(relax.op.add(within, _each(ROUNDING + _zero(grid, byte), rank)))
    return builder.emit(relax.op.astype(nearest, byte))


def numbers(builder: relax.BlockBuilder, bytes: relax.Expr, grid: Grid) -> relax.Call:
    """Bytes (N, C, H, W) as the float32 numbers of their grid."""
    rank, byte = len(bytes.ty.shape), str(bytes.ty.dtype)
    steps = relax.op.subtract(relax.op.astype(bytes, FLOAT32), _each(_zero(grid, byte), rank))
    scales = np.broadcast_to(grid.scales, (1, int(bytes.ty.shape[1]), 1, 1))
    return _rounded(builder, builder.emit(steps), _constant(scales))


def convolution(
    builder: relax.BlockBuilder, bytes: relax.Expr, weight: np.ndarray, grid: Grid, spec: ConvSpec, layout: str
) -> relax.Call:
    """A convolution of bytes with weights (OIHW, float32), as float32; ``layout`` is that of the data."""
    quanta, scales = quantised(weight * grid.by_input(weight.shape))
    byte = str(bytes.ty.dtype)
    geometry = {name: getattr(spec, name) for name in ("strides", "padding", "dilation", "groups")}
    layouts = {"data_layout": layout, "kernel_layout": "OIHW", "out_layout": layout}
    sums = builder.emit(relax.op.nn.conv2d(bytes, relax.const(quanta), **geometry, **layouts, out_dtype=SUMS))
    # padding has the zero as well
    excess = -_zero(grid, byte) * quanta.astype(SUMS).sum(axis=(1, 2, 3))
    exact = builder.emit(relax.op.add(sums, _by_channel(excess.astype(SUMS), layout)))
    products = builder.emit(relax.op.astype(exact, FLOAT32))
    return _rounded(builder, products, _by_channel(scales, layout))


def zero_of(function: relax.Function, bytes: relax.Var) -> GenericConst | None:
    """What was added to become these bytes, in a tensor: `ROUNDING` and their zero; None if they are others."""
    values = {b.var: b.value for block in function.body.blocks for b in block.bindings}
    value: Any = values.get(bytes)
    while True:
        if isinstance(value, Tuple):
            before = value.fields[0]
        elif isinstance(value, relax.Call) and value.op in {PERMUTE_DIMS, ASTYPE, *CHOOSING}:
            before = value.args[0]
        else:
            break
        value = values.get(before, before)
    added = isinstance(value, relax.Call) and value.op == ADD and isinstance(value.args[1], GenericConst)
    return value.args[1] if added else None


def _rounded(builder: relax.BlockBuilder, a: relax.Expr, b: relax.Expr) -> relax.Call:
    """A product, rounded: a maximum stands between it and an addition."""
    return relax.op.maximum(builder.emit(relax.op.multiply(a, b)), relax.const(LEAST, FLOAT32))


def _zero(grid: Grid, byte: str) -> int:
    """The zero of a grid as it is kept."""
    return grid.zero + BYTES[byte][0]


def _each(number: float, rank: int) -> GenericConst:
    """A number for all of a tensor, as an operand and not as a part of the kernel."""
    return relax.const(np.full([1] * rank, number, FLOAT32))


def _constant(array: np.ndarray) -> GenericConst:
    return relax.const(np.ascontiguousarray(array))


def _by_channel(values: np.ndarray, layout: str) -> GenericConst:
    return relax.const(values.reshape([-1 if axis == "C" else 1 for axis in layout]))
