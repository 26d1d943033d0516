"""The child process that compiles and times: ``python -m tvm_lowrank.searching.measure.worker``.

It reads pickled requests from standard input and answers on standard output, so that a schedule that crashes or hangs
takes only this process with it. `tvm_lowrank.searching.measure.bench` is the other end. TVM_NUM_THREADS is read once,
when TVM first runs something in parallel, so it is set in the environment of this process and nowhere else.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

HEADER = struct.Struct("<Q")
SAMPLE_SECONDS = 0.004  # a sample averages this much running time, far above the clock's resolution
Argument = tuple[list[int], str]  # shape, data type


def send(stream: IO[bytes], message: object) -> None:
    """Write one message: eight bytes of length, then a pickle."""
    data = pickle.dumps(message)
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; EOFError when the other side is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    return pickle.loads(stream.read(HEADER.unpack(header)[0]))


Timer = Callable[[int, int], Sequence[float]]
"""(runs, samples) to the seconds of one run, each sample the mean of so many runs."""


def sample(timer: Timer, seconds: float, limit: float = math.inf) -> list[float]:
    """Seconds of one run: several samples that take about ``seconds`` together, or two if they are beyond ``limit``."""
    first = timer(1, 2)
    once = min(first)
    if once > limit:
        return list(first)
    number = max(1, round(SAMPLE_SECONDS / once))
    return list(timer(number, max(1, min(50, round(seconds / (number * once))))))


def compiled(source: str, tiling: dict[str, Any] | None, target: str, threads: int) -> tuple[Any, list[Argument]]:
    """Schedule and compile a kernel (``Kernel.func`` as JSON): the library, and what its function ``main`` takes."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    from tvm_lowrank.codegen import schedule

    goal = tvm.ir.load_json(target)
    choice = None if tiling is None else schedule.Tiling.from_json(tiling)
    func = schedule.apply(tvm.ir.load_json(source), choice, target=goal, threads=threads)
    func = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(func)
    arguments = [([int(d) for d in p.shape], str(p.dtype)) for p in func["main"].params]
    return tvm.tirx.build(func, target=goal), arguments


def _timer(evaluator: Callable[[int], Callable[..., Any]], arguments: list[Any]) -> Callable[[int, bool], float]:
    """Seconds per run of ``number`` runs, by the wall clock or by this thread's processor time."""

    def measure(number: int, cpu: bool) -> float:
        run = evaluator(number)
        start = time.thread_time()
        wall = float(run(*arguments).mean)
        # TVM runs the function once more, before it starts its clock
        return min(wall, (time.thread_time() - start) / (number + 1)) if cpu else wall

    return measure


class Session:
    """What the process keeps between requests: compiled kernels and loaded models."""

    def __init__(self) -> None:
        # number of runs, whether to count processor time: seconds of one run
        self.timers: dict[int, Callable[[int, bool], float]] = {}

    def build(self, handle: int, source: str, tiling: dict[str, Any] | None, target: str, threads: int) -> None:
        """Schedule, compile and run a kernel once."""
        import numpy as np
        import tvm

        from tvm_lowrank.codegen.kept import as_kept
        from tvm_lowrank.codegen.processor import needs_of_module, require

        library, parameters = compiled(source, tiling, target, threads)
        require(needs_of_module(library), "the kernel")
        generator = np.random.default_rng(0)
        arguments = [
            tvm.runtime.tensor(as_kept(generator.random(shape, dtype=np.float32), dtype)) for shape, dtype in parameters
        ]
        library["main"](*arguments)
        self.timers[handle] = _timer(lambda n: library.time_evaluator("main", tvm.cpu(), number=n), arguments)

    def export(
        self,
        path: str,
        source: str,
        tiling: dict[str, Any] | None,
        target: str,
        threads: int,
        compiler: str,
        options: Sequence[str],
    ) -> list[Argument]:
        """Schedule and compile a kernel to a shared library for another machine; what its ``main`` takes."""
        from tvm.support.cc import cross_compiler

        from tvm_lowrank.codegen.link import needs_source

        library, parameters = compiled(source, tiling, target, threads)
        with tempfile.TemporaryDirectory() as folder:
            addons = [needs_source(library, Path(folder))]
            library.export_library(path, fcompile=cross_compiler(compiler, list(options)), addons=addons)
        return parameters

    def load(self, handle: int, path: str, x: Any) -> None:
        """Load a compiled model and run it once on x."""
        import tvm
        from tvm import relax

        from tvm_lowrank.codegen.processor import check

        check(Path(path))
        vm = relax.VirtualMachine(tvm.runtime.load_module(path), tvm.cpu())
        argument = tvm.runtime.tensor(x)
        vm["main"](argument)

        self.timers[handle] = _timer(lambda n: vm.time_evaluator("main", tvm.cpu(), number=n), [argument])

    def time(self, handle: int, seconds: float, cpu: bool, limit: float = math.inf) -> list[float]:
        """Seconds of one run: several samples that take about ``seconds`` together, or two if beyond ``limit``.

        With ``cpu``, the processor time of this thread: on a machine that is shared it is what the wall clock would
        show on an idle core, if everything runs in this one thread.
        """
        timer = self.timers[handle]
        return sample(lambda number, repeat: [timer(number, cpu) for _ in range(repeat)], seconds, limit)

    def forget(self) -> None:
        """Free everything built or loaded."""
        self.timers.clear()


def one_line(error: BaseException) -> str:
    """An error's type and message, without the line breaks that compilers and TVM put into theirs."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def serve(session: object) -> None:
    """Answer requests, each the name of a method and its arguments, until the other side is gone."""
    # TVM imports PyTorch where it is installed, which takes 200 MB and a second; no request needs it
    sys.modules["torch"] = None  # type: ignore[assignment]
    # Ctrl-C reaches this process too, but the other side decides what becomes of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # whatever a library prints must not end up between the messages
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            operation, arguments = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: tuple[bool, Any] = (True, getattr(session, operation)(*arguments))
        except Exception as error:
            result = (False, one_line(error))
        send(answers, result)


if __name__ == "__main__":
    serve(Session())
