"""The images of a network with several inputs: an array for each, which the tool takes as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_lowrank.data.form import Form
from tvm_lowrank.data.images import Raw
from tvm_lowrank.errors import UserError
from tvm_lowrank.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Joined:
    """Images (n, numbers, 1, 1) of several inputs, each of which stays as it is stored until some are asked for."""

    parts: tuple[Raw, ...]
    inputs: Tensors
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), self.inputs.ends[-1], 1, 1)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray:
        found: np.ndarray = self.inputs.images([own[picked] for own in self.parts])
        return found


def is_inputs(value: Any, form: Form) -> bool:
    """Whether a value is a tuple or list with an array for each input of a network that has several."""
    if form.inputs is None or not isinstance(value, tuple | list) or len(value) != len(form.inputs.shapes):
        return False
    return all(getattr(own, "ndim", 0) for own in value)


def joined(parts: Sequence[Raw], split: str, form: Form) -> Joined:
    """Arrays (n, …), one for each input, as images; UserError if one is none that the model takes."""
    assert form.inputs is not None
    for number, own in enumerate(parts):
        form.check_input(number, own.shape, own.dtype, split)
    counts = [len(own) for own in parts]
    if len(set(counts)) > 1:
        raise UserError(f"{split} has {', '.join(map(str, counts))} images in its inputs; give as many of each")
    return Joined(tuple(parts), form.inputs)
