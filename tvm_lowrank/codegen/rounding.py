"""Operands in half precision and int8: where a lowered network rounds them, and how they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax, te
from tvm.ir import GenericConst, IRModule, Op
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_lowrank.codegen.integers import byte_of, convolution, numbers, whole
from tvm_lowrank.codegen.kept import BITS, BYTES, format_kept, kept, lowest_byte, narrowed, widened
from tvm_lowrank.formats import FLOAT32
from tvm_lowrank.graph import conv_spec, is_site, oihw
from tvm_lowrank.precision import Kept, chooses, kept_operands, operand_formats, stored

ASTYPE = Op.get("relax.astype")
ELEMENTWISE = 0  # OpPatternKind kElemWise
ROUNDED = "rounded"  # a block that only rounds to such a format


def round_operands(target: tvm.target.Target) -> tvm.transform.Pass:
    """Say in the function what `tvm_lowrank.precision` says about it, by ``relax.astype`` and in integers."""

    @tvm.transform.module_pass(opt_level=0, name="RoundOperands")
    def say(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
        function = mod["main"]
        if not operand_formats(function):
            return mod
        changed = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        changed.update_func(mod.get_global_var("main"), _Rounder(mod, function, byte_of(target)).visit_expr(function))
        return changed

    return say


@mutator
class _Rounder(PyExprMutator):
    def __init__(self, mod: IRModule, function: relax.Function, byte: str) -> None:
        super().__init__(mod)
        self.byte = byte
        self.operands: Mapping[str, Kept] = kept_operands(function)
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
        kept = self.operands.get(binding.var.name) if is_site(binding.value) else None
        if self._chosen(binding):
            return
        if kept is None:
            super().visit_var_binding_(binding)
        else:
            self._convolve(binding, kept)
        if binding.var in self.stored:
            self._round(binding.var, self.visit_expr(binding.var))

    def _chosen(self, binding: relax.VarBinding) -> bool:
        """Choose among whole numbers, where that is what is read and kept; whether it is."""
        value, kept = binding.value, self.stored.get(binding.var)
        if kept is None or kept.grid is None or not chooses(value):
            return False
        read = set(relax.analysis.free_vars(value))
        if any(self.stored.get(var) != kept for var in read):
            return False
        before = {var: self.get_var_remap(var) for var in read}
        for var in read:
            self.set_var_remap(var, self.rounded[var])
        made = self.visit_expr(value)
        for var, own in before.items():
            self.set_var_remap(var, own)
        call = relax.Call(made.op, made.args, made.attrs)
        self.rounded[binding.var] = self.builder_.emit(call)
        self._become(binding.var, numbers(self.builder_, self.rounded[binding.var], kept.grid))
        return True

    def _convolve(self, binding: relax.VarBinding, kept: Kept) -> None:
        call, spec = binding.value, conv_spec(binding.value)
        data = self.rounded.get(call.args[0])
        if data is None:
            data = self._narrow(self.visit_expr(call.args[0]), kept)
        if kept.grid is not None:
            layout = str(call.attrs.data_layout)
            self._become(binding.var, convolution(self.builder_, data, oihw(call), kept.grid, spec, layout))
            return
        weight = relax.const(call.args[1].value.numpy().astype(kept.format.type), kept.format.name)
        attrs = {name: getattr(spec, name) for name in ("strides", "padding", "dilation", "groups")}
        layouts = {name: str(getattr(call.attrs, name)) for name in ("data_layout", "kernel_layout", "out_layout")}
        result = relax.op.nn.conv2d(data, weight, **attrs, **layouts, out_dtype=FLOAT32)
        self._become(binding.var, result)

    def _round(self, var: relax.Var, value: relax.Expr) -> None:
        """Keep a value in the format in which it is read; who needs float32 gets the rounded numbers."""
        if var not in self.stored:
            return
        kept = self.stored[var]
        self.rounded[var] = self._narrow(value, kept)
        if kept.grid is None:
            self._become(var, relax.op.astype(self.rounded[var], FLOAT32))
        else:
            self._become(var, numbers(self.builder_, self.rounded[var], kept.grid))

    def _narrow(self, value: relax.Expr, kept: Kept) -> relax.Var:
        if kept.grid is None:
            return self.builder_.emit(relax.op.astype(value, kept.format.name))
        return whole(self.builder_, value, kept.grid, self.byte)

    def _become(self, var: relax.Var, value: relax.Expr) -> None:
        """Let a value take the place of a variable, which may be the result of the function."""
        inside = isinstance(var, relax.DataflowVar) or var == self.input
        self.set_var_remap(var, (self.builder_.emit if inside else self.builder_.emit_output)(value))


def constant(array: np.ndarray) -> GenericConst:
    """An array as an operand of a kernel; in formats of which the bits are kept, these."""
    type = kept(str(array.dtype))
    return relax.const(np.ascontiguousarray(array.view(type) if type != str(array.dtype) else array), type)


def astype(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """The legalisation of astype: TVM's, but for formats of which the bits are kept."""
    value, to = call.args[0], str(call.attrs.dtype)
    given = format_kept(str(value.ty.dtype))
    if to in BYTES and given == FLOAT32:

        def byte(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda *at: lowest_byte(x[at], to), name="lowest_byte")

        return builder.call_te(byte, value, primfunc_name_hint="astype", primfunc_attrs={"op_pattern": ELEMENTWISE})
    if not {given, to} & set(BITS):
        return ASTYPE.get_attr("FLegalize")(builder, call)

    def compute(x: te.Tensor) -> te.Tensor:
        def convert(*index: Any) -> Any:
            return narrowed(x[index], to) if to in BITS else widened(x[index], given)

        return te.compute(x.shape, convert, name=ROUNDED if to in BITS else "widened")

    return builder.call_te(compute, value, primfunc_name_hint="astype", primfunc_attrs={"op_pattern": ELEMENTWISE})
