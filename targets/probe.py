"""A small convolution that shows whether a device works: made here, run there.

The device is talked to in a child process, ``python -m tvm_lowrank.targets.probe``: nothing bounds the time of a call
over TVM's RPC when the network or the board is gone, but an alarm ends a process.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, rpc, te

from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.lower import build, lower
from tvm_lowrank.codegen.processor import check
from tvm_lowrank.targets import tracker
from tvm_lowrank.targets.profile import Profile

LIMIT = 60  # seconds for everything that is done on a device
INPUT, WEIGHT = (1, 16, 28, 28), (32, 16, 3, 3)  # NCHW, OIHW
WARM_UP = 0.5  # seconds of work, in which a governor raises the clock
SAMPLE, SAMPLES = 0.01, 20  # seconds of one, and how many
SAMPLE_LIBRARY, VERSION_LIBRARY = "sample.so", "version.so"
OUTPUT, FACTS = "output.npy", "facts.jsonl"


@dataclass(frozen=True)
class Board:
    """How the tracker is asked for a board."""

    host: str
    port: int
    key: str


def tensors() -> tuple[np.ndarray, np.ndarray]:
    """The input and the weights of the convolution."""
    generator = np.random.default_rng(0)
    return generator.standard_normal(INPUT, np.float32), generator.standard_normal(WEIGHT, np.float32)


def expected() -> np.ndarray:
    """What the convolution gives, computed by numpy in double precision."""
    x, weight = (array.astype(np.float64) for array in tensors())
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WEIGHT[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight)


def export_libraries(profile: Profile, folder: Path) -> None:
    """Compile and link the convolution, and a function that tells the version of the runtime that it is loaded by.

    Raises
    ------
    UserError
        If the compiler is missing, or cannot link.
    """
    compiler, options = profile.linker()
    target = profile.tvm_target()
    sample = build(lower(_convolution(), batch=1, target=target), {}, target)
    version = te.extern(
        (3,), [], lambda _, outs: tvm.tirx.call_extern("int32", "TVMFFIGetVersion", outs[0].data), dtype="int32"
    )
    main = te.create_prim_func([version]).with_attr("global_symbol", "main")
    asking = tvm.tirx.build(tvm.IRModule({"main": main}), target=target)
    for executable, name in ((sample, SAMPLE_LIBRARY), (asking, VERSION_LIBRARY)):
        export_library(executable, folder / name, cc=compiler, options=options)


def visit(folder: Path, board: Board | None) -> dict[str, Any]:
    """Run the libraries in a folder, those that there are, on a board, or on this machine.

    Returns
    -------
    dict
        What was found out: ``address`` of the board, whether it is ``connected``, ``about`` (what it tells of itself;
        None if it is TVM's own server), ``ffi`` (the versions of tvm-ffi here and there), ``output`` (whether there is
        one), ``seconds`` of single runs. Where it failed, ``error``, and ``doing`` says at what.
    """
    request = json.dumps([str(folder), None if board is None else asdict(board), LIMIT])
    command = [sys.executable, "-W", "ignore", "-m", "tvm_lowrank.targets.probe", request]
    # not from a checkout, which would hide the installed package
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=sys.prefix)
    facts: dict[str, Any] = {}
    if (folder / FACTS).is_file():
        for line in (folder / FACTS).read_text().splitlines():
            facts.update(json.loads(line))
    if done.returncode == -signal.SIGALRM:
        facts["error"] = f"no answer within {LIMIT} s"
    elif done.returncode:
        facts.setdefault("error", (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1])
    return facts


def _convolution() -> tvm.ir.IRModule:
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType(INPUT, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            convolved = builder.emit(relax.op.nn.conv2d(x, relax.const(tensors()[1]), padding=1))
            result = builder.emit_output(convolved)
        builder.emit_func_output(result)
    return builder.finalize()


def _examine(folder: Path, board: Board | None, say: Callable[..., None]) -> None:
    say(doing="taking a board")
    if board is None:
        for library in folder.glob("*.so"):
            check(library)
    session = rpc.LocalSession() if board is None else _connect(board, say)
    say(connected=True, doing="asking for its version")
    try:
        say(about=json.loads(session.get_function("tvm_lowrank.device_info")()))
    except AttributeError:  # it is not the server that comes with the tool
        say(about=None)
    if (folder / VERSION_LIBRARY).is_file():
        say(doing="loading a library")
        there = tvm.runtime.empty((3,), "int32", session.cpu())
        _load(session, folder / VERSION_LIBRARY)["main"](there)
        say(ffi=[_ffi_version(), there.numpy().tolist()])
    if (folder / SAMPLE_LIBRARY).is_file():
        say(doing="running a convolution")
        machine = relax.VirtualMachine(_load(session, folder / SAMPLE_LIBRARY), session.cpu())
        x = tvm.runtime.tensor(tensors()[0], session.cpu())
        np.save(folder / OUTPUT, machine["main"](x).numpy())
        say(output=True, doing="timing a convolution")
        say(seconds=_time(lambda number, repeat: machine.time_evaluator("main", session.cpu(), number, repeat)(x)))


def _connect(board: Board, say: Callable[..., None]) -> Any:
    host, port, key = tracker.request(board.host, board.port, board.key)
    say(address=f"{host}:{port}", doing=f"connecting to the board's server {host}:{port}")
    return rpc.connect(host, port, key, session_timeout=LIMIT)  # in case this machine vanishes


def _load(session: Any, path: Path) -> Any:
    session.upload(str(path), path.name)
    return session.load_module(path.name)


def _ffi_version() -> list[int]:
    import tvm_ffi

    numbers = (ctypes.c_uint32 * 3)()
    tvm_ffi.LIB.TVMFFIGetVersion(numbers)
    return list(numbers)


def _time(timer: Callable[[int, int], Any]) -> Sequence[float]:
    once = min(timer(1, 3).results)
    timer(max(1, round(WARM_UP / once)), 1)
    return [float(seconds) for seconds in timer(max(1, round(SAMPLE / once)), SAMPLES).results]


def main() -> None:
    folder, board, limit = json.loads(sys.argv[1])
    signal.alarm(limit)
    with (Path(folder) / FACTS).open("w") as file:

        def say(**facts: object) -> None:
            print(json.dumps(facts), file=file, flush=True)

        try:
            _examine(Path(folder), None if board is None else Board(**board), say)
        except Exception as error:
            say(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])


if __name__ == "__main__":
    main()
