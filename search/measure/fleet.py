"""All boards of one kind at once: who works on what, and what happens when one goes away or gets too hot."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_lowrank import console
from tvm_lowrank.data.images import Images
from tvm_lowrank.data.parts import joined, take
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.searching.measure.bench import START_TIMEOUT, Cancelled, Job, R, T, TrialError, Worker, WorkerPool
from tvm_lowrank.searching.measure.remote import Board, BoardLost, Remote, RPCBench, free_boards, request
from tvm_lowrank.searching.measure.thermal import LOOK, REFERENCE_SECONDS, reference_job, settle
from tvm_lowrank.targets.toolchain import release, tvm_versions

LINK = "tvm_lowrank.searching.measure.link"
POLL = 0.5  # seconds between questions whether a board has become free
QUIET = 3.0  # a server takes its time between two sessions: not worth a message
FAILURES = 3  # in a row, before a board has to rest
REST = 60.0  # seconds, doubled each time


@dataclass(eq=False)
class Lane:
    """A session with a board, and the thread that works through tasks in it."""

    bench: RPCBench
    thread: threading.Thread = field(default_factory=threading.Thread)


@dataclass(frozen=True)
class Ended:
    """What a lane says last."""

    error: BaseException | None


class Fleet:
    """The boards of one kind: `tvm_lowrank.searching.measure.bench.Devices` for the oracle, and whole models.

    Parameters
    ----------
    remote
        Where the boards are.
    target, threads
        What to compile for, and how many threads a kernel may use.
    workers
        Compiling processes; by default one for each core.

    Raises
    ------
    UserError
        If there is no such compiler, or the number of cores is not that of threads.
    """

    def __init__(self, remote: Remote, *, target: tvm.target.Target, threads: int, workers: int | None = None) -> None:
        if shutil.which(remote.compiler) is None:
            raise UserError(
                f"no compiler {remote.compiler}; install it (64-bit ARM Linux: the package g++-aarch64-linux-gnu), "
                "or name another in the target profile"
            )
        if remote.cores and len(remote.cores) != threads:
            raise UserError(f"{len(remote.cores)} cores for {threads} threads; name one core for each thread")
        self.remote, self.target, self.threads = remote, target, threads
        self.cancelled = threading.Event()
        self.pool = WorkerPool(workers, threads=threads, cancelled=self.cancelled)
        self.links: list[Worker] = []  # those that no lane uses
        self.boards: dict[str, Board] = {}
        self.losses: Counter[Job] = Counter()
        self.obstacle = self.loss = ""  # why there is no board, and why there is one less

    def close(self) -> None:
        """Stop all processes; the next call starts new ones."""
        self.pool.close()
        for link in self.links:
            link.stop()

    def each(self, tasks: Sequence[T], work: Callable[[RPCBench, T], R]) -> Generator[R, None, None]:
        """Results of ``work`` for every task, as they are finished, on as many boards as are free.

        A task whose board goes away is done again from the beginning. Only one thread may use a fleet at a time.

        Raises
        ------
        MeasurementError
            If there is no board for ``remote.patience`` seconds, in all, between two results.
        UserError
            If a board cannot run with so many threads.
        """
        self.cancelled.clear()
        pending, unfinished, waited = deque(tasks), len(tasks), 0.0
        said: queue.SimpleQueue[tuple[Lane, R | Ended]] = queue.SimpleQueue()
        lanes: list[Lane] = []
        try:
            while unfinished:
                bench = self._take() if pending else None
                if bench is not None:
                    lanes.append(self._start(bench, pending, work, said))
                elif not lanes:
                    waited = self._wait(waited)
                if not lanes:
                    continue
                try:
                    lane, event = said.get(timeout=POLL)
                except queue.Empty:
                    continue
                if isinstance(event, Ended):
                    lanes.remove(lane)
                    self.links.append(lane.bench.link)
                    if isinstance(event.error, BoardLost):
                        self._lost(lane.bench.board, event.error)
                    elif event.error is not None:
                        raise event.error
                else:
                    lane.bench.board.failures = 0
                    unfinished, waited = unfinished - 1, 0.0
                    yield event
        finally:
            self.cancelled.set()
            for lane in lanes:
                lane.thread.join()
                self.links.append(lane.bench.link)

    def measure_interleaved(
        self, models: Mapping[str, Path], x: np.ndarray, *, rounds: int = 20, seconds: float = 0.05
    ) -> dict[str, list[float]]:
        """Latencies of exported libraries on one board, in one session and in turns.

        As `tvm_lowrank.searching.measure.local.measure_interleaved`, by the board's clock; a lost session is repeated.
        """

        def work(bench: RPCBench, models: Mapping[str, Path]) -> dict[str, list[float]]:
            handles = {}
            for name, path in models.items():
                try:
                    handles[name] = bench.load(path.resolve(), x)
                except TrialError as error:
                    raise TrialError(f"{name}: {error}") from error
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(rounds):
                for name, handle in handles.items():
                    times[name].append(1e3 * float(np.mean(bench.time_model(handle, seconds))))
            return times

        with closing(self.each([models], work)) as results:
            return next(results)

    def run(self, path: Path, images: Images, *, batch: int) -> Any:
        """Outputs of an exported library for float32 images (n, C, H, W), computed on the boards.

        They are an array, or a tuple of several. ``batch`` is the library's; the last batch is padded.
        """
        starts = range(0, len(images), batch)

        def work(bench: RPCBench, start: int) -> tuple[int, int, Any]:
            part = images[start : start + batch]
            padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            return start, len(part), take(bench.run(path.resolve(), padded), slice(len(part)))

        outputs: dict[int, Any] = {}
        with (
            console.progress("running on the device", len(images)) as advance,
            closing(self.each(starts, work)) as done,
        ):
            for start, count, output in done:
                outputs[start] = output
                advance(count)
        return joined([outputs[start] for start in starts])

    def _take(self) -> RPCBench | None:
        """A session, not yet opened, with a free board that is not resting, if there is one."""
        remote = self.remote
        try:
            if not free_boards(remote):
                self.obstacle = (
                    f"no board with key {remote.key!r} is free at the tracker {remote.host}:{remote.port}; start the "
                    f"RPC server on one (--tracker {remote.host}:{remote.port} --key {remote.key})"
                )
                return None
            if not self.links:
                self.links.append(Worker(threads=self.threads, module=LINK, cancelled=self.cancelled))
            # it takes longer to start than some servers wait for a client that was announced to them
            self.links[-1].request("ready", timeout=START_TIMEOUT)
            slot = request(remote)
        except OSError as error:
            self.obstacle = (
                f"no RPC tracker answers at {remote.host}:{remote.port} ({error}); start one "
                f"(python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {remote.port})"
            )
            return None
        board = self.boards.setdefault(slot.board, Board(slot.board))
        if board.resting_until > time.monotonic():
            self.obstacle = f"no other board with key {remote.key!r} is free"
            return None
        link = self.links.pop()
        return RPCBench(remote, slot, board, link=link, pool=self.pool, target=self.target, losses=self.losses)

    def _start(
        self,
        bench: RPCBench,
        pending: deque[T],
        work: Callable[[RPCBench, T], R],
        said: queue.SimpleQueue[tuple[Lane, R | Ended]],
    ) -> Lane:
        """Work through tasks on one board until they or half of the session's time are used up."""
        lane = Lane(bench)

        def run() -> None:
            error: BaseException | None = None
            try:
                with bench:
                    self._check(bench.board)
                    end, look = time.monotonic() + self.remote.session_timeout / 2, 0.0
                    while time.monotonic() < end:
                        if self.remote.cool_down and time.monotonic() >= look:
                            self._settle(bench)
                            look = time.monotonic() + LOOK
                        try:
                            task = pending.popleft()
                        except IndexError:
                            break
                        try:
                            result = work(bench, task)
                        except BoardLost:
                            pending.appendleft(task)
                            raise
                        said.put((lane, result))
            except BaseException as raised:
                error = raised
            said.put((lane, Ended(error)))

        lane.thread = threading.Thread(target=run, daemon=True)
        lane.thread.start()
        return lane

    def _check(self, board: Board) -> None:
        """Does the board run as many threads, and where, as it was asked to?"""
        if self.remote.cores and not board.info["pinned"]:
            raise UserError(
                f"board {board.name} has TVM's own RPC server, which cannot choose cores; start the one of tvm_lowrank "
                "there, or name no cores"
            )
        if board.info.get("emulated") and not self.remote.emulated:
            raise UserError(f"board {board.name} is emulated: its times mean nothing; say --emulate if that is meant")
        version, here = board.info.get("tvm"), tvm_versions()["apache-tvm"]
        if version is not None and release(version) != release(here):
            raise UserError(f"board {board.name} has TVM {version}, this machine {here}; install the same on both")
        running = board.info["threads"]
        if running != self.threads:
            raise UserError(
                f"board {board.name} runs {running} threads, not {self.threads}; start its RPC server with "
                f"TVM_NUM_THREADS={self.threads} in its environment, or ask for {running}"
            )

    def _lost(self, board: Board, error: BoardLost) -> None:
        board.failures = 0 if error.blamed else board.failures + 1
        self.loss = f"board {board.name} was lost ({error})"
        console.warn(f"{self.loss}; what it worked on will be measured again")
        if board.failures >= FAILURES:
            rest = REST * 2 ** (board.failures - FAILURES)
            board.resting_until = time.monotonic() + rest
            console.warn(
                f"board {board.name} was lost {board.failures} times in a row; leaving it out for {rest:.0f} s"
            )

    def _wait(self, waited: float) -> float:
        """Wait a moment for a board; how long that has been, in all."""
        patience = self.remote.patience
        if waited >= patience:
            why = f"{self.loss}, and {self.obstacle}" if self.loss else self.obstacle
            raise MeasurementError(f"{why}; gave up after {patience:.0f} s")
        if waited <= QUIET < waited + POLL:
            console.warn(f"{self.obstacle}; waiting up to {patience:.0f} s")
        time.sleep(POLL)
        return waited + POLL

    def _settle(self, bench: RPCBench) -> None:
        """Wait until a board runs the reference kernel about as fast as it ever did."""
        try:
            (built,) = bench.build([reference_job(self.target)])
            if isinstance(built, TrialError):
                raise built
            measure = partial(bench.time, built, REFERENCE_SECONDS)
            settle(bench.board, lambda: min(measure()), limit=self.remote.cool_down, pause=self._pause)
        except TrialError as error:
            raise MeasurementError(f"board {bench.board.name} cannot run a small matrix product: {error}") from error

    def _pause(self, seconds: float) -> None:
        if self.cancelled.wait(seconds):
            raise Cancelled
