"""The device that a search is for: this machine, or boards behind an RPC tracker, real or emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tvm_lowrank import console
from tvm_lowrank.bundle.library import CompiledModel, level
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.codegen.processor import require
from tvm_lowrank.errors import UserError
from tvm_lowrank.options import ConnectionOptions
from tvm_lowrank.searching.measure.bench import Devices
from tvm_lowrank.searching.measure.fleet import Fleet
from tvm_lowrank.searching.measure.local import LocalBench, measure_interleaved
from tvm_lowrank.searching.measure.remote import Remote
from tvm_lowrank.targets.doctor import examine
from tvm_lowrank.targets.emulate import emulated
from tvm_lowrank.targets.profile import Profile, load_profile
from tvm_lowrank.targets.toolchain import cache_folder
from tvm_lowrank.targets.tracker import tracker_address

Shape = tuple[int, int, int, int]
Model = Callable[[np.ndarray], Any]  # to an array, or a tuple of several
EMULATED_BOARDS = 2
EMULATED_IMAGES = 200  # an emulator is some hundred times slower than a core


class Device(Protocol):
    """What a search needs to do on the device it is for."""

    @property
    def profile(self) -> Profile:
        """The target; its key tells emulated devices from real ones."""

    @property
    def devices(self) -> Devices:
        """Where the latency oracle compiles and times kernels."""

    @property
    def how(self) -> str:
        """How its times were obtained: "measured" or "emulated"."""

    @property
    def threads(self) -> int:
        """Threads that libraries run with."""

    @property
    def chunk(self) -> int | None:
        """Images that a model is best given at once; None if it takes all of them, and reads them itself."""

    @property
    def limit(self) -> int | None:
        """Images that it can be asked to judge in bearable time; None is any number."""

    @property
    def linker(self) -> tuple[str | None, tuple[str, ...]]:
        """The C++ compiler that links for the device (None: whichever this machine has), and its options."""

    def model(self, path: Path, shape: Shape) -> Model:
        """An exported library for inputs of one shape, as a function of any number of images."""

    def interleaved(self, models: Mapping[str, Path], x: np.ndarray, *, rounds: int) -> dict[str, list[float]]:
        """Milliseconds of whole models, measured in turns."""


@dataclass(frozen=True)
class Host:
    """This machine."""

    profile: Profile
    devices: LocalBench
    threads: int
    how: str = "measured"
    chunk: int | None = 64
    limit: int | None = None
    linker: tuple[str | None, tuple[str, ...]] = (None, ())

    def model(self, path: Path, shape: Shape) -> Model:
        return CompiledModel(path, shape)

    def interleaved(self, models: Mapping[str, Path], x: np.ndarray, *, rounds: int) -> dict[str, list[float]]:
        return measure_interleaved(dict(models), x, rounds=rounds, threads=self.threads)


@dataclass(frozen=True)
class Boards:
    """All boards of one key."""

    profile: Profile
    devices: Fleet
    threads: int
    chunk: int | None = None  # all at once: they are shared out

    @property
    def how(self) -> str:
        return "emulated" if self.profile.emulated else "measured"

    @property
    def limit(self) -> int | None:
        return EMULATED_IMAGES if self.profile.emulated else None

    @property
    def linker(self) -> tuple[str | None, tuple[str, ...]]:
        return self.devices.remote.compiler, self.devices.remote.options

    def model(self, path: Path, shape: Shape) -> Model:
        return partial(self.devices.run, path, batch=shape[0])

    def interleaved(self, models: Mapping[str, Path], x: np.ndarray, *, rounds: int) -> dict[str, list[float]]:
        return self.devices.measure_interleaved(models, x, rounds=rounds)


def check_connection(profile: Profile, connection: ConnectionOptions) -> None:
    """Raise at once what would make the long work useless; a board that is in use is waited for.

    Raises
    ------
    UserError, MeasurementError
        As `tvm_lowrank doctor` would print it.
    """
    if profile.is_host:
        if connection.emulate or connection.rpc_tracker:
            raise UserError(f"target {profile.name} is this machine; leave --emulate and --rpc-tracker out")
        require(profile.needs, f"target {profile.name} ({profile.code})")
        return
    waived = {"free board"} | ({"tracker"} if connection.starts else set())
    tracker = None if connection.starts else tracker_address(connection.rpc_tracker)
    for step in examine(profile, tracker=tracker, key=connection.rpc_key, quick=True):
        if step.error is not None and step.name not in waived:
            raise step.error


@contextmanager
def open_device(profile: Profile, connection: ConnectionOptions, *, threads: int, cache_dir: Path) -> Iterator[Device]:
    """The device of a target, as long as the context lasts.

    Raises
    ------
    UserError, MeasurementError
        See `check_connection`.
    """
    check_connection(profile, connection)
    if profile.is_host:
        bench = LocalBench(target=profile.tvm_target(threads), threads=threads)
        try:
            yield Host(profile, bench, threads)
        finally:
            bench.close()
    else:
        with _boards(replace(profile, emulated=connection.emulate), connection, cache_dir) as remote:
            fleet = Fleet(remote, target=profile.tvm_target(threads), threads=threads)
            try:
                yield Boards(replace(profile, emulated=remote.emulated), fleet, threads)
            finally:
                fleet.close()


@contextmanager
def _boards(profile: Profile, connection: ConnectionOptions, cache_dir: Path) -> Iterator[Remote]:
    """Where the boards of a target are; emulated ones are started, unless there is a tracker that has some."""
    if connection.starts:
        console.phase(f"starting {EMULATED_BOARDS} emulated boards; their times say nothing about real ones")
        with emulated(profile.arch, boards=EMULATED_BOARDS, cache_dir=cache_dir) as boards:
            yield remote_of(profile, boards.host, boards.port, boards.key)
    else:
        address = tracker_address(connection.rpc_tracker)
        assert address is not None  # checked
        yield remote_of(profile, *address, connection.rpc_key or profile.rpc_key)


@contextmanager
def device_of(
    bundle: Path, target: str | None, connection: ConnectionOptions, *, threads: int | None = None
) -> Iterator[Device]:
    """The device of a bundle; ``target`` and ``threads`` are those of its manifest unless given."""
    manifest = read_manifest(bundle)
    profile = load_profile(target or level(bundle, manifest)["target"]["name"])
    threads = threads or int(manifest["latency_ms"]["threads"])
    with open_device(profile, connection, threads=threads, cache_dir=cache_folder(connection.cache)) as device:
        yield device


def remote_of(profile: Profile, host: str, port: int, key: str) -> Remote:
    """How to build for and reach the boards of a profile."""
    compiler, options = profile.linker()
    cool_down = 0.0 if profile.emulated else Remote.cool_down
    return Remote(key, host, port, compiler=compiler, options=options, cool_down=cool_down, emulated=profile.emulated)
