"""What belongs to images, taken apart and put together: outputs of a network, and what the data gives for each image.

Outputs are an array (n, …), or a tuple of them where a network has several. Targets are an array (n, …) where those of
all images have one shape, else a list of n objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Outputs: TypeAlias = np.ndarray | tuple[np.ndarray, ...]
Targets: TypeAlias = np.ndarray | list[Any]


def count(values: Outputs | Targets) -> int:
    """How many images they are of."""
    return len(values[0]) if isinstance(values, tuple) else len(values)


def take(values: Any, picked: slice | np.ndarray) -> Any:
    """Those of some images, by a slice or an array of numbers."""
    if isinstance(values, tuple):
        return tuple(own[picked] for own in values)
    if isinstance(values, list):
        return [values[number] for number in np.arange(len(values))[picked].tolist()]
    return values[picked]


def joined(parts: Sequence[Any]) -> Any:
    """Those of several batches, one after another; there is at least one."""
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(own) for own in zip(*parts, strict=True))
    if isinstance(parts[0], list):
        return [item for own in parts for item in own]
    return np.concatenate(parts)


def objects(items: Sequence[Any]) -> np.ndarray:
    """An array (n,) of any objects."""
    found = np.empty(len(items), object)
    for number, item in enumerate(items):
        found[number] = item
    return found


def arrays(outputs: Outputs) -> tuple[np.ndarray, ...]:
    """All outputs of a network, of which there may be one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def each(values: Outputs | Targets) -> list[Any]:
    """What belongs to each image: of several outputs a tuple."""
    return list(zip(*values, strict=True)) if isinstance(values, tuple) else list(values)
