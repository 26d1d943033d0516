"""What is known of many sites, in files until it is asked for: memory does not grow with the sites."""

from __future__ import annotations

import ctypes
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
PREFIX = ".waiting-"  # of the folders' names; one that was left behind by a process that was killed may be removed


def waiting_folder(folder: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder in this one, or in the system's place for such, which goes away with the object."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder, prefix=PREFIX, ignore_cleanup_errors=True)


def give_back() -> None:
    """Return memory that is free, but scattered, to the system; where there is no function for that, nothing happens.

    After one pass over 40 images of 224x224 these are a quarter to a third of a gigabyte.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Shelf(Mapping[str, T], Generic[T]):
    """Values by name, each in a file of its own; asking for one reads it."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = waiting_folder(folder)
        self._paths: dict[str, Path] = {}
        self._numbers = count()

    def put(self, name: str, value: T) -> None:
        """Keep a value, in the place of one that had this name; several threads may do so."""
        path = Path(self._folder.name) / str(next(self._numbers))
        with path.open("wb") as file:
            pickle.dump(value, file, protocol=5)
        self._paths[name] = path

    def __getitem__(self, name: str) -> T:
        with self._paths[name].open("rb") as file:
            return pickle.load(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Rows:
    """Rows of numbers that come batch by batch, (n, N) float32 each, in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._width = path, 0

    def add(self, rows: Tensor) -> None:
        """Append some rows."""
        self._width = rows.shape[1]
        with self._path.open("ab") as file:
            rows.detach().contiguous().numpy().tofile(file)

    def read(self) -> Tensor:
        """All rows, in the order in which they came."""
        return torch.from_numpy(np.fromfile(self._path, np.float32).reshape(-1, self._width))
