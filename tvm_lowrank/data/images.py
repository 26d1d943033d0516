"""Images as the tool uses them, which are made of what is stored when they are asked for.

What is stored may be larger than memory: an array, files (`tvm_lowrank.data.imagefolder.Files`), or one file that has
them all. Nothing here keeps more than a batch in memory, but for what a spool was told to keep.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from tvm_lowrank.data.form import Form
from tvm_lowrank.errors import UserError

IN_MEMORY = 2**28  # bytes of a split; what is read once and has more goes into a file
CHUNK = 2**25  # bytes of what is looked at together where all images are


class Images(Protocol):
    """Images (n, C, H, W): a slice or an array of numbers takes some out, as float32; an array of them is this, too."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray: ...


class Raw(Images, Protocol):
    """Images as they are stored: uint8 (n, H, W, C), or floats in either order."""

    @property
    def dtype(self) -> np.dtype: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """Images of one form, in memory or not; those that are asked for are converted then."""

    raw: Raw
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.raw), *self.form.shape)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray:
        return self.form.prepared(self.raw[picked])


@dataclass(frozen=True, eq=False)
class _Part:
    images: Images
    numbers: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.numbers), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray:
        return self.images[self.numbers[picked]]


def part(images: Images, picked: slice | np.ndarray) -> Images:
    """Some of the images, none of which is read now."""
    return _Part(images, np.arange(len(images))[picked])


def chunks(images: Images) -> Iterator[np.ndarray]:
    """All images, some at a time."""
    count = max(1, CHUNK // (4 * math.prod(images.shape[1:])))
    for start in range(0, len(images), count):
        yield images[start : start + count]


@dataclass(frozen=True, eq=False)
class Filed:
    """Arrays of one shape, one after another in an open file from ``offset`` on, each read when it is asked for."""

    file: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.close)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray:
        numbers = np.arange(len(self))[picked]
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for number, own in zip(numbers.tolist(), found, strict=True):
            if os.preadv(self.file.fileno(), [own], self.offset + number * own.nbytes) < own.nbytes:
                raise UserError("a file of images was cut off while it was used; run the same command again")
        return found


class Spool:
    """Images that come once, batch by batch: in memory while they are few, else in a file.

    The file has no name, so that it goes away with the object, or with the process however that ends.

    Parameters
    ----------
    folder : where the file may be; None is the system's place for temporary ones.
    what : what the images are called where there is no room for them.
    """

    def __init__(self, folder: Path | None, what: str) -> None:
        self._folder, self._what = folder, what
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._count = 0

    def add(self, batch: np.ndarray) -> None:
        """Append copies of images of one type and shape; floats become float32. UserError if there is no room."""
        batch = np.array(batch, np.float32 if batch.dtype.kind == "f" else batch.dtype, order="C")
        self._parts.append(batch)
        self._count += len(batch)
        if self._file is None and self._count * batch.itemsize * math.prod(batch.shape[1:]) <= IN_MEMORY:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - it lives on
            for kept in self._parts:
                _write(self._file, kept)
        except OSError as error:
            place, other = self._folder or tempfile.gettempdir(), "" if self._folder else " or set TMPDIR"
            raise UserError(
                f"cannot keep the {self._what} in {place}: {error.strerror}; make room there{other}"
            ) from error
        self._parts = [batch[:0]]

    def read(self) -> Raw:
        """All images, in the order in which they came; there was at least one batch."""
        if self._file is None:
            return np.concatenate(self._parts)
        (last,) = self._parts
        return Filed(self._file, (self._count, *last.shape[1:]), last.dtype)


def _write(file: IO[bytes], array: np.ndarray) -> None:
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]
