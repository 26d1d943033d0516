"""The outputs of a network: one tensor, or several that are joined to one array where only the numbers matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tvm import relax
from tvm.ir import Tuple


@dataclass(frozen=True)
class Outputs:
    """The shapes of a network's outputs, each without its first dimension, the batch.

    One output is used as it is. Several are one array (n, numbers of an image) within the tool, and in the C library:
    of each image the outputs one after another, flattened.
    """

    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, function: relax.Function) -> Outputs:
        """Those of a canonical function."""
        return cls(tuple(tuple(int(extent) for extent in list(value.ty.shape)[1:]) for value in values(function)))

    def __str__(self) -> str:
        return ", ".join(f"({', '.join(['n', *map(str, shape)])})" for shape in self.shapes)

    @property
    def single(self) -> bool:
        return len(self.shapes) == 1

    @property
    def ends(self) -> list[int]:
        """Where each output ends among the numbers of an image."""
        return list(accumulate(prod(shape) for shape in self.shapes))

    def joined(self, outputs: Any) -> Any:
        """Outputs, a tensor or array or several, as one."""
        if self.single:
            return outputs[0] if isinstance(outputs, tuple | list) else outputs
        parts = [output.reshape(output.shape[0], -1) for output in outputs]
        return torch.cat(parts, dim=1) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis=1)

    def parted(self, joined: Any) -> tuple[Any, ...]:
        """The outputs of which one tensor or array was made by `joined`."""
        if self.single:
            return (joined,)
        bounds = zip([0, *self.ends], self.ends, self.shapes, strict=False)
        return tuple(joined[:, start:end].reshape(joined.shape[0], *shape) for start, end, shape in bounds)

    def given(self, joined: Any) -> Any:
        """What a user gets: an array, or a tuple of arrays where there are several outputs."""
        parts = self.parted(joined)
        return parts[0] if self.single else parts

    def error(self, got: np.ndarray, wanted: np.ndarray) -> float:
        """The largest difference of joined outputs, relative to the largest number of the output that it is in."""
        pairs = zip(self.parted(got), self.parted(wanted), strict=True)
        return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def concatenated(parts: Sequence[Any]) -> Any:
    """The outputs of several runs, arrays or tuples of them, as those of all their images."""
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(own) for own in zip(*parts, strict=True))
    return np.concatenate(parts)


def first(outputs: Any, count: int) -> Any:
    """The outputs, an array or a tuple of them, of so many images."""
    return tuple(own[:count] for own in outputs) if isinstance(outputs, tuple) else outputs[:count]


def as_arrays(outputs: Any) -> Any:
    """What a library returns, a tensor or several, as an array or a tuple of them."""
    return outputs.numpy() if hasattr(outputs, "numpy") else tuple(own.numpy() for own in outputs)


def values(function: relax.Function) -> Sequence[relax.Expr]:
    """The variables that a canonical function returns."""
    result = function.body.body
    return list(result.fields) if isinstance(result, Tuple) else [result]
