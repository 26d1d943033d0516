"""A function as a list of operator calls: naming its sites, folding scales into them, putting it together again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, IRModule, Op, Tuple, TupleGetItem

from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import ADD, CONV2D

MULTIPLY, SUBTRACT, DIVIDE = (Op.get(f"relax.{name}") for name in ("multiply", "subtract", "divide"))


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call; `site` is set for convolutions with a constant weight."""

    var: relax.Var
    call: Call
    site: str | None = None


def named(nodes: Sequence[Node], wanted: Mapping[relax.Var, str | None]) -> list[Node]:
    """Give each convolution the id that is wanted for it: made unique, numbered where there is none."""
    convs = [node for node in nodes if isinstance(node.call, Call) and node.call.op == CONV2D]
    taken: set[str] = set()
    ids = {}
    for i, node in enumerate(convs, 1):
        base = wanted.get(node.var) or f"conv_{i}"
        ids[node.var] = base
        repeat = 2
        while ids[node.var] in taken:
            ids[node.var] = f"{base}_{repeat}"
            repeat += 1
        taken.add(ids[node.var])
    for node in convs:
        dtype = str(node.call.args[1].ty.dtype)
        if dtype != "float32":
            raise UserError(f"the weight of {ids[node.var]!r} is {dtype}, not float32; export the model in float32")
    return [
        replace(node, site=ids[node.var]) if node.var in ids and isinstance(node.call.args[1], GenericConst) else node
        for node in nodes
    ]


def _used(expr: relax.Expr) -> list[relax.Var]:
    """The variables that an expression reads, once per use."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, TupleGetItem):
        return _used(expr.tuple_value)
    fields = expr.args if isinstance(expr, Call) else expr.fields if isinstance(expr, Tuple) else ()
    return [var for field in fields for var in _used(field)]


def live(nodes: Sequence[Node], results: Sequence[relax.Var]) -> list[Node]:
    needed, kept = set(results), []
    for node in reversed(nodes):
        if node.var in needed:
            needed.update(_used(node.call))
            kept.append(node)
    return kept[::-1]


def _substituted(expr: relax.Expr, values: dict[relax.Var, relax.Var]) -> relax.Expr:
    if isinstance(expr, relax.Var):
        return values.get(expr, expr)
    if isinstance(expr, Tuple):
        return Tuple([_substituted(field, values) for field in expr.fields])
    if isinstance(expr, TupleGetItem):
        return TupleGetItem(_substituted(expr.tuple_value, values), int(expr.index))
    if isinstance(expr, Call) and not expr.args:
        return expr
    if isinstance(expr, Call):
        args = [_substituted(arg, values) for arg in expr.args]
        return Call(expr.op, args, expr.attrs, expr.ty_args, ret_ty=expr.ty)
    return expr


def fold_scaling(nodes: Sequence[Node], results: Sequence[relax.Var]) -> tuple[list[Node], list[relax.Var]]:
    """Fold per-channel multiplications and additions after a site into its weight and one bias."""
    uses = Counter(var for node in nodes for var in _used(node.call))
    uses.update(results)
    consumer = {var: node for node in nodes for var in _used(node.call)}
    values: dict[relax.Var, relax.Var] = {}
    folded: list[Node] = []
    absorbed: set[relax.Var] = set()
    for node in nodes:
        if node.var in absorbed:
            continue
        if node.site is None:
            folded.append(replace(node, call=_substituted(node.call, values)))
            continue
        call = node.call
        weight = call.args[1].value.numpy().astype(np.float64)
        bias: np.ndarray | None = None
        last = node.var
        while uses[last] == 1 and last in consumer:
            user = consumer[last]
            factors = _scaling(user.call, last, weight.shape[0])
            if factors is None:
                break
            scale, shift = factors
            weight = weight * scale[:, None, None, None]
            bias = None if bias is None else bias * scale
            if shift is not None:
                bias = shift if bias is None else bias + shift
            absorbed.add(user.var)
            last = user.var
        call = Call(call.op, [_substituted(call.args[0], values), _float(weight)], call.attrs, ret_ty=call.ty)
        folded.append(replace(node, call=call))
        if last.same_as(node.var):
            continue
        values[last] = node.var
        if bias is not None:
            values[last] = relax.DataflowVar("v", node.var.ty)
            add = Call(ADD, [node.var, _float(bias.reshape(1, -1, 1, 1))], ret_ty=node.var.ty)
            folded.append(Node(values[last], add))
    return folded, [values.get(result, result) for result in results]


def _float(values: np.ndarray) -> GenericConst:
    return relax.const(values.astype(np.float32), "float32")


def _scaling(call: Call, source: relax.Var, channels: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(scale, shift) per channel if the call is an addition to (or multiplication of) `source` by constants."""
    if not isinstance(call, Call) or call.op not in (ADD, MULTIPLY, SUBTRACT, DIVIDE):
        return None
    left, right = call.args
    if not (isinstance(left, relax.Var) and left.same_as(source) and isinstance(right, GenericConst)):
        return None
    values = right.value.numpy().astype(np.float64)
    shape = (1,) * (4 - values.ndim) + values.shape
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (1, 1) or shape[1] not in (1, channels):
        return None
    values = np.broadcast_to(values.reshape(-1), channels)
    if call.op == MULTIPLY:
        return values, None
    if call.op == DIVIDE:
        return 1.0 / values, None
    return np.ones(channels), values if call.op == ADD else -values


def check_constants(nodes: Sequence[Node]) -> None:
    site_of = {node.var: node.site for node in nodes if node.site}
    for node in nodes:
        if not isinstance(node.call, Call):
            continue
        for arg in node.call.args:
            # scalars may be infinite on purpose: bounds, masks
            if not isinstance(arg, GenericConst) or not len(arg.ty.shape) or np.isfinite(arg.value.numpy()).all():
                continue
            if node.site:
                where = f"the weight of {node.site!r} (its batch-norm included)"
            elif node.call.args[0] in site_of:
                where = f"the bias of {site_of[node.call.args[0]]!r} (its batch-norm included)"
            else:
                where = f"a constant of {op_name(node.call)} with shape {arg.ty.shape}"
            raise UserError(f"{where} has NaN or infinite values; repair or retrain the model")


def assembled(parameter: relax.Var, nodes: Sequence[Node], results: Sequence[relax.Var]) -> IRModule:
    """One function with one dataflow block, which returns one variable, or a tuple of several."""
    taken = {node.site for node in nodes if node.site} | {parameter.name}
    counts: Counter[str] = Counter()
    values: dict[relax.Var, relax.Var] = {}
    rewritten = []
    for node in nodes:
        name = node.site
        while name is None or (name != node.site and name in taken):
            stem = op_name(node.call).rsplit(".", 1)[-1] if isinstance(node.call, Call) else "item"
            counts[stem] += 1
            name = f"{stem}_{counts[stem]}"
        make = relax.Var if node.var in results else relax.DataflowVar
        values[node.var] = make(name, node.var.ty)
        rewritten.append(relax.VarBinding(values[node.var], _substituted(node.call, values)))
    output = values[results[0]] if len(results) == 1 else Tuple([values[result] for result in results])
    body = relax.SeqExpr([relax.DataflowBlock(rewritten)], output)
    types = [values[result].ty for result in results]
    returned = types[0] if len(types) == 1 else relax.TupleType(types)
    function = relax.Function([parameter], body, returned).with_attr("global_symbol", "main")
    # a SeqExpr made by hand has no type yet
    return relax.transform.Normalize()(IRModule({"main": function}))


def op_name(call: Call) -> str:
    if _is_tir(call):
        return f"kernel {call.args[0].name_hint!r}"
    return str(getattr(call.op, "name", call.op))


def _is_tir(call: Call) -> bool:
    return isinstance(call.op, Op) and str(call.op.name) == "relax.call_tir"
