"""What follows a site in the graph: the addition of another branch, an activation, a max-pool.

A convolution's error matters as the rest of the network sees it, which is through y -> r(y + a): ``a`` the other branch
of a residual block, ``r`` whatever is computed elementwise from there on. The importers take some activations apart
(hard-swish is four operators), so `r` is not looked up by name: it is the longest piece of the graph that depends on
that one tensor alone, is elementwise and has one result. Where windows of a max-pool then share no element, an element
matters only as far as it exceeds the others of its window: `rivals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tvm import relax, tirx
from tvm.ir import Call, GenericConst

from tvm_lowrank.bridge.torch_nn import OPERATORS
from tvm_lowrank.bridge.torch_ops import ints
from tvm_lowrank.graph import ADD, bias_adds, bindings
from tvm_lowrank.methods.chain import Pair

_UNARY = "abs clip erf exp log negative sigmoid sqrt square tanh"
_BINARY = "add divide maximum minimum multiply power subtract"
_LOGICAL = "equal greater greater_equal less less_equal logical_and logical_not logical_or not_equal where"
_ACTIVATIONS = "gelu gelu_tanh leakyrelu prelu relu relu6 selu silu softplus"
ELEMENTWISE = frozenset(
    [f"relax.{name}" for names in (_UNARY, _BINARY, _LOGICAL) for name in names.split()]
    + [f"relax.nn.{name}" for name in _ACTIVATIONS.split()]
) & frozenset(OPERATORS)


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function that the graph computes: callable on NCHW tensors of any batch, height and width.

    ``name`` lists its operators in order, such as ``"nn.relu"`` or ``"add clip divide multiply"``.
    """

    name: str
    _entry: relax.Var
    _steps: tuple[tuple[relax.Var, Any, tuple[Any, ...]], ...]

    def __call__(self, x: Tensor) -> Tensor:
        values = {self._entry: x}
        for var, compute, args in self._steps:
            values[var] = compute(*(values[arg] if isinstance(arg, relax.Var) else arg for arg in args))
        return values[self.result]

    @property
    def result(self) -> relax.Var:
        """The variable of the graph that holds the activation's value."""
        return self._steps[-1][0]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What is applied to a site's output, after its bias: ``activation(output + residual)``, then perhaps a max-pool.

    ``residual`` is the variable (of the output's shape) that the graph adds, or None; ``activation`` is None for the
    identity. ``result`` is the variable that holds all this; if a max-pool of disjoint windows is its only use,
    ``window`` is their (height, width).
    """

    residual: relax.Var | None
    activation: Activation | None
    result: relax.Var
    window: Pair | None = None


def epilogue(function: relax.Function, site: str) -> Epilogue:
    """The epilogue of a site of a canonical function; the identity where something unknown follows.

    Raises
    ------
    KeyError
        If the function has no such site.
    """
    users = _users(function)
    entry = next((b.var for b in bindings(function) if b.var.name == site), None)
    if entry is None:
        raise KeyError(site)
    bias = bias_adds(function).get(entry)
    output = entry if bias is None else bias.var
    residual = None
    if len(users[output]) == 1:
        user = users[output][0]
        other = None if user is None else _addend(user.value, output)
        if user is not None and other is not None:
            residual, output = other, user.var
    activation = _activation(function, output, users)
    result = output if activation is None else activation.result
    return Epilogue(residual, activation, result, _window(users[result]))


def rivals(values: Tensor, window: Pair) -> Tensor:
    """For each element of (n, C, H, W) the largest of the others in its window; infinity where no window reaches."""
    n, channels, height, width = values.shape
    down, across = window
    rows, cols = height // down, width // across
    tiles = values[:, :, : rows * down, : cols * across].reshape(n, channels, rows, down, cols, across)
    tiles = tiles.transpose(3, 4).reshape(n, channels, rows, cols, down * across)
    if down * across == 1:
        return torch.full_like(values, -torch.inf)
    top = tiles.topk(2, dim=-1)
    others = top.values[..., :1].expand_as(tiles).scatter(-1, top.indices[..., :1], top.values[..., 1:])
    result = torch.full_like(values, torch.inf)
    back = others.reshape(n, channels, rows, cols, down, across).transpose(3, 4)
    result[:, :, : rows * down, : cols * across] = back.reshape(n, channels, rows * down, cols * across)
    return result


def _window(users: Sequence[relax.VarBinding | None]) -> Pair | None:
    """The windows of the max-pool that is the only user, if they share no element."""
    value = None if len(users) != 1 or users[0] is None else users[0].value
    if not isinstance(value, Call) or _name(value) != "relax.nn.max_pool2d":
        return None
    attrs = value.attrs
    size = ints(attrs.pool_size)
    plain = not any(ints(attrs.padding)) and set(ints(attrs.dilation)) == {1} and not attrs.ceil_mode
    return (size[0], size[1]) if plain and ints(attrs.strides) == size and str(attrs.layout) == "NCHW" else None


_Users = dict[relax.Var, list[relax.VarBinding | None]]


def _users(function: relax.Function) -> _Users:
    """The bindings that read each variable, once per use; None stands for the function's result."""
    users: _Users = {var: [] for var in [*function.params, *(b.var for b in bindings(function))]}
    for binding in [*bindings(function), None]:

        def count(expr: relax.Expr, binding: relax.VarBinding | None = binding) -> None:
            if isinstance(expr, relax.Var) and expr in users:
                users[expr].append(binding)

        relax.analysis.post_order_visit(function.body.body if binding is None else binding.value, count)
    return users


def _addend(value: relax.Expr, output: relax.Var) -> relax.Var | None:
    """The other operand, if a value adds another tensor of the same shape to an output."""
    if not isinstance(value, Call) or value.op != ADD:
        return None
    others = [arg for arg in value.args if not (isinstance(arg, relax.Var) and arg.same_as(output))]
    if len(others) != 1 or not isinstance(others[0], relax.Var):
        return None
    shapes = [[int(d) if isinstance(d, tirx.IntImm) else -1 for d in v.ty.shape] for v in (others[0], output)]
    return others[0] if shapes[0] == shapes[1] else None


def _activation(function: relax.Function, entry: relax.Var, users: _Users) -> Activation | None:
    """The longest elementwise function of `entry` none of whose intermediate values is used elsewhere."""
    reads: dict[relax.Var, set[relax.Var]] = {entry: set()}  # of each value computed from `entry` alone: all it needs
    inside: dict[relax.Var, relax.VarBinding] = {}
    last = None
    for binding in bindings(function):
        sources = _sources(binding.value, int(entry.ty.shape[1]))
        if not sources or not all(var in reads for var in sources):
            continue
        needs = set(sources).union(*(reads[var] for var in sources))
        reads[binding.var], inside[binding.var] = needs, binding
        within = needs | {binding.var}
        closed = all(user is not None and user.var in within for var in needs for user in users[var])
        if closed and str(binding.var.ty.dtype) == str(entry.ty.dtype):
            last = binding.var
    if last is None:
        return None
    chosen = [binding for var, binding in inside.items() if var in reads[last] or var.same_as(last)]
    steps = tuple((b.var, OPERATORS[_name(b.value)](b.value.attrs), _arguments(b.value.args)) for b in chosen)
    return Activation(" ".join(_name(b.value).removeprefix("relax.") for b in chosen), entry, steps)


def _name(call: Call) -> str:
    return str(getattr(call.op, "name", ""))


def _sources(value: relax.Expr, channels: int) -> list[relax.Var]:
    """The variables of an elementwise call whose other arguments are numbers, or one number per channel."""
    if not isinstance(value, Call) or _name(value) not in ELEMENTWISE:
        return []
    for arg in value.args:
        if isinstance(arg, GenericConst):
            shape = [int(d) for d in arg.ty.shape]
            aligned = [1] * (4 - len(shape)) + shape
            per_channel = aligned in ([1, 1, 1, 1], [1, channels, 1, 1])
            if not per_channel and not (_name(value) == "relax.nn.prelu" and shape == [channels]):
                return []
        elif not isinstance(arg, relax.Var | tirx.IntImm | tirx.FloatImm):
            return []
    return [arg for arg in value.args if isinstance(arg, relax.Var)]


def _arguments(args: Sequence[relax.Expr]) -> tuple[Any, ...]:
    """Variables as they are, constants as tensors or numbers."""
    return tuple(
        torch.from_numpy(arg.value.numpy().copy())
        if isinstance(arg, GenericConst)
        else arg
        if isinstance(arg, relax.Var)
        else arg.value
        for arg in args
    )
