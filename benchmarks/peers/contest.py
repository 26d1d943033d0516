"""The contest: each contestant in a process of its own, timed in turns, and what comes out of it as a table.

Nothing here knows a runtime; `peers.runtimes` is the other end of the processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tvm_lowrank.errors import MeasurementError

EXACT, HALF, COARSE = 1e-3, 0.1, 0.3  # of the largest output: how far float32, 16 bits and int8 may be from PyTorch
PREPARE, RUN = 1800.0, 60.0  # seconds that a conversion may take, and a turn beyond what was asked
PAUSE = 0.05  # seconds between turns where threads wait for more work before they sleep
INT8 = "int8"
OURS = "tvm_lowrank"
# what makes a file of `peers.runtimes.FILES`
MAKERS = {"int8": "onnxruntime", "ncnn": "pnnx", "mnn": "MNN"}
COLUMNS = ("contestant", "format", "version", "median ms", "10 %", "90 %", "error", "outputs")


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes
    ----------
    runtime
        Of `peers.runtimes.RUNTIMES`.
    file
        Of `peers.runtimes.FILES`, or the path of a library.
    format
        What it is asked for; what it says of itself comes after it.
    package
        What must be installed.
    tolerance
        How far its outputs may be from PyTorch's, relative to the largest.
    network
        Whose outputs: ``dense`` or ``compressed``.
    """

    name: str
    format: str
    runtime: str
    file: str
    package: str
    tolerance: float = HALF
    options: Mapping[str, Any] = field(default_factory=dict)
    network: str = "dense"

    @property
    def ours(self) -> bool:
        return self.runtime == OURS


@dataclass(frozen=True)
class Result:
    """What is known of a contestant: its times in ms, one a turn, or the reason why there are none."""

    contestant: Contestant
    version: str = ""
    format: str = ""
    error: float = float("nan")
    times: tuple[float, ...] = ()
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return not self.reason and self.error < self.contestant.tolerance

    @property
    def median(self) -> float:
        return float(np.median(self.times))

    def __str__(self) -> str:
        own = f" {self.contestant.network}" if self.contestant.ours else ""
        return f"{self.contestant.name}{own}"


@dataclass(frozen=True)
class Match:
    """What all contestants share.

    Attributes
    ----------
    folder
        Has what `peers.runtimes.FILES` start from, and room for more.
    x
        Float32 (N, C, H, W).
    expected
        What PyTorch computes from x in float32, by the name of the network.
    seconds
        Of a turn.
    """

    folder: Path
    x: np.ndarray
    expected: Mapping[str, np.ndarray]
    threads: int = 1
    rounds: int = 50
    seconds: float = 0.05


class Process(Protocol):
    """A process of a contestant: `tvm_lowrank.searching.measure.bench.Worker`, or what tests have in its place."""

    def request(self, operation: str, *arguments: Any, timeout: float) -> Any:
        """What a method of `peers.runtimes.Session` returns; MeasurementError if it fails."""

    def stop(self) -> None: ...


def compete(
    contestants: Sequence[Contestant], match: Match, start: Callable[[], Process], say: Callable[[str], object] = print
) -> list[Result]:
    """The results of all contestants, in their order: made ready one after another, then timed in turns.

    One that fails is out, with the reason, and the others go on.
    """
    files = Files(match.folder, start)
    processes = [start() for _ in contestants]
    results = []
    try:
        for contestant, process in zip(contestants, processes, strict=True):
            say(f"making ready: {contestant.name}, {contestant.format}")
            results.append(ready(contestant, process, files, match))
        say(f"{match.rounds} rounds")
        for _ in range(match.rounds):
            for i, process in enumerate(processes):
                if not results[i].reason:
                    results[i] = timed(results[i], process, match)
    finally:
        for process in processes:
            process.stop()
    return results


class Files:
    """Those of `peers.runtimes.FILES`, each made once when it is first wanted."""

    def __init__(self, folder: Path, start: Callable[[], Process]) -> None:
        self._folder, self._start = folder, start
        self._made: dict[str, str | Exception] = {}

    def __call__(self, kind: str) -> str:
        """The path; what the conversion raised, again, if it has failed."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        made = self._made[kind]
        if isinstance(made, Exception):
            raise made
        return made

    def _make(self, kind: str) -> str | Exception:
        process = self._start()
        try:
            check_installed(MAKERS.get(kind, "numpy"))
            return str(process.request("convert", kind, str(self._folder), timeout=PREPARE))
        except MeasurementError as error:
            return error
        finally:
            process.stop()


def check_installed(package: str) -> None:
    """Raise MeasurementError, with the remedy, if it is not."""
    if find_spec(package) is None:
        raise MeasurementError(f"{package} is not installed (pip install {package})")


def ready(contestant: Contestant, process: Process, files: Callable[[str], str], match: Match) -> Result:
    """A contestant that is warm, and how far its outputs are from PyTorch's."""
    result = Result(contestant, format=contestant.format)
    try:
        check_installed(contestant.package)
        path = contestant.file if contestant.ours else files(contestant.file)
        asked = (contestant.runtime, path, match.x, match.threads, dict(contestant.options))
        version, format, output = process.request("open", *asked, timeout=PREPARE)
    except MeasurementError as error:
        return replace(result, reason=f"did not run: {error}")
    if contestant.format == "default" and format:
        result = replace(result, format=f"default: {format}")
    return replace(result, version=version, error=relative_error(output, match.expected[contestant.network]))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, relative to the largest output; infinite for another number of outputs."""
    if found.size != expected.size:
        return float("inf")
    return float(np.max(np.abs(found.reshape(expected.shape) - expected)) / max(np.max(np.abs(expected)), 1e-30))


def timed(result: Result, process: Process, match: Match) -> Result:
    """The result with one more turn."""
    if match.threads > 1:
        time.sleep(PAUSE)
    try:
        ms = process.request("time", match.seconds, timeout=match.seconds + RUN)
    except MeasurementError as error:
        return replace(result, times=(), reason=f"did not run: {error}")
    return replace(result, times=(*result.times, ms))


def rows(results: Iterable[Result]) -> Iterator[tuple[str, ...]]:
    """The table's cells."""
    for result in results:
        if result.reason:
            yield (str(result), result.format, result.version, "–", "–", "–", "–", result.reason)
            continue
        times = [f"{ms:.3f}" for ms in np.percentile(result.times, (50, 10, 90))]
        verdict = "agree" if result.agrees else "WRONG, not compared"
        yield (str(result), result.format, result.version, *times, f"{result.error:.1e}", verdict)


def verdict(results: Sequence[Result]) -> Iterator[str]:
    """The fastest peer over our fastest libraries; the same without int8 if that is the fastest."""
    sound = [result for result in results if result.agrees]
    peers = [result for result in sound if not result.contestant.ours]
    if not peers:
        yield "no peer has run: there is nothing to compare with"
        return
    fastest = min(peers, key=lambda result: result.median)
    yield from compared("the fastest peer", fastest, sound)
    others = [result for result in peers if result.contestant.format != INT8]
    if others and fastest not in others:
        yield from compared("the fastest without int8", min(others, key=lambda result: result.median), sound)


def compared(title: str, peer: Result, sound: Sequence[Result]) -> Iterator[str]:
    """A peer over our fastest library of each network."""
    yield f"{title}: {peer}, {peer.format}, {peer.median:.3f} ms"
    for network in ("dense", "compressed"):
        own = [result for result in sound if result.contestant.ours and result.contestant.network == network]
        if own:
            best = min(own, key=lambda result: result.median)
            what = f"our {network} library ({best.format}, {best.median:.3f} ms)"
            yield f"  over {what}: {peer.median / best.median:.2f}x"
