"""The measurements on disk: JSON lines, one for each tuned kernel, appended as soon as it is known."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

import tvm

from tvm_lowrank.codegen.lower import LOWERING_VERSION
from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.errors import UserError
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.targets.profile import Profile

FILE = "kernels.jsonl"
EXPORT_SCHEMA = 1


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
    """The cache of one target; later lines win. Several processes may use the same file.

    All methods raise UserError if the file cannot be read or written, or a line but the last is damaged.
    """

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
        except OSError as error:
            raise UserError(f"cannot use the cache {cache.path}: {error.strerror}; choose another folder") from error
        cache.refresh()
        return cache

    def refresh(self) -> None:
        """Read what was appended since, by this or another process."""
        with self._locked() as file:
            self._read(file)

    def add(self, entry: Entry) -> None:
        """Append an entry; it is on disk when this returns."""
        with self._locked() as file:
            self._read(file)
            self._append(file, [entry])

    def merge(self, entries: Iterable[Entry]) -> int:
        """Append those of some entries that are new or of more trials than what is there; returns how many."""
        with self._locked() as file:
            self._read(file)
            known = self.entries
            better = [e for e in entries if e.key not in known or e.trials > known[e.key].trials]
            self._append(file, better)
        return len(better)

    def _append(self, file: BinaryIO, entries: Sequence[Entry]) -> None:
        """Write entries behind all that was read."""
        file.seek(self.position)
        file.truncate()  # a line that a killed process left unfinished
        file.write(b"".join(entry.to_json().encode() + b"\n" for entry in entries))
        file.flush()
        os.fsync(file.fileno())
        self.position = file.tell()
        self.entries.update((entry.key, entry) for entry in entries)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise UserError(
                f"cannot use the cache {self.path}: {error.strerror}; make room there or choose another folder"
            ) from error

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


def exported(entries: Collection[Entry], profile: Profile, *, threads: int) -> str:
    """Entries of a target as the text of one file, for other machines: a header, then each of them."""
    header = json.dumps({**_identity(profile, threads), "kernels": len(entries)})
    return "".join(f"{line}\n" for line in (header, *(entry.to_json() for entry in entries)))


def read_export(path: Path, profile: Profile, *, threads: int) -> list[Entry]:
    """The entries of an exported file.

    Raises
    ------
    UserError
        If it is damaged, or not of this target, TVM, lowering and number of threads; the message says which.
    """
    try:
        first, *lines = path.read_bytes().splitlines() or [b""]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file that --export wrote") from error
    try:
        header = json.loads(first)
        schema, identity = header["schema"], {}
        if schema == EXPORT_SCHEMA:
            identity = {name: header[name] for name in (*_identity(profile, threads), "kernels")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an exported database; write one with tvm_lowrank tune --export") from error
    if schema != EXPORT_SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, this version reads {EXPORT_SCHEMA}; export it again with it")
    _check_identity(path, identity, profile, threads)
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=2):
        try:
            entry = _checked(Entry.from_json(line))
            if entry.key in entries:
                raise ValueError(f"{entry.key} is there twice")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"line {number} of {path} is damaged ({error}); copy or export the file again") from error
        entries[entry.key] = entry
    if len(entries) != identity["kernels"]:
        raise UserError(f"{path} has {len(entries)} of {identity['kernels']} kernels; copy or export the file again")
    return list(entries.values())


def how_to_tune(profile: Profile, threads: int) -> str:
    """What to do about a database that lacks kernels."""
    emulate = " --emulate" if profile.emulated else ""
    return f"tune here: tvm_lowrank profile --target {profile.name}{emulate} --threads {threads}"


def _identity(profile: Profile, threads: int) -> dict[str, Any]:
    """The header of an exported file, but for the number of kernels."""
    return {
        "schema": EXPORT_SCHEMA,
        "target": profile.key,
        "profile": profile.name,
        "tvm": tvm.__version__,
        "lowering": LOWERING_VERSION,
        "threads": threads,
    }


def _check_identity(path: Path, identity: Mapping[str, Any], profile: Profile, threads: int) -> None:
    own, tune = _identity(profile, threads), how_to_tune(profile, threads)
    if identity["target"] == replace(profile, emulated=not profile.emulated).key:
        whose, remedy = ("real", "leave --emulate out") if profile.emulated else ("emulated", "add --emulate")
        raise UserError(f"{path} is from {whose} devices; {remedy}")
    if identity["target"] != profile.key:
        if identity["profile"] != profile.name:
            raise UserError(f"{path} is for target {identity['profile']}, not {profile.name}; give its --target")
        raise UserError(f"{path} is for another processor, {identity['target']}, not {profile.key}; {tune}")
    for name, what in (("tvm", "TVM"), ("lowering", "lowering version")):
        if identity[name] != own[name]:
            raise UserError(f"{path} is of {what} {identity[name]}, not {own[name]}; {tune}")
    if identity["threads"] != threads:
        given = f"--threads {identity['threads']}"
        raise UserError(f"{path} is for {given}, not {threads}; import it with {given}, or {tune}")


def _checked(entry: Entry) -> Entry:
    """The entry; ValueError if its numbers cannot be."""
    latency = entry.latency
    if not all(0 < ms < inf for ms in (latency.ms, latency.p10, latency.p90, *entry.tried.values())):
        raise ValueError("a time is not positive")
    if entry.trials < 1:
        raise ValueError(f"{entry.trials} trials")
    return entry
