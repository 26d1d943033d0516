"""The measurements on disk: JSON lines, one for each tuned kernel, appended as soon as it is known."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import tvm

from tvm_lowrank.errors import UserError
from tvm_lowrank.lower import LOWERING_VERSION
from tvm_lowrank.schedule import Tiling
from tvm_lowrank.search.convolution import Convolution
from tvm_lowrank.targets.profile import Profile

FILE = "kernels.jsonl"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: the lower quartile of the samples, and their 10th and 90th percentile."""

    ms: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Entry:
    """One line: a kernel, its latency, the schedule that has it, and how many trials it was chosen from.

    ``conv`` is what a model of the latencies learns from; None if the kernel is no convolution. ``tried`` has the
    milliseconds of all its trials.
    """

    key: str
    name: str
    latency: Latency
    tiling: Tiling | None
    trials: int
    conv: Convolution | None = None
    tried: Mapping[Tiling, float] = field(default_factory=dict)

    def to_json(self) -> str:
        latency = self.latency
        return json.dumps(
            {
                "key": self.key,
                "name": self.name,
                "ms": latency.ms,
                "p10": latency.p10,
                "p90": latency.p90,
                "tiling": None if self.tiling is None else self.tiling.to_json(),
                "trials": self.trials,
                "conv": None if self.conv is None else self.conv.to_json(),
                "tried": [[tiling.to_json(), ms] for tiling, ms in self.tried.items()],
            }
        )

    @classmethod
    def from_json(cls, line: bytes) -> Entry:
        """Parse a line; ValueError, KeyError or TypeError if it is not one."""
        entry: dict[str, Any] = json.loads(line)
        tiling = None if entry["tiling"] is None else Tiling.from_json(entry["tiling"])
        latency = Latency(float(entry["ms"]), float(entry["p10"]), float(entry["p90"]))
        conv = None if entry.get("conv") is None else Convolution.from_json(entry["conv"])
        tried = {Tiling.from_json(tiling): float(ms) for tiling, ms in entry.get("tried", [])}
        return cls(str(entry["key"]), str(entry["name"]), latency, tiling, int(entry["trials"]), conv, tried)


@dataclass
class KernelCache:
    """The cache of one target; later lines win. Several processes may use the same file."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    position: int = 0  # everything in front of it has been read

    @classmethod
    def open(cls, cache_dir: Path, profile: Profile, *, threads: int) -> KernelCache:
        """Read the cache of a target, which need not exist.

        Raises
        ------
        UserError
            If a line but the last is damaged, or the file cannot be read or written.
        """
        folder = cache_dir / f"{profile.key}-tvm{tvm.__version__}-lowering{LOWERING_VERSION}-threads{threads}"
        cache = cls(folder / FILE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cache.refresh()
        except OSError as error:
            raise UserError(f"cannot use the cache {cache.path}: {error.strerror}; choose another folder") from error
        return cache

    def refresh(self) -> None:
        """Read what was appended since, by this or another process."""
        with self._locked() as file:
            self._read(file)

    def add(self, entry: Entry) -> None:
        """Append an entry; it is on disk when this returns."""
        with self._locked() as file:
            self._read(file)
            file.seek(self.position)
            file.truncate()  # a line that a killed process left unfinished
            file.write(entry.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.position = file.tell()
        self.entries[entry.key] = entry

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read(self, file: BinaryIO) -> None:
        file.seek(self.position)
        data = file.read()
        complete, _, torn = data.rpartition(b"\n")
        if torn:
            warnings.warn(f"{self.path}: ignoring an unfinished last line", stacklevel=4)
        for line in complete.splitlines():
            try:
                entry = Entry.from_json(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"the cache {self.path} is damaged ({error}); delete the file") from error
            self.entries[entry.key] = entry
        self.position += len(data) - len(torn)
