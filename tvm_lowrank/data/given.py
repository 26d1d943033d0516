"""What a user's objects hold: arrays, tensors, and what gives batches of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tvm_lowrank.console import progress
from tvm_lowrank.data.form import Form, by
from tvm_lowrank.data.images import Raw, Spool
from tvm_lowrank.data.parts import Targets
from tvm_lowrank.data.several import is_inputs, joined
from tvm_lowrank.data.targets import copied, gathered, listed, none_for, of_batch
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import summary

T = TypeVar("T")


def read_images(value: Any, what: str, split: str, form: Form, folder: Path | None) -> Raw:
    """Images: an array as it is, or batches, which are read once; labels that come with them are dropped.

    Of several inputs, an array is a tuple or list with one for each. ``what`` they are called as long as they are no
    array. Batches that are too many for memory go to a file in ``folder``.

    Raises
    ------
    UserError
        If there are none, they have not the form, reading fails, or there is no room for them.
    """
    items = None if hasattr(value, "__array__") or is_inputs(value, form) else _items(value)
    if items is None:
        return whole(value, what, split, form)

    def batch(item: Any) -> np.ndarray:
        return _batch(item[0] if is_batch(item, form) else item, what, split, form)

    return _spooled(_each(items, what, batch), _count(value), what, split, form, folder)


def read_labelled(
    value: Any, split: str, form: Form, folder: Path | None, *, labelled: bool = True
) -> tuple[Raw, Targets]:
    """Images and targets: a pair, or batches of such pairs; images are as for `read_images`.

    Targets are an array or a list with one for each image, of any objects; they are not checked. If none are needed
    there may be none.
    """
    x_name, y_name = f"{split} images", f"{split} targets"
    pair = is_whole(value, form, labelled=labelled)
    if not labelled:
        images = read_images(value[0] if pair else value, x_name, split, form, folder)
        return images, none_for(len(images))
    if pair:
        images = read_images(value[0], x_name, split, form, folder)
        return images, _targets(value[1], y_name, len(images))
    items = None if hasattr(value, "__array__") else _items(value)
    neither = f"{split} is {type(value).__name__}; give a pair (images, targets) or batches of such pairs"
    if items is None:
        raise UserError(neither)
    targets: list[Any] = []

    def batch(item: Any) -> np.ndarray:
        if not _is_pair(item):
            raise UserError(neither)
        images = _batch(item[0], x_name, split, form)
        targets.extend(of_batch(item[1], y_name, len(images)) if images.ndim >= 4 else [copied(item[1])])
        return images

    images = _spooled(_each(items, split, batch), _count(value), x_name, split, form, folder)
    return images, listed(targets, y_name)


def _targets(value: Any, what: str, count: int) -> Targets:
    if callable(getattr(value, "detach", None)) or hasattr(value, "__array__"):
        return as_array(value, 1, what)
    items = _items(value)
    if items is None:
        raise UserError(f"{what}: {type(value).__name__} is no list; give an array or a list with one for each image")
    return gathered(list(_each(items, what, copied)), what, count)


def as_array(value: Any, dims: int, what: str) -> np.ndarray:
    """An array, a tensor, or an iterable of batches (``dims`` axes) or items (``dims - 1`` axes) as one array."""
    if callable(getattr(value, "detach", None)):
        value = value.detach().cpu()
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__") or isinstance(value, (int, float)):
        return np.asarray(value)
    items = _items(value)
    if items is None:
        raise UserError(f"{what}: {type(value).__name__} is no array; give an array, a tensor or batches of them")
    return _join(list(_each(items, what, lambda item: as_array(item, dims, what))), dims, what)


def whole(value: Any, what: str, split: str, form: Form) -> Raw:
    """All images, as they are: an array, or of several inputs one for each; UserError if they have not the form."""
    if form.inputs is not None:
        return joined(_inputs(value, what, form), split, form)
    array = as_array(value, 4, what)
    form.check(array.shape, array.dtype, split)
    return array


def _batch(value: Any, what: str, split: str, form: Form) -> np.ndarray:
    """Some images (m, C, H, W), or a single one."""
    if form.inputs is None:
        return as_array(value, 4, what)
    parts = _inputs(value, what, form)
    alone = all(own.ndim == len(shape) for own, shape in zip(parts, form.inputs.shapes, strict=True))
    images = joined([own[None] for own in parts] if alone else parts, split, form)[:]
    return images[0] if alone else images


def _inputs(value: Any, what: str, form: Form) -> list[np.ndarray]:
    assert form.inputs is not None
    if not is_inputs(value, form):
        kind = f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__
        raise UserError(f"{what}: {kind}, the model has several inputs; give a tuple of arrays {form}")
    return [as_array(own, 1 + len(shape), what) for own, shape in zip(value, form.inputs.shapes, strict=True)]


def is_batch(item: Any, form: Form) -> bool:
    """Whether an item is an (images, targets) pair rather than a list of two arrays."""
    if not _is_pair(item):
        return False
    if form.inputs is not None:
        return is_inputs(item[0], form)
    images, targets = (_dims(own) for own in item)
    return images > targets or images > 3 or (images == 3 and isinstance(item, tuple))


def is_whole(value: Any, form: Form, *, labelled: bool = True) -> bool:
    """Whether a value is a pair of all images and their targets rather than two batches, of both or of images."""
    if not _is_pair(value):
        return False
    first, second = value
    if form.inputs is not None:
        batches = is_batch(first, form) and is_batch(second, form)
        if batches or (not labelled and is_inputs(value, form)):
            return False
        return labelled or isinstance(value, tuple) or not is_inputs(second, form)
    if not is_batch(first, form):
        return labelled or isinstance(value, tuple) or _dims(first) != _dims(second)
    if isinstance(first, tuple) or _dims(first[0]) > _dims(first[1]):
        return False
    # two arrays of images, or images and targets of their form
    return isinstance(value, tuple) or not is_batch(second, form)


def _dims(value: Any) -> int:
    return getattr(value, "ndim", 0)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _items(value: Any) -> Iterable[Any] | None:
    """What to iterate over, or None for what is not a collection of arrays."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    if hasattr(value, "__iter__"):
        return iter(value)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        # a torch Dataset; iterating over it directly would rely on an IndexError at its end
        return (value[i] for i in range(len(value)))
    return None


def _count(value: Any) -> int | None:
    """How many items a value has, if it says so."""
    return operator.length_hint(value) or None


def _each(items: Iterable[Any], what: str, convert: Callable[[Any], T]) -> Iterator[T]:
    """The items of an iterable of the user's, converted; its code may fail anywhere."""
    try:
        for item in items:
            yield convert(item)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: reading failed: {summary(error)}; correct the data source") from error


def _join(parts: list[np.ndarray], dims: int, what: str) -> np.ndarray:
    if not parts:
        raise UserError(f"{what}: empty; give at least one image")
    try:
        return np.concatenate(parts) if parts[0].ndim == dims else np.stack(parts)
    except ValueError as error:
        raise UserError(f"{what}: batches do not fit together: {error}; all images need one shape") from error


def _spooled(
    batches: Iterable[np.ndarray], count: int | None, what: str, split: str, form: Form, folder: Path | None
) -> Raw:
    """So many batches (n, …) or single images, checked and put together as they come."""
    spool, first = Spool(folder, f"{split} images"), None
    with progress(f"reading {split} images", count) as advance:
        for item in batches:
            batch = item if item.ndim >= 4 else item[None]
            own = batch.shape[1:], batch.dtype.kind
            if first not in (None, own):
                raise UserError(
                    f"{what}: batches do not fit together: {by(batch.shape)} ({batch.dtype}) after others of "
                    f"{by(first[0])}; all images need one shape"
                )
            form.check(batch.shape, batch.dtype, split)
            spool.add(batch)
            first = own
            advance()
    if first is None:
        raise UserError(f"{what}: empty; give at least one image")
    return spool.read()
