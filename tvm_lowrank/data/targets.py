"""What the data gives for each image, whatever that is: read with the images, told apart, and handed on as it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tvm_lowrank.data.form import Form, by
from tvm_lowrank.data.parts import Targets
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import summary


def none_for(images: int) -> np.ndarray:
    """The targets of images that have none, (n, 0)."""
    return np.zeros((images, 0), np.int64)


def copied(item: Any) -> Any:
    """A target as an array where it is one, a copy: a loader's memory is scarce; everything else as it is."""
    found = _plain(item)
    return np.array(found) if isinstance(found, np.ndarray) else found


def gathered(items: list[Any], what: str, count: int) -> Targets:
    """Targets of so many images from a list of them, or of batches of them."""
    items = [_plain(item) for item in items]
    arrays = [item for item in items if isinstance(item, np.ndarray)]
    in_batches = len(arrays) == len(items) > 0 and all(own.ndim for own in arrays)
    if in_batches and sum(map(len, arrays)) == count and (len(arrays) != count or arrays[0].ndim == 1):
        return _together(arrays, np.concatenate, what)
    return _together(items, np.stack, what)


def of_batch(value: Any, what: str, count: int) -> list[Any]:
    """The target of each of a batch's images; a mapping of values for all becomes one for each."""
    value = _plain(value)
    if isinstance(value, Mapping):
        parts = {key: of_batch(own, what, count) for key, own in value.items()}
        return [{key: own[number] for key, own in parts.items()} for number in range(count)]
    if isinstance(value, str | bytes) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        raise UserError(f"{what}: {type(value).__name__} for a batch of {count} images; give one for each")
    if len(value) != count:
        raise UserError(f"{what}: {len(value)} for a batch of {count} images; give one for each")
    return [copied(item) for item in value]


def listed(items: list[Any], what: str) -> Targets:
    """The targets of images, one after another: an array where they are arrays or numbers of one shape."""
    return _together([_plain(item) for item in items], np.stack, what)


def checked(targets: Targets, split: str, count: int, form: Form) -> Targets:
    """Targets of so many images; where the network gives class scores, one number an image must be a class."""
    if isinstance(targets, np.ndarray) and targets.dtype == object:
        targets = list(targets)
    if len(targets) != count:
        own = by(targets.shape) if isinstance(targets, np.ndarray) else str(len(targets))
        raise UserError(f"{split} has {count} images but targets of shape {own}; give one for each image")
    labels = isinstance(targets, np.ndarray) and targets.ndim == 1
    if isinstance(targets, np.ndarray) and labels and (form.classes is not None or targets.dtype.kind in "iu"):
        return form.labels(targets, split, count) if form.classes is not None else targets.astype("int64")
    return targets


def feed(digest: Callable[[Any], object], value: Any, what: str) -> None:
    """Give a hash everything that tells a value from others, alike in every process.

    Raises
    ------
    UserError
        If a value is an object that cannot be written to a file.
    """
    value = _plain(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        if value.dtype != np.int64:
            digest(value.dtype.str.encode())
        digest(str(value.shape).encode())
        digest(value.tobytes())
    elif isinstance(value, Mapping):
        digest(b"{")
        for key in sorted(value, key=repr):
            feed(digest, key, what)
            feed(digest, value[key], what)
        digest(b"}")
    elif isinstance(value, list | tuple | np.ndarray):
        digest(b"[")
        for item in value:
            feed(digest, item, what)
        digest(b"]")
    elif isinstance(value, set | frozenset):
        feed(digest, sorted(map(repr, value)), what)
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        digest(repr(value).encode() + b";")
    else:
        try:
            digest(pickle.dumps(value, protocol=4))
        except Exception as error:  # objects raise what they like
            raise UserError(f"{what}: {summary(error)}; give arrays, numbers, texts, lists and mappings") from error


def _plain(value: Any) -> Any:
    """Tensors, and what says that it is an array, as arrays; everything else as it is."""
    if callable(getattr(value, "detach", None)):
        value = value.detach().cpu()
    return np.asarray(value) if hasattr(value, "__array__") and not isinstance(value, np.ndarray) else value


def _together(items: list[Any], put: Callable[[list[np.ndarray]], np.ndarray], what: str) -> Targets:
    numbers = [isinstance(item, np.ndarray | np.generic | int | float) for item in items]
    if items and all(numbers):
        arrays = [np.asarray(item) for item in items]
        if put is np.concatenate:
            try:
                return np.concatenate(arrays)
            except ValueError as error:
                raise UserError(f"{what}: batches do not fit together: {error}; make them alike") from error
        if len({(own.shape, own.dtype.kind) for own in arrays}) == 1:
            return np.stack(arrays)
    return items
