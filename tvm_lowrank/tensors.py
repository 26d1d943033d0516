"""The inputs and outputs of a network: one tensor each, or several that are joined to one array."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # whoever only loads a bundle needs neither TVM's compiler nor PyTorch
    from tvm import relax

Shape = tuple[int, ...]
INPUTS = "inputs"  # the attribute of a canonical function that has the shapes of several inputs


@dataclass(frozen=True)
class Tensors:
    """The shapes of a network's outputs, or inputs, each without its first dimension, the batch.

    One is used as it is. Several are one array (n, numbers of an image) within the tool, and in the C library: of each
    image the tensors one after another, flattened. A canonical function takes several inputs as (n, numbers, 1, 1).
    """

    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, function: relax.Function) -> Tensors:
        """The outputs of a canonical function."""
        return cls(tuple(tuple(int(extent) for extent in list(value.ty.shape)[1:]) for value in values(function)))

    @classmethod
    def taken(cls, function: relax.Function) -> Tensors:
        """The inputs of the network that a canonical function was made from."""
        said = (function.attrs or {}).get(INPUTS)
        if said is None:
            return cls((tuple(int(extent) for extent in list(function.params[0].ty.shape)[1:]),))
        return cls(tuple(map(tuple, json.loads(str(said)))))

    def __str__(self) -> str:
        return ", ".join(f"({', '.join(['n', *map(str, shape)])})" for shape in self.shapes)

    @property
    def single(self) -> bool:
        return len(self.shapes) == 1

    @property
    def ends(self) -> list[int]:
        """Where each tensor ends among the numbers of an image."""
        return list(accumulate(prod(shape) for shape in self.shapes))

    def joined(self, tensors: Any) -> Any:
        """A tensor or array, or several, as one."""
        if self.single:
            return tensors[0] if isinstance(tensors, tuple | list) else tensors
        parts = [tensor.reshape(tensor.shape[0], prod(tensor.shape[1:])) for tensor in tensors]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts, axis=1)
        import torch

        return torch.cat(parts, dim=1)

    def images(self, tensors: Any) -> Any:
        """Inputs, a tensor or array or several, as what a canonical function takes."""
        joined = self.joined(tensors)
        return joined if self.single else joined[:, :, None, None]

    def parted(self, joined: Any) -> tuple[Any, ...]:
        """What one tensor or array was made of by `joined`."""
        if self.single:
            return (joined,)
        bounds = zip([0, *self.ends], self.ends, self.shapes, strict=False)
        return tuple(joined[:, start:end].reshape(joined.shape[0], *shape) for start, end, shape in bounds)

    def given(self, joined: Any) -> Any:
        """What a user gets: an array, or a tuple of arrays where there are several."""
        parts = self.parted(joined)
        return parts[0] if self.single else parts

    def error(self, got: np.ndarray, wanted: np.ndarray) -> float:
        """The largest difference of joined outputs, relative to the largest number of the output that it is in."""
        pairs = zip(self.parted(got), self.parted(wanted), strict=True)
        return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def as_arrays(outputs: Any) -> Any:
    """What a library returns, a tensor or several, as an array or a tuple of them."""
    return outputs.numpy() if hasattr(outputs, "numpy") else tuple(own.numpy() for own in outputs)


def values(function: relax.Function) -> Sequence[relax.Expr]:
    """The variables that a canonical function returns."""
    from tvm.ir import Tuple

    result = function.body.body
    return list(result.fields) if isinstance(result, Tuple) else [result]
