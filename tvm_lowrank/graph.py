"""The canonical Relax function and its sites.

Every importer ends in an IRModule whose function ``main(x)`` is in inference form: float32, NCHW/OIHW, one dataflow
block, weights as constants, batch-norm folded where legal, the batch symbolic. A **site** is a binding whose value is
``relax.nn.conv2d`` with a constant weight; the site's id is the name of the bound variable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, IRModule, Op

from tvm_lowrank.methods.chain import ConvSpec, Pair

CONV2D = Op.get("relax.nn.conv2d")
ADD = Op.get("relax.add")


@dataclass(frozen=True, eq=False)
class Site:
    """One convolution of the model.

    ``weight`` is OIHW float32; ``bias`` (shape (N,)) is the constant that the graph adds right after, or None;
    ``size`` is the (height, width) of the input.
    """

    id: str
    spec: ConvSpec
    size: Pair
    weight: np.ndarray
    bias: np.ndarray | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.spec.macs(self.size)


def factor_names(site: str, count: int) -> list[str]:
    """The names of the variables that a chain's convolutions are bound to, in order."""
    return [f"{site}.factor{i}" for i in range(1, count + 1)]


def chain_of(name: str) -> str:
    """The site that a factor belongs to, or the site itself."""
    return re.sub(r"\.factor\d+$", "", name)


def with_attribute(mod: IRModule, key: str, value: object, *, name: str = "main") -> IRModule:
    """A copy of the module whose function has an attribute."""
    functions = dict(mod.functions.items())
    functions[mod.get_global_var(name)] = mod[name].with_attr(key, value)
    return IRModule(functions, attrs=mod.attrs)


def bindings(function: relax.Function) -> list[relax.VarBinding]:
    """All variable bindings of a function, in order."""
    return [b for block in function.body.blocks for b in block.bindings if isinstance(b, relax.VarBinding)]


def is_site(value: relax.Expr) -> bool:
    """Whether a bound value is a 2-D convolution with constant weights."""
    return isinstance(value, Call) and value.op == CONV2D and isinstance(value.args[1], GenericConst)


def conv_spec(call: Call) -> ConvSpec:
    """The geometry of a ``relax.nn.conv2d`` call in any data and kernel layout."""
    attrs = call.attrs
    weight = dict(zip(str(attrs.kernel_layout), (int(d) for d in call.args[1].ty.shape), strict=True))
    groups = int(attrs.groups)
    padding = tuple(int(p) for p in attrs.padding)
    return ConvSpec(
        in_channels=weight["I"] * groups,
        out_channels=weight["O"],
        kernel=(weight["H"], weight["W"]),
        strides=(int(attrs.strides[0]), int(attrs.strides[1])),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=(int(attrs.dilation[0]), int(attrs.dilation[1])),
        groups=groups,
    )


def oihw(call: Call) -> np.ndarray:
    """The weight of a site's call as a float32 OIHW array."""
    layout = str(call.attrs.kernel_layout)
    return call.args[1].value.numpy().transpose([layout.index(axis) for axis in "OIHW"])


def bias_adds(function: relax.Function) -> dict[relax.Var, relax.VarBinding]:
    """For each site whose only use is the addition of one constant per channel: its variable and that addition."""
    uses: dict[relax.Var, int] = {}
    adds: dict[relax.Var, relax.VarBinding] = {}
    convs: dict[relax.Var, Call] = {}

    def count(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Var):
            uses[expr] = uses.get(expr, 0) + 1

    for binding in bindings(function):
        relax.analysis.post_order_visit(binding.value, count)
        if is_site(binding.value):
            convs[binding.var] = binding.value
        value = binding.value
        if isinstance(value, Call) and value.op == ADD and value.args[0] in convs:
            conv, other = convs[value.args[0]], value.args[1]
            if isinstance(other, GenericConst) and per_channel(other, conv):
                adds[value.args[0]] = binding
    count(function.body.body)
    return {var: binding for var, binding in adds.items() if uses[var] == 1}


def per_channel(constant: GenericConst, conv: Call) -> bool:
    """Whether the constant holds one number per output channel of the convolution, broadcast over the rest."""
    layout = str(conv.attrs.out_layout or conv.attrs.data_layout)
    expected = [conv_spec(conv).out_channels if axis == "C" else 1 for axis in layout]
    shape = [int(d) for d in constant.ty.shape]
    return [1] * (len(expected) - len(shape)) + shape == expected


def find_sites(mod: IRModule, name: str = "main") -> list[Site]:
    """The sites of a function, in the order of execution."""
    function = mod[name]
    adds = bias_adds(function)
    sites = []
    for binding in bindings(function):
        if not is_site(binding.value):
            continue
        call = binding.value
        data = dict(zip(str(call.attrs.data_layout), call.args[0].ty.shape, strict=True))
        added = adds.get(binding.var)
        bias = None if added is None else added.value.args[1].value.numpy().reshape(-1)
        size = (int(data["H"]), int(data["W"]))
        sites.append(Site(binding.var.name, conv_spec(call), size, oihw(call), bias))
    return sites


def constants(function: relax.Function) -> list[np.ndarray]:
    """The values of all constants of a function, in order."""
    found: list[np.ndarray] = []

    def collect(expr: relax.Expr) -> None:
        if isinstance(expr, GenericConst):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(function, collect)
    return found
