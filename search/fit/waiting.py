"""What is known of many sites, waiting until it is asked for: in memory while it is little, else in files."""

from __future__ import annotations

import ctypes
import io
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tvm_lowrank.errors import UserError

T = TypeVar("T")
PREFIX = ".waiting-"  # of the folders' names; one that was left behind by a process that was killed may be removed
IN_MEMORY = 2**26  # bytes of a shelf; what is more is in files


class Scratch:
    """A folder for files that wait, made when the first one is written; it goes away with the object."""

    def __init__(self, folder: Path | None) -> None:
        self._parent = folder
        self._numbers = count()

    @cached_property
    def _folder(self) -> Path:
        if self._parent is not None:
            self._parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=self._parent, prefix=PREFIX))
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    def new_path(self) -> Path:
        """Where the next file may be written; UserError if there is no place for a folder."""
        with writing(self._parent or Path(tempfile.gettempdir())):
            return self._folder / str(next(self._numbers))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line of what goes wrong when something is written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room and run the same command with --resume"
        ) from error


def give_back() -> None:
    """Return memory that is free, but scattered, to the system; where there is no function for that, nothing happens.

    After one pass over 40 images of 224x224 these are a quarter to a third of a gigabyte.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Shelf(Mapping[str, T], Generic[T]):
    """Values by name; asking for one makes it anew."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is where files may be; None is the system's place for temporary ones."""
        self._scratch = Scratch(folder)
        self._kept: dict[str, bytes | Path] = {}
        self._bytes = 0

    def put(self, name: str, value: T) -> None:
        """Keep a value, in the place of one that had this name; several threads may do so.

        Raises
        ------
        UserError
            If there is no room for it.
        """
        data = pickle.dumps(value, protocol=5)
        former = self._kept.get(name)
        if isinstance(former, bytes):
            self._bytes -= len(former)
        elif former is not None:
            former.unlink()
        if self._bytes + len(data) <= IN_MEMORY:
            self._bytes += len(data)
            self._kept[name] = data
            return
        path = self._scratch.new_path()
        with writing(path):
            path.write_bytes(data)
        self._kept[name] = path

    def __getitem__(self, name: str) -> T:
        kept = self._kept[name]
        with io.BytesIO(kept) if isinstance(kept, bytes) else kept.open("rb") as file:
            return pickle.load(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class Rows:
    """Rows of numbers that come batch by batch, (n, N) float32 each: in memory, or in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._width = path, 0
        self._parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Append some rows; UserError if there is no room for them."""
        self._width = rows.shape[1]
        if self._path is None:
            self._parts.append(rows.detach())
            return
        with writing(self._path), self._path.open("ab") as file:
            file.write(rows.detach().contiguous().numpy().tobytes())

    def read(self) -> Tensor:
        """All rows, in the order in which they came."""
        if self._path is None:
            return torch.cat(self._parts)
        return torch.from_numpy(np.fromfile(self._path, np.float32).reshape(-1, self._width))
