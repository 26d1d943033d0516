"""How convolutions in NHWC are lowered so that the channels of their outputs fill the vectors.

The schedule template vectorises the output channels, as many of them as read the same inputs. Where that is no multiple
of the lanes, channels are added; where a group has only a few, the groups are interleaved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi
from tvm.ir import GenericConst, IRModule, Op
from tvm.relax.analysis import free_vars
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_lowrank.codegen.integers import zero_of
from tvm_lowrank.codegen.kept import BYTES, SUMS, lowest_byte, widened
from tvm_lowrank.codegen.rounding import constant
from tvm_lowrank.codegen.schedule import (
    DILATIONS,
    FORMAT,
    INTERLEAVED,
    PARTIAL,
    STRIDES,
    UNITS,
    largest_divisor,
    target_lanes,
)
from tvm_lowrank.codegen.units import Unit, depth_of, lanes_of, units_of, usable
from tvm_lowrank.formats import FLOAT32, FORMATS

CONV2D = Op.get("relax.nn.conv2d")
WHOLE = "int8"  # the format of bytes
FUSES_ELEMENTWISE = 4  # OpPatternKind kOutEWiseFusable


def computed_channels(channels: int, groups: int, lanes: int) -> int:
    """How many output channels the kernel of a convolution computes.

    They are padded to full vectors, unless their longest divisor up to ``lanes`` fills the vectors as well.
    """
    full = -(-channels // lanes) * lanes
    return full if groups == 1 and channels * lanes > full * largest_divisor(channels, lanes) else channels


def conv2d(target: tvm.target.Target) -> Callable[[relax.BlockBuilder, relax.Call], relax.Expr]:
    """The legalisation of conv2d: TVM's, but with output channels padded to full vectors where that pays."""
    lanes, present = target_lanes(target), units_of(target)

    def legalise(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        data, weight = call.args
        format = str(weight.ty.dtype)
        if format != FLOAT32:
            inner, groups = int(weight.ty.shape[2]), int(call.attrs.groups)
            units = usable(present, format, inner=inner, groups=groups)
            filled = _filled(call, lanes_of(format, lanes), depth_of(units))
            return _call(builder, partial(_rounded, call, format, units), data, filled)
        channels = int(weight.ty.shape[-1])  # HWIO
        missing = computed_channels(channels, int(call.attrs.groups), lanes) - channels
        if not missing or not _is_plain(call):
            return CONV2D.get_attr("FLegalize")(builder, call)
        padded = _constant(np.pad(weight.value.numpy(), [(0, 0)] * 3 + [(0, missing)]))

        def compute(x: te.Tensor, kernel: te.Tensor) -> te.Tensor:
            conv = topi.nn.conv2d(x, kernel, **_geometry(call), data_layout="NHWC", kernel_layout="HWIO")
            return te.compute((*conv.shape[:-1], channels), lambda *index: conv[index], name="valid")

        return _call(builder, compute, data, padded)

    return legalise


def integer_convolutions(target: tvm.target.Target) -> tvm.transform.Pass:
    """The legalisation of convolutions of bytes, while it can be seen with which zero they are padded."""
    lanes, present = target_lanes(target), units_of(target)

    @tvm.transform.module_pass(opt_level=0, name="IntegerConvolutions")
    def legalise(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
        rewriter = _Integers(mod, mod["main"], lanes, present)
        function = rewriter.visit_expr(mod["main"])
        changed = rewriter.builder_.get()
        changed.update_func(changed.get_global_var("main"), function)
        return changed

    return legalise


@mutator
class _Integers(PyExprMutator):
    def __init__(self, mod: IRModule, function: relax.Function, lanes: int, present: Sequence[Unit]) -> None:
        super().__init__(mod)
        self.function, self.lanes, self.present = function, lanes, present

    def visit_call_(self, op: relax.Call) -> relax.Expr:
        call = super().visit_call_(op)
        if op.op != CONV2D or str(op.args[0].ty.dtype) not in BYTES:
            return call
        inner, groups = int(op.args[1].ty.shape[2]), int(op.attrs.groups)
        units = usable(self.present, WHOLE, inner=inner, groups=groups)
        weight, zero = _filled(op, self.lanes, depth_of(units)), zero_of(self.function, op.args[0])
        if inner == 1:  # products of bytes, and a few of them, are exact in float32, of which there are fast kernels
            weight = _constant(weight.value.numpy().astype(FLOAT32))
        assert zero is not None
        compute = partial(_rounded, op, WHOLE, units)
        return _call(self.builder_, compute, call.args[0], weight, zero)


@tvm.transform.module_pass(opt_level=0, name="VectoriseGroups")
def vectorise_groups(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
    """Interleave the groups of depthwise convolutions with a multiplier, and of those that add filtered channels up.

    There the channels of a group lie beside each other, and a vector would hold those few only. Where the other
    convolution of a chain may read or write its channels in any order, both are changed to one in which neighbours
    belong to different groups.
    """
    changes = _changes(mod["main"])
    if not changes:
        return mod
    rewriter = _Interleaver(mod, changes)
    function = rewriter.visit_expr(mod["main"])
    changed = rewriter.builder_.get()
    changed.update_func(changed.get_global_var("main"), function)
    return changed


@dataclass(frozen=True, eq=False)
class _Change:
    """What becomes of a convolution: its new weights (HWIO), and whether its groups are interleaved."""

    weight: np.ndarray
    interleaved: bool


def _changes(function: relax.Function) -> dict[relax.Call, _Change]:
    """What becomes of the convolutions of the pairs between which the order of the channels is free."""
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    calls = {binding.var: binding.value for binding in bindings if isinstance(binding.value, relax.Call)}
    # a tuple, such as the operands of a concatenation, and the result are uses as well
    values = [*(binding.value for binding in bindings), function.body.body]
    uses = Counter(var for value in values for var in free_vars(value))
    changes: dict[relax.Call, _Change] = {}
    for second in calls.values():
        first = calls.get(second.args[0]) if _is_plain(second) else None
        if first is None or not _is_plain(first) or uses[second.args[0]] > 1 or first in changes:
            continue
        groups, next_groups = (int(call.attrs.groups) for call in (first, second))
        weight, next_weight = (call.args[1].value.numpy() for call in (first, second))
        inside, outside = weight.shape[2:]
        next_inside, next_outside = next_weight.shape[2:]
        if inside == 1 < groups < outside and next_groups == 1:
            changes[first] = _Change(_interleave(weight, 3, groups), interleaved=True)
            changes[second] = _Change(_interleave(next_weight, 2, groups), interleaved=False)
        elif groups == 1 < next_groups == next_outside and next_inside > 1:
            changes[first] = _Change(_interleave(weight, 3, next_groups), interleaved=False)
            changes[second] = _Change(next_weight, interleaved=True)
    return changes


def _interleave(weight: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """Channels on an axis from (group, member) to (member, group)."""
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    members = weight.reshape(*before, groups, -1, *after)
    return np.swapaxes(members, axis, axis + 1).reshape(weight.shape)


@mutator
class _Interleaver(PyExprMutator):
    def __init__(self, mod: IRModule, changes: Mapping[relax.Call, _Change]) -> None:
        super().__init__(mod)
        self.changes = changes

    def visit_call_(self, op: relax.Call) -> relax.Expr:
        call = super().visit_call_(op)
        change = self.changes.get(op)
        if change is None:
            return call
        weight = _constant(change.weight)
        if not change.interleaved:
            return relax.Call(call.op, [call.args[0], weight], call.attrs)
        return _call(self.builder_, partial(_interleaved, call), call.args[0], weight)


def _interleaved(call: relax.Call, x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """Grouped convolution in which channel c, of the input and of the output, belongs to group c modulo the groups."""
    groups, geometry = int(call.attrs.groups), _geometry(call)
    (stride, column_stride), (dilation, column_dilation) = geometry["strides"], geometry["dilation"]
    top, left, bottom, right = geometry["padding"]
    padded = topi.nn.pad(x, (0, top, left, 0), (0, bottom, right, 0), name="pad_temp")
    rows, columns, members = (te.reduce_axis((0, weight.shape[axis])) for axis in range(3))

    def output(n: Any, h: Any, w: Any, c: Any) -> Any:
        row, column = h * stride + rows * dilation, w * column_stride + columns * column_dilation
        value = padded[n, row, column, members * groups + c % groups]
        return te.sum(value * weight[rows, columns, members, c], axis=[rows, columns, members])

    shape = [int(extent) for extent in call.ty.shape]
    return te.compute(shape, output, name=INTERLEAVED)


def _filled(call: relax.Call, lanes: int, depth: int) -> GenericConst:
    """The weights of a convolution in half precision, with zeros for what is missing to full vectors and products."""
    array = call.args[1].value.numpy()
    inner, channels = array.shape[2:]
    missing = computed_channels(channels, int(call.attrs.groups), lanes) - channels
    return constant(np.pad(array, [(0, 0), (0, 0), (0, -inner % depth), (0, missing)]))


def _rounded(
    call: relax.Call,
    format: str,
    units: Sequence[Unit],
    x: te.Tensor,
    weight: te.Tensor,
    zero: te.Tensor | None = None,
) -> te.Tensor:
    """Convolution of operands in half precision, added up in float32, or of bytes, in int32.

    Bytes are padded with their ``zero``. The innermost axis is that of a dot product; in formats that add up some
    products themselves, what they add up is a block of its own.
    """
    exact = format == WHOLE and str(weight.dtype) == FLOAT32
    groups, geometry = int(call.attrs.groups), _geometry(call)
    (stride, column_stride), (dilation, column_dilation) = geometry["strides"], geometry["dilation"]
    top, left, bottom, right = geometry["padding"]
    height, width, inner, computed = (int(extent) for extent in weight.shape)
    missing = inner * groups - int(x.shape[-1])
    padded = x
    if any((top, left, bottom, right, missing)):
        after = (0, bottom, right, missing)
        blank = tirx.const(0, x.dtype) if zero is None else lowest_byte(zero[0, 0, 0, 0], x.dtype)
        padded = topi.nn.pad(x, (0, top, left, 0), after, blank, "pad_temp")
    shape = [int(extent) for extent in call.ty.shape]

    def operands(at: Sequence[Any], row: Any, column: Any, channel: Any) -> tuple[Any, Any]:
        n, h, w, c = at
        group = c // (computed // groups) * inner if groups > 1 else 0
        place = n, h * stride + row * dilation, w * column_stride + column * column_dilation
        return padded[(*place, group + channel)], weight[row, column, channel, c]

    def dot() -> te.Tensor:
        depth, whole = depth_of(units), FORMATS[format].summed > 1
        rows, columns, steps, inside = (te.reduce_axis((0, n)) for n in (height, width, inner // depth, depth))

        def product(*at: Any) -> Any:
            one, other = operands(at, rows, columns, steps * depth + inside)
            if exact:
                value = one.astype(FLOAT32) * other
            else:
                value = one * other if whole else widened(one, format) * widened(other, format)
            return te.sum(value, axis=[rows, columns, steps, inside])

        attrs = {
            FORMAT: format,
            UNITS: ",".join(unit.name for unit in units),
            STRIDES: f"{stride},{column_stride}",
            DILATIONS: f"{dilation},{column_dilation}",
        }
        sums = te.compute((*shape[:-1], computed), product, name="conv2d_nhwc", attrs=attrs)
        if not (whole or exact):
            return sums
        return te.compute(sums.shape, lambda *at: sums[at].astype(SUMS if exact else FLOAT32), name="widened")

    def in_blocks(most: int) -> te.Tensor:
        block = largest_divisor(inner, max(1, most // width))
        columns, inside = te.reduce_axis((0, width)), te.reduce_axis((0, block))
        rows, blocks = te.reduce_axis((0, height)), te.reduce_axis((0, inner // block))

        def product(*at: Any) -> Any:
            *place, row, number = at
            one, other = operands(place, row, columns, number * block + inside)
            return te.sum(one * other, axis=[columns, inside])

        partial_shape = (*shape[:-1], computed, height, inner // block)
        part = te.compute(partial_shape, product, name=PARTIAL, attrs={FORMAT: format})
        return te.compute(
            (*shape[:-1], computed),
            lambda *at: te.sum(part[(*at, rows, blocks)].astype(FLOAT32), axis=[rows, blocks]),
            name="conv2d_nhwc",
        )

    summed = FORMATS[format].summed
    few = height * width * inner <= summed
    conv = dot() if few or summed == 1 else in_blocks(summed)
    if computed == shape[-1]:
        return conv
    return te.compute(shape, lambda *index: conv[index], name="valid")


def _is_plain(call: relax.Call) -> bool:
    """Whether this is a convolution in NHWC with constant weights in HWIO, in float32."""
    plain = call.op == CONV2D and call.attrs.data_layout == "NHWC" and isinstance(call.args[1], GenericConst)
    return plain and str(call.args[1].ty.dtype) == FLOAT32


def _geometry(call: relax.Call) -> dict[str, list[int]]:
    return {name: [int(v) for v in call.attrs[name]] for name in ("strides", "padding", "dilation")}


def _constant(array: np.ndarray) -> GenericConst:
    return relax.const(np.ascontiguousarray(array), str(array.dtype))


def _call(
    builder: relax.BlockBuilder, compute: Callable[..., te.Tensor], data: relax.Expr, *constants: GenericConst
) -> relax.Expr:
    attributes = {"op_pattern": FUSES_ELEMENTWISE}
    return builder.call_te(compute, data, *constants, primfunc_name_hint="conv2d", primfunc_attrs=attributes)
