"""The latency oracle: how long does a kernel take, tuned, on the target?"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from tvm_lowrank import schedule
from tvm_lowrank.lower import Kernel
from tvm_lowrank.schedule import Tiling
from tvm_lowrank.search.bench import Bench, Job, LocalBench, TrialError
from tvm_lowrank.search.cache import Entry, KernelCache, Latency
from tvm_lowrank.search.tiles import first_candidates, variants
from tvm_lowrank.targets.profile import Profile

FINALISTS = 3
ROUNDS = 3
FIRST_LOOK = 0.03  # seconds of measuring before a candidate is judged
logger = logging.getLogger(__name__)


class TuningError(RuntimeError):
    """No schedule of a kernel could be compiled and run."""


class LatencyOracle:
    """Measures kernels, each tuned with up to ``trials`` schedules, and remembers everything on disk.

    Parameters
    ----------
    profile
        The target.
    cache_dir
        Where results live, in one folder for each target, TVM version and number of threads. Every finished kernel is
        written at once: a search that was killed continues where it was. Processes may share the folder.
    trials
        Schedules measured for each kernel, at most.
    threads
        Threads that a kernel may use.
    bench
        Where to compile and measure; this machine if it is left out.

    Raises
    ------
    UserError
        If the cache is damaged; the message names the file.
    """

    def __init__(
        self, profile: Profile, *, cache_dir: Path, trials: int = 12, threads: int = 1, bench: Bench | None = None
    ) -> None:
        self.profile, self.trials, self.threads = profile, trials, threads
        self._cache = KernelCache.open(cache_dir, profile, threads=threads)
        self._bench = bench

    def __enter__(self) -> LatencyOracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes; the oracle still answers from its cache and starts new ones when it must."""
        if self._bench is not None:
            self._bench.close()

    @property
    def database(self) -> Mapping[str, Tiling | None]:
        """Kernel key to its best schedule, for `lower.build`."""
        return {key: entry.tiling for key, entry in self._cache.entries.items()}

    def known(self, key: str) -> Latency | None:
        """The latency of a kernel that was measured before, with at least as many trials."""
        entry = self._cache.entries.get(key)
        return entry.latency if entry is not None and entry.trials >= self.trials else None

    def measure(
        self, kernels: Iterable[Kernel], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Latency]:
        """Latencies of kernels by key; those that the cache lacks are tuned, equal ones once.

        ``progress`` is called with (kernels done, kernels to measure) before the first and after each.

        Raises
        ------
        TuningError
            If no schedule of a kernel works; the message has the first failure's.
        """
        wanted = {kernel.key: kernel for kernel in kernels}
        self._cache.refresh()
        missing = [kernel for key, kernel in wanted.items() if self.known(key) is None]
        for done, kernel in enumerate(missing):
            if progress is not None:
                progress(done, len(missing))
            self._cache.add(self._tune(kernel))
        if progress is not None and missing:
            progress(len(missing), len(missing))
        return {key: self._cache.entries[key].latency for key in wanted}

    def _tune(self, kernel: Kernel) -> Entry:
        if self._bench is None:
            self._bench = LocalBench(target=self.profile.tvm_target(self.threads), threads=self.threads)
        space = schedule.workload(kernel.func)
        lanes, registers = self.profile.lanes, self.profile.registers
        # two thirds of the trials for the register tile, the rest for the order of the loops around the best ones
        first = first_candidates(space, lanes=lanes, registers=registers, limit=max(1, self.trials * 2 // 3))
        trials = Trials(kernel, self._bench)
        trials.run(first)
        if space is not None and len(first) < self.trials:
            seen = set(first)
            more = [v for tiling in trials.best(2) if tiling is not None for v in variants(tiling, space)]
            trials.run([v for v in dict.fromkeys(more) if v not in seen][: self.trials - len(first)])
        tiling, samples = trials.final()
        p10, median, p90 = (float(v) for v in np.percentile(np.array(samples) * 1e3, (10, 50, 90)))
        logger.info("%s: %.4f ms, %s", kernel.name, median, tiling)
        return Entry(kernel.key, kernel.name, Latency(median, p10, p90), tiling, self.trials)


class Trials:
    """The candidates of one kernel and what was measured of them."""

    def __init__(self, kernel: Kernel, bench: Bench) -> None:
        self.kernel, self.bench = kernel, bench
        self.seconds: dict[Tiling | None, float] = {}
        self.failure: str | None = None

    def run(self, candidates: list[Tiling | None]) -> None:
        """Compile the candidates and look at each once."""
        built = self.bench.build([Job(self.kernel.func, tiling) for tiling in candidates])
        for index, (tiling, error) in enumerate(zip(candidates, built, strict=True)):
            if error is None:
                try:
                    self.seconds[tiling] = statistics.median(self.bench.time(index, FIRST_LOOK))
                    continue
                except TrialError as failed:
                    error = failed
            self.failure = self.failure or str(error)
            logger.debug("%s: %s failed: %s", self.kernel.name, tiling, error)

    def best(self, count: int) -> list[Tiling | None]:
        """The fastest so far, fastest first."""
        return sorted(self.seconds, key=lambda tiling: self.seconds[tiling])[:count]

    def final(self) -> tuple[Tiling | None, list[float]]:
        """The best schedule and its samples (seconds): the finalists are measured again, in turns."""
        finalists = self.best(FINALISTS)
        samples: dict[Tiling | None, list[float]] = {tiling: [] for tiling in finalists}
        if finalists:
            self.bench.build([Job(self.kernel.func, tiling) for tiling in finalists])
        for _ in range(ROUNDS):
            for index, tiling in enumerate(finalists):
                try:
                    samples[tiling] += self.bench.time(index, FIRST_LOOK)
                except TrialError as error:
                    self.failure = self.failure or str(error)
        measured = {tiling: values for tiling, values in samples.items() if values}
        if not measured:
            raise TuningError(f"no schedule of kernel {self.kernel.name} works; the first one failed with {self.failure}")
        return min(measured.items(), key=lambda item: statistics.median(item[1]))
