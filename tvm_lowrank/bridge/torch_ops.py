"""Relax operators in PyTorch: what the torch bridge runs, and what the importers fold constants with.

`OPERATORS` maps an operator's name to a function that reads its attributes once and returns the function that
computes it. That function takes the call's arguments in order: tensors, tuples of tensors, shapes as tuples of ints,
and plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank.errors import UserError

Compute = Callable[..., Any]
Make = Callable[[Any], Compute]

OPERATORS: dict[str, Make] = {}


def operator(*names: str) -> Callable[[Make], Make]:
    """Register the maker of one or several operators."""

    def register(make: Make) -> Make:
        OPERATORS.update(dict.fromkeys((f"relax.{name}" for name in names), make))
        return make

    return register


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a TVM dtype."""
    return getattr(torch, str(dtype))


def _plain(compute: Compute) -> Make:
    return lambda _: compute


def ints(values: Any) -> tuple[int, ...]:
    """An attribute of several numbers as plain ints."""
    return tuple(int(v) for v in values)


def need(ok: bool, what: str) -> None:
    """Refuse, in the user's words, what PyTorch or this table cannot do."""
    if not ok:
        raise UserError(f"{what} is not supported; re-export the model without it (float32, NCHW, inference form)")


_ELEMENTWISE: dict[str, Compute] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "isfinite": torch.isfinite,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "log": torch.log,
    "logical_not": torch.logical_not,
    "negative": torch.neg,
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "trunc": torch.trunc,
    "nn.relu": F.relu,
    "nn.relu6": F.relu6,
    "nn.selu": F.selu,
    "nn.silu": F.silu,
    "nn.gelu": F.gelu,
    "nn.gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "add": torch.add,
    "divide": torch.div,
    "equal": torch.eq,
    "floor_divide": torch.floor_divide,
    "floor_mod": torch.remainder,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.fmod,
    "multiply": torch.mul,
    "not_equal": torch.ne,
    "power": torch.pow,
    "subtract": torch.sub,
    "where": torch.where,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "clip": torch.clamp,
    "broadcast_to": lambda x, shape: x.expand(shape),
    "flatten": torch.flatten,
    "matmul": torch.matmul,
    "nn.batch_flatten": lambda x: torch.flatten(x, 1),
    "nn.dropout": lambda x: (x, torch.ones_like(x)),
    "reshape": torch.reshape,
    "shape_of": lambda x: tuple(x.shape),
    "shape_to_tensor": lambda shape: torch.tensor(shape, dtype=torch.int64),
    "tensor_to_shape": lambda x: tuple(int(v) for v in x),
}
OPERATORS.update({f"relax.{name}": _plain(compute) for name, compute in _ELEMENTWISE.items()})


@operator("nn.leakyrelu")
def _leakyrelu(attrs: Any) -> Compute:
    alpha = float(attrs.alpha)
    return lambda x: F.leaky_relu(x, alpha)


@operator("nn.softplus")
def _softplus(attrs: Any) -> Compute:
    beta, threshold = float(attrs.beta), float(attrs.threshold)
    return lambda x: F.softplus(x, beta, threshold)


@operator("nn.prelu")
def _prelu(attrs: Any) -> Compute:
    axis = int(attrs.axis)

    def compute(x: Tensor, alpha: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[axis] = -1
        return torch.where(x >= 0, x, x * alpha.reshape(shape))

    return compute


@operator("astype")
def _astype(attrs: Any) -> Compute:
    dtype = torch_dtype(attrs.dtype)
    return lambda x: x.to(dtype)


@operator("zeros")
def _zeros(attrs: Any) -> Compute:
    dtype = torch_dtype(attrs.dtype)
    return lambda shape: torch.zeros(shape, dtype=dtype)


@operator("ones")
def _ones(attrs: Any) -> Compute:
    dtype = torch_dtype(attrs.dtype)
    return lambda shape: torch.ones(shape, dtype=dtype)


@operator("full")
def _full(attrs: Any) -> Compute:
    dtype = torch_dtype(attrs.dtype)
    return lambda shape, value: value.to(dtype).expand(shape)


@operator("arange")
def _arange(attrs: Any) -> Compute:
    dtype = torch_dtype(attrs.dtype)
    return lambda start, end, step: torch.arange(start, end, step, dtype=dtype)


def _reduction(compute: Compute) -> Make:
    def make(attrs: Any) -> Compute:
        keepdims = bool(attrs.keepdims)
        axis = None if attrs.axis is None else ints(attrs.axis)
        return lambda x: compute(x, dim=tuple(range(x.dim())) if axis is None else axis, keepdim=keepdims)

    return make


def _product(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.dim() for d in dim), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


OPERATORS["relax.mean"] = _reduction(torch.mean)
OPERATORS["relax.sum"] = _reduction(torch.sum)
OPERATORS["relax.max"] = _reduction(torch.amax)
OPERATORS["relax.min"] = _reduction(torch.amin)
OPERATORS["relax.prod"] = _reduction(_product)
OPERATORS["relax.variance"] = _reduction(lambda x, dim, keepdim: torch.var(x, dim, unbiased=False, keepdim=keepdim))
OPERATORS["relax.std"] = _reduction(lambda x, dim, keepdim: torch.std(x, dim, unbiased=False, keepdim=keepdim))


@operator("argmax")
def _argmax(attrs: Any) -> Compute:
    axis, keepdims = None if attrs.axis is None else int(attrs.axis), bool(attrs.keepdims)
    return lambda x: torch.argmax(x, dim=axis, keepdim=keepdims)


@operator("topk")
def _topk(attrs: Any) -> Compute:
    k, axis, largest, kind = int(attrs.k), int(attrs.axis), bool(attrs.largest), str(attrs.ret_type)
    dtype = torch_dtype(attrs.dtype)

    def compute(x: Tensor) -> Any:
        values, indices = torch.topk(x, k, axis, largest)
        return {"both": (values, indices.to(dtype)), "values": values, "indices": indices.to(dtype)}[kind]

    return compute


@operator("cumsum")
def _cumsum(attrs: Any) -> Compute:
    need(attrs.axis is not None and not attrs.exclusive, "cumsum over the flattened tensor or exclusive")
    axis = int(attrs.axis)
    return lambda x: torch.cumsum(x, axis)


@operator("nn.softmax")
def _softmax(attrs: Any) -> Compute:
    axis = int(attrs.axis)
    return lambda x: torch.softmax(x, axis)


@operator("nn.log_softmax")
def _log_softmax(attrs: Any) -> Compute:
    axis = int(attrs.axis)
    return lambda x: torch.log_softmax(x, axis)


@operator("permute_dims")
def _permute_dims(attrs: Any) -> Compute:
    axes = None if attrs.axes is None else ints(attrs.axes)
    return lambda x: x.permute(axes if axes is not None else tuple(reversed(range(x.dim()))))


@operator("expand_dims")
def _expand_dims(attrs: Any) -> Compute:
    axes = ints(attrs.axis)

    def compute(x: Tensor) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(a % rank for a in axes):
            x = x.unsqueeze(axis)
        return x

    return compute


@operator("squeeze")
def _squeeze(attrs: Any) -> Compute:
    axes = None if attrs.axis is None else ints(attrs.axis)
    return lambda x: torch.squeeze(x) if axes is None else torch.squeeze(x, axes)


@operator("concat")
def _concat(attrs: Any) -> Compute:
    axis = 0 if attrs.axis is None else int(attrs.axis)
    return lambda xs: torch.cat(xs, axis)


@operator("stack")
def _stack(attrs: Any) -> Compute:
    axis = 0 if attrs.axis is None else int(attrs.axis)
    return lambda xs: torch.stack(xs, axis)


@operator("split")
def _split(attrs: Any) -> Compute:
    axis, parts = int(attrs.axis), attrs.indices_or_sections
    if hasattr(parts, "value"):
        sections = int(parts)
        return lambda x: torch.split(x, -(-x.shape[axis] // sections), axis)
    indices = ints(parts)
    return lambda x: torch.tensor_split(x, indices, axis)


@operator("strided_slice")
def _strided_slice(attrs: Any) -> Compute:
    def compute(
        x: Tensor, axes: tuple[int, ...], begin: tuple[int, ...], end: tuple[int, ...], strides: tuple[int, ...] = ()
    ) -> Tensor:
        index = [slice(None)] * x.dim()
        for axis, first, last, step in zip(axes, begin, end, strides or [1] * len(axes), strict=True):
            need(step > 0, "strided_slice with a negative stride")
            index[axis] = slice(first, last, step)
        return x[tuple(index)]

    return compute


@operator("take")
def _take(attrs: Any) -> Compute:
    axis = None if attrs.axis is None else int(attrs.axis)

    def compute(x: Tensor, indices: Any) -> Tensor:
        where = torch.as_tensor(indices, device=x.device).long()
        source, dim = (x.flatten(), 0) if axis is None else (x, axis % x.dim())
        taken = torch.index_select(source, dim, torch.remainder(where.reshape(-1), source.shape[dim]))
        return taken.reshape((*source.shape[:dim], *where.shape, *source.shape[dim + 1 :]))

    return compute


@operator("index_tensor")
def _index_tensor(attrs: Any) -> Compute:
    return lambda x, indices: x[tuple(i.long() for i in indices)]


@operator("gather_elements")
def _gather_elements(attrs: Any) -> Compute:
    axis = int(attrs.axis)
    return lambda x, indices: torch.gather(x, axis, indices.long())


@operator("repeat")
def _repeat(attrs: Any) -> Compute:
    repeats, axis = int(attrs.repeats), None if attrs.axis is None else int(attrs.axis)
    return lambda x: torch.repeat_interleave(x, repeats, axis)


@operator("tile")
def _tile(attrs: Any) -> Compute:
    repeats = ints(attrs.repeats)
    return lambda x: torch.tile(x, repeats)


@operator("flip")
def _flip(attrs: Any) -> Compute:
    axis = int(attrs.axis)
    return lambda x: torch.flip(x, (axis,))


@operator("einsum")
def _einsum(attrs: Any) -> Compute:
    subscripts = str(attrs.subscripts)
    return lambda xs: torch.einsum(subscripts, *xs)
