"""Operands in half precision: where a lowered network rounds them, and how they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401, numpy's names of its formats
import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import GenericConst, IRModule, Op
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_lowrank.formats import FLOAT32, Format
from tvm_lowrank.graph import conv_spec, is_site
from tvm_lowrank.precision import operand_formats, stored

ASTYPE = Op.get("relax.astype")
BITS = {"bfloat16": "uint16"}  # formats of which the code generator has no vectors: their bits are kept
ELEMENTWISE = 0  # OpPatternKind kElemWise
ROUNDED = "rounded"  # a block that only rounds to such a format


def kept(format: str) -> str:
    """The type in which numbers of a format are kept."""
    return BITS.get(format, format)


def format_kept(type: str) -> str:
    """The format of numbers that are kept in a type."""
    return next((format for format, bits in BITS.items() if bits == type), type)


@tvm.transform.module_pass(opt_level=0, name="RoundOperands")
def round_operands(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
    """Say in the function what `tvm_lowrank.precision` says about it, by ``relax.astype``."""
    function = mod["main"]
    if not operand_formats(function):
        return mod
    changed = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    changed.update_func(mod.get_global_var("main"), _Rounder(mod, function).visit_expr(function))
    return changed


@mutator
class _Rounder(PyExprMutator):
    def __init__(self, mod: IRModule, function: relax.Function) -> None:
        super().__init__(mod)
        self.formats: Mapping[str, Format] = operand_formats(function)
        self.stored = stored(function)
        self.input = function.params[0]
        self.rounded: dict[relax.Var, relax.Var] = {}  # by the variable of the function that was

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.DataflowBlock:
        self.builder_._begin_dataflow_block()
        self._round(self.input, self.input)
        for binding in block.bindings:
            self.visit_binding(binding)
        return self.builder_._end_block()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        format = self.formats.get(binding.var.name) if is_site(binding.value) else None
        if format is None:
            super().visit_var_binding_(binding)
        else:
            self._convolve(binding, format)
        if binding.var in self.stored:
            self._round(binding.var, self.visit_expr(binding.var))

    def _convolve(self, binding: relax.VarBinding, format: Format) -> None:
        call = binding.value
        data = self.rounded.get(call.args[0])
        if data is None:
            data = self.builder_.emit(relax.op.astype(self.visit_expr(call.args[0]), format.name))
        weight = relax.const(call.args[1].value.numpy().astype(format.type), format.name)
        spec = conv_spec(call)
        attrs = {name: getattr(spec, name) for name in ("strides", "padding", "dilation", "groups")}
        layouts = {name: str(getattr(call.attrs, name)) for name in ("data_layout", "kernel_layout", "out_layout")}
        result = relax.op.nn.conv2d(data, weight, **attrs, **layouts, out_dtype=FLOAT32)
        self._become(binding.var, result)

    def _round(self, var: relax.Var, value: relax.Expr) -> None:
        """Keep a value in the format in which it is read; who needs float32 gets the rounded numbers."""
        if var not in self.stored:
            return
        self.rounded[var] = self.builder_.emit(relax.op.astype(value, self.stored[var].name))
        self._become(var, relax.op.astype(self.rounded[var], FLOAT32))

    def _become(self, var: relax.Var, value: relax.Expr) -> None:
        """Let a value take the place of a variable, which may be the result of the function."""
        inside = isinstance(var, relax.DataflowVar) or var == self.input
        self.set_var_remap(var, (self.builder_.emit if inside else self.builder_.emit_output)(value))


def widened(value: Any, format: str) -> Any:
    """A number that is kept in a format, as float32."""
    if format not in BITS:
        return value.astype(FLOAT32)
    return tirx.reinterpret(FLOAT32, tirx.shift_left(value.astype("uint32"), tirx.const(16, "uint32")))


def narrowed(value: Any, format: str) -> Any:
    """A float32 number as it is kept in a format: the nearest, ties to even."""
    if format not in BITS:
        return value.astype(format)
    bits = tirx.reinterpret("uint32", value)
    half, one, sixteen = (tirx.const(n, "uint32") for n in (0x7FFF, 1, 16))
    odd = tirx.bitwise_and(tirx.shift_right(bits, sixteen), one)
    nearest = tirx.shift_right(bits + half + odd, sixteen)
    # adding to a NaN could make it a number
    quiet = tirx.const(0x7FC0, "uint32")
    return tirx.Select(tirx.EQ(value, value), nearest, quiet).astype("uint16")


def as_kept(array: np.ndarray, type: str) -> np.ndarray:
    """An array of numbers as operands that are kept in a type."""
    return array.astype(format_kept(type)).view(type)


def constant(array: np.ndarray) -> GenericConst:
    """An array as an operand of a kernel; in formats of which the bits are kept, these."""
    type = kept(str(array.dtype))
    return relax.const(np.ascontiguousarray(array.view(type) if type != str(array.dtype) else array), type)


def astype(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """The legalisation of astype: TVM's, but for formats of which the bits are kept."""
    value, to = call.args[0], str(call.attrs.dtype)
    given = format_kept(str(value.ty.dtype))
    if not {given, to} & set(BITS):
        return ASTYPE.get_attr("FLegalize")(builder, call)

    def compute(x: te.Tensor) -> te.Tensor:
        def convert(*index: Any) -> Any:
            return narrowed(x[index], to) if to in BITS else widened(x[index], given)

        return te.compute(x.shape, convert, name=ROUNDED if to in BITS else "widened")

    return builder.call_te(compute, value, primfunc_name_hint="astype", primfunc_attrs={"op_pattern": ELEMENTWISE})
