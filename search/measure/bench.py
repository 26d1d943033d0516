"""Compiling and timing kernels in worker processes that stay alive."""

from __future__ import annotations

import contextlib
import math
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
from typing import IO, Any, Protocol, TypeVar

from tvm.ir import IRModule

from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.searching.measure.worker import receive, send

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

    def time(self, handle: int, seconds: float, limit: float = math.inf) -> list[float]:
        """Seconds of one run: samples that take about ``seconds`` together; TrialError if it fails.

        What takes longer than ``limit`` is left alone after two.
        """

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

    ``module`` is what it runs: `tvm_lowrank.searching.measure.worker`, or another that serves requests as that one
    does. Setting ``cancelled`` ends a request in progress, and refuses others, with `Cancelled`.
    """

    def __init__(
        self,
        *,
        threads: int,
        module: str = "tvm_lowrank.searching.measure.worker",
        cancelled: threading.Event | None = None,
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
