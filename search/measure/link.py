"""The child process that talks to a board: ``python -m tvm_lowrank.searching.measure.link``.

Nothing bounds the time of a call over TVM's RPC when the network or the board is gone, so the calls are made in a
process that can be killed (see `tvm_lowrank.searching.measure.worker` for how it is spoken to). It ends by itself when
its connection is lost: whatever it held of the board is gone, and the last line that it writes says why.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_lowrank.searching.measure.worker import Argument, Timer, one_line, sample, serve
from tvm_lowrank.tensors import as_arrays

FAST_CORES = 1  # affinity mode of TVM's thread pool; where all cores are alike, any
MAIN = "main"  # the function of a kernel, and of a model
DEVICE_INFO = "tvm_lowrank.device_info"
USE_CORES = "tvm_lowrank.use_cores"


class Link:
    """A connection to a board, and what was loaded there."""

    def __init__(self) -> None:
        self.remote: Any = None
        self.timers: dict[int, Timer] = {}
        self.models: dict[int, Any] = {}
        self.names = itertools.count()

    def ready(self) -> None:
        """Answers when the process has started."""

    def connect(
        self, host: str, port: int, key: str, session_timeout: float, threads: int, cores: Sequence[int]
    ) -> dict[str, Any]:
        """Open a session with a server that the tracker has assigned.

        Returns what the server tells of its device (nothing, if it is TVM's own), ``threads``: how many it uses, and
        ``pinned``: whether it uses the cores that were asked for.
        """
        self.remote = tvm.rpc.connect(host, port, key, session_timeout=session_timeout)
        with self._connected():
            running, use_cores = self.remote.get_function("runtime.NumThreads"), self._function(USE_CORES)
            pinned = bool(cores) and use_cores is not None
            if pinned:
                use_cores(",".join(str(core) for core in cores))
            elif running() != threads:  # else the server was told so, and perhaps on which cores
                self.remote.get_function("runtime.config_threadpool")(FAST_CORES, threads)
            device_info = self._function(DEVICE_INFO)
            described = {} if device_info is None else json.loads(device_info())
            return {**described, "threads": int(running()), "pinned": pinned}

    def disconnect(self) -> None:
        """End the session; the board is free for the next."""
        self.forget()
        self.remote.get_function("CloseRPCConnection")()
        self.remote = None

    def place(self, handle: int, path: str, parameters: Sequence[Argument]) -> None:
        """Send a kernel's library and run it once on random numbers."""
        with self._connected():
            library = self._send(path)
            arguments = [self._random(shape, dtype) for shape, dtype in parameters]
            library[MAIN](*arguments)
            self.timers[handle] = self._timer(library, MAIN, arguments)

    def load(self, handle: int, path: str, x: np.ndarray) -> None:
        """Send a compiled model and run it once on x."""
        with self._connected():
            machine = relax.VirtualMachine(self._send(path), self.remote.cpu())
            # RPC cannot return a tuple: the machine keeps what goes in and what comes out
            machine.set_input(MAIN, tvm.runtime.tensor(x, self.remote.cpu()))
            machine.invoke_stateful(MAIN)
            self.models[handle] = machine
            self.timers[handle] = self._timer(machine, "invoke_stateful", [MAIN])

    def run(self, handle: int, x: np.ndarray) -> Any:
        """A loaded model's output, or a tuple of several."""
        with self._connected():
            machine = self.models[handle]
            machine.set_input(MAIN, tvm.runtime.tensor(x, self.remote.cpu()))
            machine.invoke_stateful(MAIN)
            return as_arrays(machine.get_outputs(MAIN))

    def time(self, handle: int, seconds: float, limit: float = math.inf) -> list[float]:
        """Seconds of one run, by the board's clock, as `sample` says."""
        with self._connected():
            return sample(self.timers[handle], seconds, limit)

    def forget(self) -> None:
        """Free everything that was sent."""
        with self._connected():
            self.timers.clear()
            self.models.clear()

    def _send(self, path: str) -> Any:
        name = f"{next(self.names)}.so"  # a loader answers for a name that it knows with the library it had then
        self.remote.upload(path, name)
        library = self.remote.load_module(name)
        self.remote.remove(name)
        return library

    def _random(self, shape: list[int], dtype: str) -> Any:
        """A tensor on the board; its values are made there, if it can."""
        fill = self._function("tvm.contrib.random.random_fill_for_measure")
        if fill is None or dtype != "float32":
            values = np.random.default_rng(0).random(shape, dtype=np.float32).astype(dtype)
            return tvm.runtime.tensor(values, self.remote.cpu())
        tensor = tvm.runtime.empty(shape, dtype, self.remote.cpu())
        fill(tensor)
        return tensor

    def _timer(self, library: Any, function: str, arguments: list[Any]) -> Timer:
        def timer(number: int, repeat: int) -> Sequence[float]:
            run = library.time_evaluator(function, self.remote.cpu(), number=number, repeat=repeat)
            return [float(seconds) for seconds in run(*arguments).results]

        return timer

    def _function(self, name: str) -> Any:
        """A function of the server, or None if it has none of this name."""
        try:
            return self.remote.get_function(name)
        except AttributeError:
            return None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """End the process where the reason of an exception is that the board is gone."""
        try:
            yield
        except Exception as error:
            try:
                self.remote.get_function("runtime.NumThreads")()
            except Exception:
                print(one_line(error), file=sys.stderr, flush=True)
                os._exit(1)  # destructors of what is on the board would wait for it
            raise


def _end_with(parent: int) -> None:
    """A call that nothing bounds would outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    serve(Link())


if __name__ == "__main__":
    main()
