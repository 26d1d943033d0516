"""The latency oracle: how long does a kernel take, tuned, on the target?"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

import numpy as np

from tvm_lowrank.codegen import schedule
from tvm_lowrank.codegen.lower import Kernel
from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.searching.latency.cache import Entry, KernelCache, Latency
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.searching.latency.ranking import Ranking
from tvm_lowrank.searching.latency.tiles import first_candidates, variants
from tvm_lowrank.searching.measure.bench import Bench, Devices, Job, TrialError
from tvm_lowrank.searching.measure.local import LocalBench
from tvm_lowrank.targets.profile import Profile

FINALISTS = 3
ROUNDS = 3
AGAIN = 2  # times that as many rounds are added where something else disturbed them
DISTURBED = 0.05  # spread of the samples (quartiles, relative) from which that is so
LOOK = 0.03  # seconds of measuring before a candidate is judged
HOPELESS = 1.5  # a candidate so much slower than the best is not looked at for so long
OTHER_TRIALS = 4  # for kernels that are not convolutions, and a small part of any network
logger = logging.getLogger(__name__)


class TuningError(MeasurementError):
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
        Where to compile and measure; this machine if it is left out. Where it has several devices, as many kernels
        are tuned at the same time.

    Raises
    ------
    UserError
        If the cache is damaged; the message names the file.
    """

    def __init__(
        self, profile: Profile, *, cache_dir: Path, trials: int = 12, threads: int = 1, bench: Devices | None = None
    ) -> None:
        self.profile, self.trials, self.threads = profile, trials, threads
        self._cache = KernelCache.open(cache_dir, profile, threads=threads)
        self._bench = bench
        self._ranking = Ranking(lanes=profile.lanes, registers=profile.registers)
        self._learning = threading.Lock()

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

    @property
    def folder(self) -> Path:
        """Where the target's measurements are."""
        return self._cache.path.parent

    def convolutions(self) -> list[tuple[Convolution, float]]:
        """All convolutions that were measured on the target, for this or another network, and their ms."""
        return [(e.conv, e.latency.ms) for e in self._cache.entries.values() if e.conv is not None]

    def known(self, key: str) -> Latency | None:
        """The latency of a kernel that was measured before, with at least as many trials."""
        entry = self._cache.entries.get(key)
        return entry.latency if entry is not None and entry.trials >= self.trials else None

    def measure(
        self, kernels: Iterable[Kernel], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Latency]:
        """Latencies of kernels by key; those that the cache lacks are tuned, equal ones once.

        ``progress`` is called with (kernels done, kernels to measure) before the first and after each; what it raises
        ends the work, and what it had been told of is kept.

        Raises
        ------
        TuningError
            If no schedule of a kernel works; the message has the first failure's.
        """
        wanted = {kernel.key: kernel for kernel in kernels}
        self._cache.refresh()
        missing = [kernel for key, kernel in wanted.items() if self.known(key) is None]
        if missing:
            self._fill(missing, progress or (lambda done, total: None))
        return {key: self._cache.entries[key].latency for key in wanted}

    def _fill(self, missing: Sequence[Kernel], report: Callable[[int, int], None]) -> None:
        if self._bench is None:
            self._bench = LocalBench(target=self.profile.tvm_target(self.threads), threads=self.threads)
        report(0, len(missing))
        # an exception's traceback would keep the generator, and what it runs, alive
        with closing(self._bench.each(missing, self._tune)) as tuned:
            for done, entry in enumerate(tuned, start=1):
                self._cache.add(entry)
                report(done, len(missing))

    def _learn(self) -> Ranking:
        """The ranking of schedules by all trials so far."""
        with self._learning:
            # a copy: several boards add to the cache at the same time
            entries = list(self._cache.entries.values())
            self._ranking.learn([(e.conv.space, e.tried) for e in entries if e.conv is not None and e.tried])
            return self._ranking

    def _tune(self, bench: Bench, kernel: Kernel) -> Entry:
        bench.forget()
        space = schedule.workload(kernel.func)
        limit = self.trials if kernel.is_conv else min(self.trials, OTHER_TRIALS)
        ranking = self._learn()
        # two thirds of the trials for the register tile, the rest for the order of the loops around the best ones
        most = max(1, limit * 2 // 3)
        first: list[Tiling | None] = [] if space is None or not kernel.is_conv else [*ranking.best(space, most)]
        if not first:
            lanes, registers = self.profile.lanes, self.profile.registers
            first = first_candidates(space, lanes=lanes, registers=registers, limit=most)
        trials = Trials(kernel, bench)
        trials.run(first)
        if space is not None and len(first) < limit:
            around = [v for tiling in trials.best(2) if tiling is not None for v in variants(tiling, space)]
            more = ranking.order(space, [v for v in dict.fromkeys(around) if v not in first])
            trials.run(more[: limit - len(first)])
        if not trials.samples and None not in first:
            trials.run([None])
        tiling, samples = trials.final()
        p10, p90 = (1e3 * float(v) for v in np.percentile(np.array(samples), (10, 90)))
        latency = Latency(1e3 * undisturbed(samples), p10, p90)
        logger.info("%s: %.4f ms, %s", kernel.name, latency.ms, tiling)
        conv = Convolution.lowered(kernel)
        return Entry(kernel.key, kernel.name, latency, tiling, self.trials, conv, trials.tried if conv else {})


class Trials:
    """The candidates of one kernel and what was measured of them."""

    def __init__(self, kernel: Kernel, bench: Bench) -> None:
        self.kernel, self.bench = kernel, bench
        self.handles: dict[Tiling | None, int] = {}
        self.samples: dict[Tiling | None, list[float]] = {}
        self.tried: dict[Tiling, float] = {}  # ms
        self.failure = ""

    def run(self, candidates: Sequence[Tiling | None]) -> None:
        """Compile the candidates and look at each once."""
        jobs = [Job(self.kernel.func, tiling) for tiling in candidates]
        for tiling, outcome in zip(candidates, self.bench.build(jobs), strict=True):
            if isinstance(outcome, TrialError):
                self._failed(tiling, outcome)
            else:
                self.handles[tiling] = outcome
                best = min(map(undisturbed, self.samples.values()), default=math.inf)
                self._time(tiling, HOPELESS * best)

    def best(self, count: int) -> list[Tiling | None]:
        """The fastest so far, fastest first."""
        return sorted(self.samples, key=lambda tiling: undisturbed(self.samples[tiling]))[:count]

    def final(self) -> tuple[Tiling | None, list[float]]:
        """The best schedule and its samples (seconds): the finalists are measured again, in turns.

        Raises
        ------
        TuningError
            If no candidate works.
        """
        finalists = self.best(FINALISTS)
        self.tried = {tiling: 1e3 * undisturbed(s) for tiling, s in self.samples.items() if tiling is not None}
        # the first look, by which they were selected, was a lucky one for some
        self.samples = {}
        for _ in range(1 + AGAIN):
            for _ in range(ROUNDS):
                for tiling in finalists:
                    self._time(tiling)
            if all(spread(self.samples[tiling]) < DISTURBED for tiling in self.best(1)):
                break
        for tiling in self.best(1):
            self.tried.update({t: 1e3 * undisturbed(s) for t, s in self.samples.items() if t is not None})
            return tiling, self.samples[tiling]
        raise TuningError(f"no schedule of kernel {self.kernel.name} works; the first one failed with {self.failure}")

    def _time(self, tiling: Tiling | None, limit: float = math.inf) -> None:
        try:
            samples = self.bench.time(self.handles[tiling], LOOK, limit)
            self.samples.setdefault(tiling, []).extend(samples)
        except TrialError as error:
            self._failed(tiling, error)

    def _failed(self, tiling: Tiling | None, error: TrialError) -> None:
        self.failure = self.failure or str(error)
        logger.debug("%s: %s failed: %s", self.kernel.name, tiling, error)


def undisturbed(samples: Sequence[float]) -> float:
    """The lower quartile: whatever else runs on the machine only ever adds time."""
    return float(np.percentile(np.array(samples), 25))


def spread(samples: Sequence[float]) -> float:
    """How far the middle is above the lower quartile, relative to it: large if something else ran half of the time."""
    quarter, half = np.percentile(np.array(samples), (25, 50))
    return float(half / quarter - 1)
