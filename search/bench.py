"""Compiling and timing kernels in worker processes that stay alive."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import tvm
from tvm.ir import IRModule

from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.schedule import Tiling
from tvm_lowrank.search.worker import receive, send

BUILD_TIMEOUT = 60.0  # seconds; a kernel takes 0.1, more on a busy machine
RUN_TIMEOUT = 20.0  # beyond what the measurement was asked to take
START_TIMEOUT = 120.0
CANCEL_POLL = 0.2
CANCEL_GRACE = 2.0  # TVM's RPC server, for one, does not survive a client that goes away in the middle of a call

T = TypeVar("T")
R = TypeVar("R")


class TrialError(MeasurementError):
    """A candidate that could not be scheduled, compiled or run."""


class WorkerDied(TrialError):
    """The candidate crashed its process or ran out of time."""


class Cancelled(Exception):
    """Another thread has called the work off."""


@dataclass(frozen=True)
class Job:
    """A kernel (`Kernel.func`) and how to schedule it."""

    func: IRModule
    tiling: Tiling | None


class Bench(Protocol):
    """One device, as the tuning of a kernel sees it."""

    def build(self, jobs: Sequence[Job]) -> list[int | TrialError]:
        """Compile jobs; for each a handle that can be timed, or why there is none."""

    def time(self, handle: int, seconds: float) -> list[float]:
        """Seconds of one run: samples that take about ``seconds`` together; TrialError if it fails."""

    def forget(self) -> None:
        """Free everything that was built; the handles become invalid."""


class Devices(Protocol):
    """What the oracle measures on: one device, or several that are alike."""

    def each(self, tasks: Sequence[T], work: Callable[[Bench, T], R]) -> Generator[R, None, None]:
        """Results of ``work`` for every task, as they are finished.

        A task has one device to itself from beginning to end. Closing the generator ends what is in progress.
        """

    def close(self) -> None:
        """Stop all processes; the next call starts new ones."""


class Worker:
    """One child process, started when first needed and again after a crash.

    ``module`` is what it runs: `tvm_lowrank.search.worker`, or another that serves requests as that one does. Setting
    ``cancelled`` ends a request in progress, and refuses others, with `Cancelled`.
    """

    def __init__(
        self, *, threads: int, module: str = "tvm_lowrank.search.worker", cancelled: threading.Event | None = None
    ) -> None:
        self.threads, self.module = threads, module
        self.cancelled = cancelled or threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.log: IO[bytes] | None = None

    def request(self, operation: str, *arguments: object, timeout: float, cancellable: bool = True) -> Any:
        """Call a method in the process; TrialError if it raises, WorkerDied if the process does not survive it."""
        if cancellable and self.cancelled.is_set():
            raise Cancelled
        if self.process is None:
            self._start()
            timeout += START_TIMEOUT
        assert self.process is not None and self.process.stdin and self.process.stdout
        try:
            send(self.process.stdin, (operation, arguments))
            self._wait(timeout, cancellable)
            succeeded, result = receive(self.process.stdout)
        except TimeoutError as error:
            self.stop()
            raise WorkerDied(f"no answer within {timeout:.0f} s") from error
        except (EOFError, OSError) as error:
            raise WorkerDied(self._reap()) from error
        except BaseException:  # its answer would be taken for that of the next request
            self.stop()
            raise
        if cancellable and self.cancelled.is_set():
            raise Cancelled
        if not succeeded:
            raise TrialError(result)
        return result

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self.log):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            self.process = None

    def _start(self) -> None:
        self.starts += 1
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        environment = {**os.environ, "TVM_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-W", "ignore", "-m", self.module]
        # Python imports from the current folder first, and a checkout there would hide the installed package
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, cwd=sys.prefix
        )

    def _wait(self, timeout: float, cancellable: bool) -> None:
        assert self.process is not None and self.process.stdout
        deadline, stopping = time.monotonic() + timeout, False
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not selector.select(max(0.0, min(CANCEL_POLL, deadline - time.monotonic()))):
                if cancellable and not stopping and self.cancelled.is_set():
                    deadline, stopping = min(deadline, time.monotonic() + CANCEL_GRACE), True
                if time.monotonic() >= deadline:
                    raise Cancelled if stopping else TimeoutError

    def _reap(self) -> str:
        """What a dead process said last."""
        assert self.process is not None and self.log is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.poll()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        self.stop()
        return f"the worker ended with code {code}" + (f": {lines[-1]}" if lines else "")


class WorkerPool:
    """Worker processes that share the work of one or more threads; by default one for each core, eight at most."""

    def __init__(self, count: int | None = None, *, threads: int, cancelled: threading.Event | None = None) -> None:
        count = count or max(1, min(os.cpu_count() or 1, 8))
        self.workers = [Worker(threads=threads, cancelled=cancelled) for _ in range(count)]
        # last in, first out: no more processes are started than are needed
        self.idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def map(self, request: Callable[[Worker, T], R], items: Sequence[T]) -> list[R | TrialError]:
        """For each item what ``request`` returned, or the TrialError that it raised."""

        def attempt(item: T) -> R | TrialError:
            worker = self.idle.get()
            try:
                return request(worker, item)
            except TrialError as error:
                return error
            finally:
                self.idle.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as executor:
            return list(executor.map(attempt, items))

    def close(self) -> None:
        """Stop the processes."""
        for worker in self.workers:
            worker.stop()


class LocalBench:
    """Compiles on all cores and times on this machine, one candidate at a time."""

    def __init__(self, *, target: tvm.target.Target, threads: int, workers: int | None = None) -> None:
        self.target, self.threads = tvm.ir.save_json(target), threads
        self.pool = WorkerPool(workers, threads=threads)
        self.jobs: list[Job] = []
        self.places: dict[int, tuple[Worker, int]] = {}  # handle to its worker, and which start of that worker

    def each(self, tasks: Sequence[T], work: Callable[[Bench, T], R]) -> Generator[R, None, None]:
        for task in tasks:
            yield work(self, task)

    def build(self, jobs: Sequence[Job]) -> list[int | TrialError]:
        first = len(self.jobs)
        self.jobs += jobs
        return self.pool.map(self._build, range(first, len(self.jobs)))

    def time(self, handle: int, seconds: float) -> list[float]:
        worker, start = self.places[handle]
        if worker.process is None or worker.starts != start:
            self._build(worker, handle)  # another candidate took the process with it
        samples: list[float] = worker.request("time", handle, seconds, self.threads == 1, timeout=seconds + RUN_TIMEOUT)
        return samples

    def forget(self) -> None:
        self.jobs, self.places = [], {}
        for worker in self.pool.workers:
            if worker.process is not None:
                with contextlib.suppress(WorkerDied):  # then it has forgotten already
                    worker.request("forget", timeout=RUN_TIMEOUT)

    def close(self) -> None:
        self.pool.close()

    def _build(self, worker: Worker, handle: int) -> int:
        job = self.jobs[handle]
        source, tiling = tvm.ir.save_json(job.func), None if job.tiling is None else job.tiling.to_json()
        worker.request("build", handle, source, tiling, self.target, self.threads, timeout=BUILD_TIMEOUT)
        self.places[handle] = (worker, worker.starts)
        return handle


def measure_interleaved(
    models: dict[str, Any], x: Any, *, rounds: int = 20, threads: int = 1, seconds: float = 0.05
) -> dict[str, list[float]]:
    """End-to-end latencies of whole models, measured in turns so that a disturbance hits all of them alike.

    Parameters
    ----------
    models
        Name to compiled model: the path of an exported library, or an executable that `lower.build` returned.
    x
        The input, a float32 array (NCHW) of the batch that the models were built for.
    rounds, seconds
        Every model is measured once per round, for about ``seconds``.

    Returns
    -------
    dict
        Name to ms per run by the wall clock, one per round.

    Raises
    ------
    TrialError
        If a model cannot be loaded or run; the message names it.
    """
    worker = Worker(threads=threads)
    times: dict[str, list[float]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for handle, (name, model) in enumerate(models.items()):
                path = Path(model) if isinstance(model, str | Path) else Path(folder) / f"{handle}.so"
                if not isinstance(model, str | Path):
                    model.export_library(str(path))
                try:
                    # the loader looks for a path without a slash in system folders only
                    worker.request("load", handle, str(path.resolve()), x, timeout=RUN_TIMEOUT + START_TIMEOUT)
                except TrialError as error:
                    raise TrialError(f"{name}: {error}") from error
            for _ in range(rounds):
                for handle, name in enumerate(models):
                    samples = worker.request("time", handle, seconds, False, timeout=seconds + RUN_TIMEOUT)
                    times[name].append(1e3 * sum(samples) / len(samples))
        finally:
            worker.stop()
    return times
