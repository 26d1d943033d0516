"""One board behind TVM's RPC tracker: finding it, and compiling for it and timing on it as on this machine."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.searching.measure.bench import (
    BUILD_TIMEOUT,
    RUN_TIMEOUT,
    Job,
    TrialError,
    Worker,
    WorkerDied,
    WorkerPool,
)
from tvm_lowrank.searching.measure.worker import Argument
from tvm_lowrank.targets import tracker

CONNECT_TIMEOUT = 20.0  # seconds
END_TIMEOUT = 3.0
SEND_TIMEOUT = 60.0  # for a kernel of some kilobytes; an emulated board also takes its time to run it
MODEL_TIMEOUT = 200.0  # for five runs of a whole model; on an emulated board one may take half a minute
SEND_RATE = 2**18  # bytes per second, at least
BLAMED = 3  # times that a candidate may lose its board before it is not tried again


@dataclass(frozen=True)
class Remote:
    """Boards of one kind, and how to build for them.

    Attributes
    ----------
    key
        What the boards' servers are registered as at the tracker.
    host, port
        The tracker.
    compiler, options
        The C++ compiler on this machine that links for the boards, and its options.
    cores
        The boards' cores to run on, one for each thread; without, as many of the fast ones as there are threads. Needs
        the server that comes with tvm_lowrank.
    session_timeout
        Seconds after which a server ends a session, in case this machine has vanished. It must be enough for tuning
        one kernel, or measuring one pair of models.
    patience
        Seconds to wait for a board when there is none.
    cool_down
        Seconds to wait for a board that has become too hot to run at its speed; 0 does not look.
    emulated
        Whether emulated boards are welcome; their times must not be taken for those of real ones.
    """

    key: str
    host: str = "127.0.0.1"
    port: int = 9190
    compiler: str = "c++"
    options: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    session_timeout: float = 600.0
    patience: float = 600.0
    cool_down: float = 180.0
    emulated: bool = False


class BoardLost(MeasurementError):
    """The connection to a board ended; ``blamed`` if a candidate has become the likely reason."""

    def __init__(self, message: str, *, blamed: bool = False) -> None:
        super().__init__(message)
        self.blamed = blamed


@dataclass
class Board:
    """What is known of a board; ``reference`` is the reference kernel's best time in seconds."""

    name: str
    failures: int = 0
    resting_until: float = 0.0
    reference: float = math.inf
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A server that waits for a client with this key."""

    host: str
    port: int
    key: str

    @property
    def board(self) -> str:
        return f"{self.host}:{self.port}"


def free_boards(remote: Remote) -> int:
    """The number of boards that nobody uses; OSError if the tracker cannot be reached."""
    return int(tracker.summary(remote.host, remote.port)["queue_info"].get(remote.key, {}).get("free", 0))


def request(remote: Remote) -> Slot:
    """Take a free board; OSError if there is none, or the tracker cannot be reached."""
    return Slot(*tracker.request(remote.host, remote.port, remote.key))


class RPCBench:
    """A session with one board, from `__enter__` to `__exit__`: a `Bench`, and whole models.

    Every method raises BoardLost when the session is over; what was measured in it must then be discarded, because
    numbers of another board are no match for it.
    """

    def __init__(
        self,
        remote: Remote,
        slot: Slot,
        board: Board,
        *,
        link: Worker,
        pool: WorkerPool,
        target: tvm.target.Target,
        losses: Counter[Job],
    ) -> None:
        self.remote, self.slot, self.board, self.link, self.pool = remote, slot, board, link, pool
        self.target, self.threads, self.losses = tvm.ir.save_json(target), link.threads, losses
        self.jobs: list[Job] = []
        self.libraries: dict[int, tuple[str, list[Argument]]] = {}
        self.placed: set[int] = set()
        self.models: dict[Path, int] = {}

    def __enter__(self) -> RPCBench:
        self._folder = tempfile.TemporaryDirectory()
        try:
            address = (self.slot.host, self.slot.port, self.slot.key)
            options = (self.remote.session_timeout, self.threads, self.remote.cores)
            self.board.info = self._request("connect", *address, *options, timeout=CONNECT_TIMEOUT)
        except BaseException as error:
            self._folder.cleanup()
            self.link.stop()  # and with it a session that may have begun
            if isinstance(error, TrialError):
                raise BoardLost(str(error)) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()
        if self.link.process is not None:
            try:
                self.link.request("disconnect", timeout=END_TIMEOUT, cancellable=False)
            except Exception:  # what matters has been measured, or `error` says why not
                self.link.stop()

    def build(self, jobs: Sequence[Job]) -> list[int | TrialError]:
        first = len(self.jobs)
        self.jobs += jobs
        return self.pool.map(self._export, range(first, len(self.jobs)))

    def time(self, handle: int, seconds: float, limit: float = math.inf) -> list[float]:
        job = self.jobs[handle]
        if self.losses[job] >= BLAMED:
            raise TrialError(f"the device was lost {BLAMED} times while it ran")
        try:
            if handle not in self.placed:
                path, parameters = self.libraries[handle]
                self._request("place", handle, path, parameters, timeout=SEND_TIMEOUT)
                self.placed.add(handle)
            samples: list[float] = self._request("time", handle, seconds, limit, timeout=seconds + RUN_TIMEOUT)
        except BoardLost as error:
            self.losses[job] += 1
            raise BoardLost(str(error), blamed=self.losses[job] >= BLAMED) from error
        return samples

    def forget(self) -> None:
        for path, _ in self.libraries.values():
            Path(path).unlink(missing_ok=True)
        self.jobs, self.libraries, self.placed, self.models = [], {}, set(), {}
        self._request("forget", timeout=RUN_TIMEOUT)

    def load(self, path: Path, x: np.ndarray) -> int:
        """Send a compiled model, unless this session has it, and run it on x; a handle that can be timed."""
        if path not in self.models:
            handle = -1 - len(self.models)  # kernels have those from 0
            timeout = MODEL_TIMEOUT + path.stat().st_size / SEND_RATE
            self._request("load", handle, str(path), x, timeout=timeout)
            self.models[path] = handle
        return self.models[path]

    def time_model(self, handle: int, seconds: float) -> list[float]:
        """Seconds of one run of a loaded model."""
        samples: list[float] = self._request("time", handle, seconds, timeout=seconds + MODEL_TIMEOUT)
        return samples

    def run(self, path: Path, x: np.ndarray) -> Any:
        """A compiled model's output for x, or a tuple of several."""
        return self._request("run", self.load(path, x), x, timeout=MODEL_TIMEOUT)

    def _export(self, worker: Worker, handle: int) -> int:
        job = self.jobs[handle]
        path = str(Path(self._folder.name) / f"{handle}.so")
        source, tiling = tvm.ir.save_json(job.func), None if job.tiling is None else job.tiling.to_json()
        linking = (self.remote.compiler, self.remote.options)
        build = (path, source, tiling, self.target, self.threads, *linking)
        self.libraries[handle] = (path, worker.request("export", *build, timeout=BUILD_TIMEOUT))
        return handle

    def _request(self, operation: str, *arguments: object, timeout: float) -> Any:
        try:
            return self.link.request(operation, *arguments, timeout=timeout)
        except WorkerDied as error:
            raise BoardLost(str(error)) from error
