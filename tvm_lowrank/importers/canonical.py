"""From what a frontend emits to the canonical Relax function that everything else works on.

The function is taken apart into a list of (variable, call), rewritten there, and put together again: constants folded,
tuples and no-ops gone, the batch symbolic, batch-norm and other per-channel scaling folded into the convolution in
front, a site's id as the name of the variable that its convolution is bound to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx
from tvm.ir import Call, GenericConst, IRModule, Op, Tuple, TupleGetItem

from tvm_lowrank.bridge.torch_nn import OPERATORS
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import ADD, CONV2D, bindings, is_site, with_attribute
from tvm_lowrank.importers.linear import as_convolutions
from tvm_lowrank.importers.nodes import MULTIPLY, Node, assembled, check_constants, fold_scaling, live, named, op_name
from tvm_lowrank.tensors import INPUTS

_PAD = Op.get("relax.nn.pad")
_RESHAPES = {"relax.reshape", "relax.broadcast_to"}


def canonicalise(
    mod: IRModule, conv_ids: Sequence[str | None], linear_ids: Mapping[str, str | None] | None = None
) -> IRModule:
    """The canonical module of a frontend's module with one function ``main``.

    Parameters
    ----------
    conv_ids : the wanted id of each ``relax.nn.conv2d``, in order; None is numbered.
    linear_ids : the wanted id of a linear layer by `tvm_lowrank.importers.linear.weight_digest`.

    Raises
    ------
    UserError
        If the function has types other than float32, weights that are not finite, or a batch size that cannot be made
        symbolic.
    """
    function = mod["main"]
    batch = tirx.Var("batch", "int64")
    shapes = [_image(old) for old in function.params]
    several = len(shapes) > 1
    extents = (sum(map(prod, shapes)), 1, 1) if several else shapes[0]
    parameter = relax.Var("x", relax.TensorType([batch, *extents], "float32"))
    simplified = _Simplifier(parameter, function.params, batch)
    for block in function.body.blocks:
        for binding in block.bindings:
            simplified.visit(binding)
    results = simplified.results(function.body.body)
    convs = [node.var for node in simplified.nodes if isinstance(node.call, Call) and node.call.op == CONV2D]
    wanted = dict(zip(convs, conv_ids, strict=True)) if len(conv_ids) == len(convs) else {}
    nodes, linear = as_convolutions(simplified.nodes, batch, linear_ids or {})
    nodes = live(named(nodes, {**wanted, **linear}), results)
    nodes, results = fold_scaling(nodes, results)
    check_constants(nodes)
    made = assembled(parameter, nodes, results)
    return with_attribute(made, INPUTS, json.dumps(shapes)) if several else made


def check_sites(mod: IRModule) -> IRModule:
    """The module, if it has a convolution or linear layer with constant weights; UserError otherwise."""
    if not any(is_site(binding.value) for binding in bindings(mod["main"])):
        raise UserError(
            "the model has no 2-D convolution or linear layer with constant weights; there is nothing to compress"
        )
    return mod


def _image(old: relax.Var) -> tuple[int, ...]:
    """The shape of an input, without the batch."""
    if str(old.ty.dtype) != "float32":
        raise UserError(f"input {old.name!r} is {old.ty.dtype}, not float32; export the model in float32")
    dims = list(old.ty.shape or ())
    if not dims or not all(isinstance(d, tirx.IntImm) for d in dims[1:]):
        raise UserError(f"input {old.name!r} has shape {old.ty.shape}; give the input shape, such as 1,3,224,224")
    return tuple(int(d) for d in dims[1:])


class _Simplifier:
    """Walks the bindings of the frontend's function and collects operator calls on variables of its own."""

    def __init__(self, parameter: relax.Var, olds: Sequence[relax.Var], batch: tirx.Var) -> None:
        self.nodes: list[Node] = []
        self.producers: dict[relax.Var, relax.Expr] = {}
        self.builder = relax.BlockBuilder()
        self.batch = batch
        batches = [old.ty.shape[0] for old in olds]
        self.fixed_batch = next((int(own) for own in batches if isinstance(own, tirx.IntImm)), None)
        self.symbols = {} if self.fixed_batch is not None else dict.fromkeys(batches, batch)
        self.values: dict[relax.Var, relax.Expr] = (
            {olds[0]: parameter} if len(olds) == 1 else self._apart(parameter, olds)
        )

    def _apart(self, parameter: relax.Var, olds: Sequence[relax.Var]) -> dict[relax.Var, relax.Expr]:
        """The inputs, taken from the parameter that has them one after another."""
        values: dict[relax.Var, relax.Expr] = {}
        start = 0
        for old in olds:
            shape = _image(old)
            end = start + prod(shape)
            part = self._emit(relax.op.strided_slice(parameter, axes=[1], begin=[start], end=[end]))
            values[old] = self._emit(relax.op.reshape(part, relax.ShapeExpr([self.batch, *shape])))
            start = end
        return values

    def visit(self, binding: relax.Binding) -> None:
        value = binding.value
        if isinstance(value, relax.If | relax.Function):
            raise UserError("the model has control flow; export it with the branch that inference takes")
        self.values[binding.var] = self._call(value) if isinstance(value, Call) else self._mapped(value)

    def results(self, expr: relax.Expr) -> list[relax.Var]:
        """The variables that the function returns."""
        return [self._result(value) for value in _flat(self._mapped(expr))]

    def _result(self, value: relax.Expr) -> relax.Var:
        shape = value.ty.shape if isinstance(value, relax.Var) else None
        if shape is None or not len(shape) or not tvm.sym.Analyzer().can_prove_equal(shape[0], self.batch):
            raise UserError(f"the output ({value.ty}) does not keep the batch as its first dimension; return N x ...")
        if not all(isinstance(extent, tirx.IntImm) for extent in list(shape)[1:]):
            raise UserError(f"the output ({value.ty}) has no fixed shape; return what it is computed from")
        if str(value.ty.dtype) != "float32":
            raise UserError(
                f"the output ({value.ty}) is not float32; return what it is computed from: choosing the best classes "
                "or boxes belongs to the metric"
            )
        return value

    def _mapped(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and expr in self.values:
            return self.values[expr]
        if isinstance(expr, Tuple):
            return Tuple([self._mapped(field) for field in expr.fields])
        if isinstance(expr, TupleGetItem):
            inner = self._mapped(expr.tuple_value)
            if isinstance(inner, Tuple):
                return inner.fields[int(expr.index)]
            return self._emit(TupleGetItem(inner, int(expr.index)))
        if isinstance(expr, relax.ShapeExpr):
            return relax.ShapeExpr([self._mapped(dim) for dim in expr.values])
        if isinstance(expr, Call) and isinstance(expr.op, Op) and str(expr.op.name).startswith("relax."):
            return self._call(expr)
        if self.symbols and tvm.ir.is_prim_expr(expr):
            return _renamed(expr, self.symbols)
        return expr

    def _call(self, call: Call) -> relax.Expr:
        name = op_name(call)
        args = [self._mapped(arg) for arg in call.args]
        if name == "relax.nn.dropout":
            return Tuple([args[0], args[0]])
        if name == "relax.nn.batch_norm" and all(isinstance(a, GenericConst) for a in args[1:]):
            return self._batch_norm(call, args)
        if name in _RESHAPES:
            args[1] = self._with_batch(call, args)
        if name in ("relax.add", "relax.multiply") and isinstance(args[0], GenericConst):
            args.reverse()  # the constant second, as the folding and `graph.bias_adds` expect
        folded = _folded(name, call, args)
        if folded is not None:
            return folded
        if call.op == CONV2D:
            return self._emit(_with_padding(call, args, self.producers))
        value = self._emit(Call(call.op, args, call.attrs, call.ty_args))
        same = name in ("relax.reshape", "relax.astype") and isinstance(args[0], relax.Var) and value.ty == args[0].ty
        if same:
            self.nodes.pop()
            return args[0]
        return value

    def _emit(self, value: relax.Expr) -> relax.Expr:
        try:
            value = self.builder.normalize(value)
        except Exception as error:
            what = op_name(value) if isinstance(value, Call) else "a tuple"
            raise UserError(
                f"{what} does not work with a symbolic batch: {condense(error)}; export with a dynamic batch"
            ) from error
        var = relax.DataflowVar("v", value.ty)
        self.nodes.append(Node(var, value))
        self.producers[var] = value
        return var

    def _batch_norm(self, call: Call, args: list[relax.Expr]) -> relax.Expr:
        if call.attrs.training:
            raise UserError("a batch-norm is in training mode; call eval() on the model before exporting it")
        gamma, beta, mean, var = (a.value.numpy().astype(np.float64) for a in args[1:])
        scale = (gamma if call.attrs.scale else 1.0) / np.sqrt(var + float(call.attrs.epsilon))
        shift = (beta if call.attrs.center else 0.0) - mean * scale
        shape = [1] * len(args[0].ty.shape)
        shape[int(call.attrs.axis)] = -1
        value = args[0]
        for op, factor in ((MULTIPLY, scale), (ADD, shift)):
            value = self._emit(Call(op, [value, relax.const(factor.reshape(shape).astype(np.float32))]))
        return Tuple([value, args[3], args[4]])

    def _with_batch(self, call: Call, args: list[relax.Expr]) -> relax.Expr:
        """The target shape of a reshape; a fixed batch, or what it is merged with, becomes the symbolic one."""
        source, target = args
        if self.fixed_batch is None or not isinstance(target, relax.ShapeExpr) or not isinstance(source, relax.Var):
            return target
        if not _depends(source.ty.shape, self.batch):
            return target
        dims, fixed = [int(d) if isinstance(d, tirx.IntImm) else 0 for d in target.values], self.fixed_batch
        at = dims.index(fixed) if fixed > 1 and fixed in dims else 0
        if not all(dims) or not dims or dims[at] % fixed:
            raise UserError(
                f"{op_name(call)} to {target} mixes the fixed batch of {fixed} with other dimensions; "
                "export with a dynamic batch"
            )
        rest = dims[at] // fixed
        return relax.ShapeExpr([*dims[:at], self.batch if rest == 1 else self.batch * rest, *dims[at + 1 :]])


def _renamed(expr: relax.Expr, symbols: dict[tirx.Var, tirx.Var]) -> relax.Expr:
    """A shape expression with other symbols (this TVM has no substitution in Python)."""
    if tvm.ir.is_prim_var(expr):
        return symbols.get(expr, expr)
    if hasattr(expr, "a") and hasattr(expr, "b"):
        return type(expr)(_renamed(expr.a, symbols), _renamed(expr.b, symbols))
    return expr


def _depends(shape: Any, batch: tirx.Var) -> bool:
    return shape is not None and any(v.same_as(batch) for v in relax.analysis.free_symbolic_vars(shape))


def condense(error: BaseException) -> str:
    """The reason of an exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return reason if len(reason) <= 300 else reason[:297] + "..."


def _folded(name: str, call: Call, args: list[relax.Expr]) -> relax.Expr | None:
    """The value of a call without variables, or None."""
    if name not in OPERATORS or isinstance(call.ty, relax.ShapeType):
        return None
    values = [_literal(arg) for arg in args]
    if any(v is None for v in values):
        return None
    with torch.no_grad():
        result = OPERATORS[name](call.attrs)(*values)
    if not isinstance(result, tuple):
        return _constant(result)
    return Tuple([_constant(r) for r in result])


def _with_padding(call: Call, args: list[relax.Expr], producers: dict[relax.Var, relax.Expr]) -> Call:
    """The convolution, with the zeros that a `nn.pad` puts around its input as its own padding."""
    pad = producers.get(args[0])
    attrs = call.attrs
    if isinstance(pad, Call) and pad.op == _PAD and attrs.data_layout == "NCHW" and pad.attrs.pad_mode == "constant":
        channels, (top, bottom, left, right) = list(pad.attrs.pad_width)[:4], list(pad.attrs.pad_width)[4:]
        if not any(channels) and pad.attrs.pad_value == 0 and min(top, bottom, left, right) >= 0:
            padding = [int(a) + int(b) for a, b in zip(attrs.padding, (top, left, bottom, right), strict=True)]
            return relax.op.nn.conv2d(
                pad.args[0],
                args[1],
                strides=list(attrs.strides),
                padding=padding,
                dilation=list(attrs.dilation),
                groups=attrs.groups,
            )
    return Call(call.op, args, call.attrs, call.ty_args)


def _flat(value: relax.Expr) -> list[relax.Expr]:
    return [part for field in value.fields for part in _flat(field)] if isinstance(value, Tuple) else [value]


def _constant(value: torch.Tensor) -> GenericConst:
    array = np.ascontiguousarray(value.numpy())
    return relax.const(array.reshape(tuple(value.shape)), str(array.dtype))


def _literal(expr: relax.Expr) -> Any:
    """What a constant argument means to `torch_ops`, or None if it is not constant."""
    if isinstance(expr, GenericConst):
        return torch.from_numpy(np.array(expr.value.numpy()))
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return expr.value
    if isinstance(expr, Tuple | relax.ShapeExpr):
        values = tuple(_literal(f) for f in (expr.fields if isinstance(expr, Tuple) else expr.values))
        return None if any(v is None for v in values) else values
    return None
