"""Images to learn from, with class labels where the network tells classes apart: batches, each checked as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_lowrank.data.form import Form, Stats, form_of
from tvm_lowrank.data.given import as_array, is_batch, is_whole, whole
from tvm_lowrank.data.images import Raw
from tvm_lowrank.data.parts import take
from tvm_lowrank.data.several import Joined
from tvm_lowrank.data.splits import IN_MEMORY
from tvm_lowrank.data.targets import none_for
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import absolute, load_object, summary
from tvm_lowrank.tensors import Shape

Batch = tuple[Tensor, Tensor | None]
Batches = Callable[[int], Iterable[Batch]]

BATCH = 100  # images of a batch made from arrays
_FORMS = "a DataLoader or other batches of (images, labels), a pair of arrays, or a function of the epoch"


def name_of(source: str | Callable[[int], Iterable[Any]] | Iterable[Any]) -> str:
    """What training data is called, valid from any folder."""
    return absolute(source) if isinstance(source, str) else IN_MEMORY


def load_training(
    source: str | Callable[[int], Iterable[Any]] | Iterable[Any],
    *,
    input_shape: Shape | tuple[Shape, ...],
    mean: Stats = None,
    std: Stats = None,
    classes: int | None = None,
    labelled: bool = True,
) -> Batches:
    """The training batches of an epoch, as a function of its number, which counts from 1.

    The first batch is read and checked here, before any long work starts; the others are checked as they are used.

    Parameters
    ----------
    source
        ``file.py:factory`` or ``pkg.module:factory``, a function without arguments that returns one of these; or one of
        these itself:

        - an iterable of (images, labels) batches, such as a DataLoader, which is iterated anew in every epoch;
        - a pair of arrays (images, labels), which are given in batches of 100, in another order in every epoch;
          an incomplete last batch is left out;
        - a function of the epoch's number that returns an iterable of batches.
    input_shape
        (C, H, W) of the model; of one with several inputs the shape of each, and images are tuples of arrays.
    mean, std
        Per channel (or one for all), on the scale 0 to 1, for images that are uint8 NHWC; the default is 0 and 1.
        Float images are NCHW and taken as they are.
    classes
        Number of classes that the model tells apart, if known: labels must be smaller.
    labelled
        Whether class labels are learnt; else a batch may have any targets or none, and they are left out.

    Returns
    -------
    A function of the epoch's number. What it returns has a length where the user's batches have one, and gives
    float32 NCHW images with int64 labels, or None.

    Raises
    ------
    UserError
        If there is no such function, it fails or returns something else, or its first batch is not usable; while
        iterating, if a later batch is not, with the numbers of the epoch and of the batch.
    """
    form = form_of(input_shape, mean, std, classes)
    check = _checked if labelled else _images_of
    if isinstance(source, str):
        name, given = source, _called(load_object(source), source)
    else:
        name, given = IN_MEMORY, source
    epochs = _epochs(given, name, form, labelled)

    def batches(number: int) -> Iterable[Batch]:
        return _Epoch(_called(epochs, name, number), number, name, partial(check, form=form))

    next(iter(batches(1)))
    return batches


def _checked(batch: Any, where: str, form: Form) -> Batch:
    """A batch of the user's as tensors that the model takes."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError(f"{where} is {type(batch).__name__}; give a pair (images, labels)")
    images = _read(batch[0], where, form)
    labels = form.labels(as_array(batch[1], 1, f"{where} labels"), where, len(images))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _images_of(batch: Any, where: str, form: Form) -> Batch:
    """The images of a batch of the user's, whatever comes with them."""
    return torch.from_numpy(_read(batch[0] if is_batch(batch, form) else batch, where, form)), None


def _read(images: Any, where: str, form: Form) -> np.ndarray:
    return form.images(whole(images, f"{where} images", where, form)[:], where)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The checked batches of one epoch; it has a length if the user's batches have one."""

    batches: Iterable[Any]
    number: int
    source: str
    check: Callable[[Any, str], Batch]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError, as of any object without a length

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for where, batch in self._named():
            yield self.check(batch, where)
            empty = False
        if empty:
            raise UserError(f"training data {self.source} has no batch in epoch {self.number}; give at least one")

    def _named(self) -> Iterator[tuple[str, Any]]:
        """The user's batches, each with what to call it; what their code raises becomes one line."""
        number = 1
        try:
            for batch in self.batches:
                yield self._name(number), batch
                number += 1
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self._name(number)}: reading failed: {summary(error)}; correct the data source"
            ) from error

    def _name(self, batch: int) -> str:
        return f"training (epoch {self.number}, batch {batch})"


@dataclass(frozen=True, eq=False)
class _Shuffled:
    """Two arrays in batches, in one order."""

    images: Raw | tuple[Raw, ...]
    labels: np.ndarray
    order: np.ndarray

    def __len__(self) -> int:
        return max(1, len(self.order) // BATCH)

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray]]:
        for start in range(0, len(self) * BATCH, BATCH):
            part = self.order[start : start + BATCH]
            yield take(self.images, part), self.labels[part]


def _called(function: Any, source: str, *arguments: int) -> Any:
    """What a function of the user's returns; what is no function is taken as it is."""
    if not callable(function):
        return function
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"training data {source} failed: {summary(error)}; correct the function") from error


def _epochs(value: Any, source: str, form: Form, labelled: bool) -> Any:
    """What the factory returned, as a function of the epoch or as batches for every epoch."""
    if is_whole(value, form, labelled=labelled):
        return _shuffled(value[0], value[1], form, labelled)
    if isinstance(value, Iterator):
        raise UserError(
            f"training data {source} gave {type(value).__name__}, which can be read only once; give {_FORMS}"
        )
    if not callable(value) and (isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__")):
        raise UserError(f"training data {source} gave {type(value).__name__}; give {_FORMS}")
    return value


def _shuffled(images: Any, labels: Any, form: Form, labelled: bool) -> Callable[[int], _Shuffled]:
    x = whole(images, "training images", "training", form)
    form.images(x[:1], "training")
    y = form.labels(as_array(labels, 1, "training labels"), "training", len(x)) if labelled else none_for(len(x))
    parts = x.parts if isinstance(x, Joined) else x
    return lambda epoch: _Shuffled(parts, y, np.random.default_rng(epoch).permutation(len(x)))
