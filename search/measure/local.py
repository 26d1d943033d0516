"""Measuring on this machine: kernels, and whole models."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import tvm

from tvm_lowrank.codegen.processor import check
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.searching.measure.bench import (
    BUILD_TIMEOUT,
    RUN_TIMEOUT,
    START_TIMEOUT,
    Bench,
    Job,
    R,
    T,
    TrialError,
    Worker,
    WorkerDied,
    WorkerPool,
)
from tvm_lowrank.searching.measure.thermal import LOOK, REFERENCE_SECONDS, reference_job, settle

PATIENCE = "TVM_LOWRANK_PATIENCE"  # names the seconds that a busy machine is waited for


class LocalBench:
    """Compiles on all cores and times on this machine, one candidate at a time."""

    def __init__(self, *, target: tvm.target.Target, threads: int, workers: int | None = None) -> None:
        self.goal, self.target, self.threads = target, tvm.ir.save_json(target), threads
        self.name, self.reference = "this machine", math.inf
        self.patience = _patience()
        self.pool = WorkerPool(workers, threads=threads)
        self.jobs: list[Job] = []
        self.places: dict[int, tuple[Worker, int]] = {}  # handle to its worker, and which start of that worker

    def each(self, tasks: Sequence[T], work: Callable[[Bench, T], R]) -> Generator[R, None, None]:
        look = 0.0
        for task in tasks:
            if time.monotonic() >= look:
                self._settle()
                look = time.monotonic() + LOOK
            yield work(self, task)

    def build(self, jobs: Sequence[Job]) -> list[int | TrialError]:
        first = len(self.jobs)
        self.jobs += jobs
        return self.pool.map(self._build, range(first, len(self.jobs)))

    def time(self, handle: int, seconds: float, limit: float = math.inf) -> list[float]:
        worker, start = self.places[handle]
        if worker.process is None or worker.starts != start:
            self._build(worker, handle)  # another candidate took the process with it
        cpu = self.threads == 1
        samples: list[float] = worker.request("time", handle, seconds, cpu, limit, timeout=seconds + RUN_TIMEOUT)
        return samples

    def forget(self) -> None:
        self.jobs, self.places = [], {}
        for worker in self.pool.workers:
            if worker.process is not None:
                with contextlib.suppress(WorkerDied):  # then it has forgotten already
                    worker.request("forget", timeout=RUN_TIMEOUT)

    def close(self) -> None:
        self.pool.close()

    def _settle(self) -> None:
        """Wait until this machine runs the reference kernel about as fast as it ever did."""
        self.forget()
        (built,) = self.build([reference_job(self.goal)])
        if isinstance(built, TrialError):
            raise MeasurementError(f"this machine cannot run a small matrix product: {built}") from built
        settle(self, lambda: min(self.time(built, REFERENCE_SECONDS)), limit=self.patience)

    def _build(self, worker: Worker, handle: int) -> int:
        job = self.jobs[handle]
        source, tiling = tvm.ir.save_json(job.func), None if job.tiling is None else job.tiling.to_json()
        worker.request("build", handle, source, tiling, self.target, self.threads, timeout=BUILD_TIMEOUT)
        self.places[handle] = (worker, worker.starts)
        return handle


def _patience() -> float:
    text = os.environ.get(PATIENCE, "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise UserError(f"{PATIENCE}={text!r} is no number of seconds; give 0 or more, or unset it")
    return seconds


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
    UserError
        If this processor lacks features that a library needs.
    """
    for model in models.values():
        if isinstance(model, str | Path) and Path(model).is_file():
            check(Path(model))
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
