"""Boards that are processes of this machine: a tracker and device servers, under QEMU where the architecture differs.

They make every step that a real board makes, but their times say nothing about one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tvm import rpc

from tvm_lowrank import console
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.targets.server import PROGRAM, build_server
from tvm_lowrank.targets.toolchain import host_arch, triple_of

HOST = "127.0.0.1"
QEMU = {"x86_64": "qemu-x86_64-static", "aarch64": "qemu-aarch64-static", "armv7": "qemu-arm-static"}
START_TIMEOUT = 60.0  # seconds until all boards are registered; it takes one or two
END_TIMEOUT = 5.0  # seconds until a process has removed what it left

# `tvm.exec.rpc_tracker` keeps running when its parent is killed; this one ends when its standard input is closed
TRACKER = """
import os, sys
from tvm.rpc.tracker import PopenTrackerServerState
state = PopenTrackerServerState(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), silent=True)
print(state.port, flush=True)
sys.stdin.read()
os._exit(0)
"""
PORTS = 1000  # how many ports are tried


@dataclass(frozen=True)
class Boards:
    """Boards that wait for work at a tracker; ``pids`` are the processes of their servers."""

    host: str
    port: int
    key: str
    arch: str
    pids: tuple[int, ...]
    emulated: bool  # False where the host's own processor runs the code


@contextmanager
def emulated(arch: str, *, boards: int = 1, cache_dir: Path, key: str | None = None) -> Iterator[Boards]:
    """Boards of an architecture, ready for use, which end with the block (or with this process).

    Parameters
    ----------
    arch
        ``aarch64`` or ``x86_64``; that of this machine runs without an emulator.
    boards
        How many servers register with the tracker under ``key`` (``emulated-<arch>`` if it is not given).
    cache_dir
        Where the compiled server and the downloaded runtime libraries are kept.

    Raises
    ------
    UserError
        If a compiler, an emulator or TVM's runtime is missing for the architecture.
    MeasurementError
        If the boards do not become ready.
    """
    with _started(arch, boards=boards, cache_dir=cache_dir, key=key, log=None) as (made, _):
        yield made


def emulate(arch: str, *, boards: int = 1, cache_dir: Path, key: str | None = None) -> None:
    """Run boards until Ctrl-C, and say how to use them (`tvm_lowrank device emulate`)."""
    try:
        with _started(arch, boards=boards, cache_dir=cache_dir, key=key, log=sys.stderr.fileno()) as (made, children):
            kind = "emulated" if made.emulated else "local"
            console.phase(f"{boards} {kind} {arch} board(s) at tracker {made.host}:{made.port}, key {made.key}")
            console.phase(f"TVM_TRACKER_HOST={made.host} TVM_TRACKER_PORT={made.port} TVM_TRACKER_KEY={made.key}")
            if made.emulated:
                console.warn("times of emulated boards say nothing about real ones")
            console.phase("Ctrl-C ends them")
            while True:
                _check_alive(children)
                time.sleep(0.5)
    except KeyboardInterrupt:
        console.phase("ended")


def board_command(arch: str, folder: Path) -> list[str]:
    """The command that runs the server of `build_server` on this machine.

    Raises
    ------
    UserError
        If QEMU is needed and missing.
    """
    program = str(folder.resolve() / PROGRAM)  # it is started in another folder
    if arch == host_arch():
        return [program]
    triple = triple_of(arch)
    qemu = shutil.which(QEMU[arch]) or shutil.which(QEMU[arch].removesuffix("-static"))
    if qemu is None:
        raise UserError(f"no emulator for {arch}; install QEMU (Debian: apt install qemu-user-static)")
    return [qemu, "-L", f"/usr/{triple}", "-E", "TVM_LOWRANK_EMULATED=1", program]


@contextmanager
def tracker(*, first_port: int = 9190, log: int | None = None) -> Iterator[int]:
    """TVM's tracker on the first free port of this machine; yields the port."""
    command = [sys.executable, "-W", "ignore", "-c", TRACKER, HOST, str(first_port), str(first_port + PORTS)]
    with _child(command, log=log, stdout=subprocess.PIPE) as child:
        assert child.process.stdout is not None
        line = child.process.stdout.readline()
        if not line:
            raise MeasurementError(f"TVM's tracker did not start: {child.last_line()}")
        yield int(line)


@contextmanager
def _started(
    arch: str, *, boards: int, cache_dir: Path, key: str | None, log: int | None
) -> Iterator[tuple[Boards, Sequence[_Child]]]:
    if boards < 1:
        raise UserError(f"{boards} boards are not possible; give at least 1")
    key = key or f"emulated-{arch}"
    command = board_command(arch, build_server(arch, cache_dir=cache_dir))
    with ExitStack() as stack:
        port = stack.enter_context(tracker(log=log))
        command += ["--tracker", f"{HOST}:{port}", "--key", key, "--port", "0", "--until-eof"]
        children = [stack.enter_context(_child(command, log=log)) for _ in range(boards)]
        _wait_registered(port, key, children)
        pids = tuple(child.process.pid for child in children)
        yield Boards(HOST, port, key, arch, pids, emulated=arch != host_arch()), children


@dataclass(frozen=True)
class _Child:
    """A process and the file that its messages go to."""

    process: subprocess.Popen[str]
    log: IO[str]

    def last_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else "its messages say why"


@contextmanager
def _child(command: Sequence[str], *, log: int | None, stdout: int = subprocess.DEVNULL) -> Iterator[_Child]:
    """A process that ends when its standard input is closed: by the end of the block, or of this process."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=file if log is None else log,
            text=True,
            cwd=sys.prefix,  # the checkout would hide the installed package
            start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
        )
        try:
            yield _Child(process, file)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _wait_registered(port: int, key: str, boards: Sequence[_Child]) -> None:
    session = rpc.connect_tracker(HOST, port)
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while session.summary()["queue_info"].get(key, {}).get("free", 0) < len(boards):
            _check_alive(boards)
            if time.monotonic() > deadline:
                raise MeasurementError(f"the boards were not ready within {START_TIMEOUT:.0f} s")
            time.sleep(0.05)
    finally:
        session.close()


def _check_alive(boards: Sequence[_Child]) -> None:
    for board in boards:
        code = board.process.poll()
        if code is not None:
            raise MeasurementError(f"a board ended with code {code}: {board.last_line()}")
