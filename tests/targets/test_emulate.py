"""Boards on this machine, native and emulated, with the real tracker, compilers and QEMU."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import tvm
from torch import nn
from tvm import relax, rpc

from support.lowering_networks import canonical, expected, network, sample
from tvm_lowrank.codegen.lower import build, lower
from tvm_lowrank.errors import UserError
from tvm_lowrank.targets import emulate
from tvm_lowrank.targets.emulate import emulated
from tvm_lowrank.targets.server import build_server
from tvm_lowrank.targets.toolchain import TRIPLES, cross_compiler

pytestmark = pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static")
CPUS = {"x86_64": "x86-64-v3", "aarch64": "cortex-a72"}
SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "devices"


@pytest.fixture(scope="module", params=list(CPUS))
def boards(request, cache_dir):
    with emulated(request.param, boards=2, cache_dir=cache_dir) as made:
        yield made


@pytest.fixture(scope="module")
def net():
    return network(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.MaxPool2d(2))


@pytest.fixture
def library(net, boards, tmp_path):
    """The network as a library for the boards."""
    triple = TRIPLES[boards.arch]
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": CPUS[boards.arch], "num-cores": 1})
    path = tmp_path / "net.so"
    executable = build(lower(canonical(net, SHAPE), batch=1, target=target), {}, target)
    executable.export_library(str(path), cc=cross_compiler(triple))
    return path


def infer(session, library, x):
    session.upload(str(library))
    machine = relax.VirtualMachine(session.load_module(library.name), session.cpu(0))
    tensor = tvm.runtime.tensor(x, session.cpu(0))
    assert machine.time_evaluator("main", session.cpu(0), number=2)(tensor).mean > 0
    return machine["main"](tensor).numpy()


def test_network_computes_the_same_on_two_boards_at_once(boards, net, library):
    assert boards.emulated == (boards.arch != platform.machine())
    assert len(set(boards.pids)) == 2
    tracker = rpc.connect_tracker(boards.host, boards.port)
    x = sample(1, *SHAPE)
    sessions = [tracker.request(boards.key, session_timeout=60) for _ in boards.pids]
    for session in sessions:
        np.testing.assert_allclose(infer(session, library, x), expected(net, x), rtol=1e-4, atol=1e-4)
        about = json.loads(session.get_function("tvm_lowrank.device_info")())
        assert (about["architecture"], about["tvm"]) == (boards.arch, tvm.__version__)


def test_board_is_free_again_after_a_session_that_hangs_and_one_that_crashes(boards, library):
    tracker = rpc.connect_tracker(boards.host, boards.port)
    session = tracker.request(boards.key, session_timeout=1)
    time.sleep(1.5)
    with pytest.raises(Exception, match="longer than 1 s"):
        session.upload(str(library))
    session = tracker.request(boards.key, session_timeout=60)
    (child,) = [child for pid in boards.pids for child in psutil.Process(pid).children()]
    child.kill()
    with pytest.raises(Exception, match=r"crashed|closed|reset"):
        session.upload(str(library))
    for session in [tracker.request(boards.key, session_timeout=60) for _ in boards.pids]:
        session.upload(bytearray(b"fine"), "file")


def test_confinement_holds_on_the_board(boards):
    session = rpc.connect_tracker(boards.host, boards.port).request(boards.key, session_timeout=60)
    with pytest.raises(Exception, match="not the plain name of a file"):
        session.upload(bytearray(b"out"), "../out")


@contextmanager
def script(text, *arguments, folder):
    """A Python process that runs emulated boards; yields it and all processes below it once they are there."""
    command = [sys.executable, "-W", "ignore", "-c", text, *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=sys.prefix,
        # a shell starts what runs in the background with Ctrl-C ignored, and so would be what that starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    below = []
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        below = psutil.Process(process.pid).children(recursive=True)
        yield process, below
    finally:
        process.kill()
        process.communicate()
        for left in below:
            if left.is_running():
                left.kill()


HOLD = """
import sys, time
from pathlib import Path
from tvm import rpc
from tvm_lowrank.targets.emulate import emulated
with emulated(sys.argv[1], boards=2, cache_dir=Path(sys.argv[2])) as made:
    session = rpc.connect_tracker(made.host, made.port).request(made.key)
    session.upload(bytearray(b"file"), "file")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("arch", CPUS)
def test_killed_parent_leaves_nothing_behind(arch, cache_dir, tmp_path):
    build_server(arch, cache_dir=cache_dir)
    with script(HOLD, arch, cache_dir, folder=tmp_path) as (process, below):
        assert len(below) == 4  # the tracker, two boards, one session
        assert len(list(tmp_path.glob("tvm_lowrank-*/file"))) == 1
        process.kill()
        assert psutil.wait_procs(below, timeout=60)[1] == []
        assert list(tmp_path.glob("tvm_lowrank-*")) == []


FOREGROUND = """
import sys
from pathlib import Path
from tvm_lowrank.targets import emulate
console_phase = emulate.console.phase
def phase(text):
    console_phase(text)
    if "Ctrl-C" in text:
        print(text, flush=True)
emulate.console.phase = phase
emulate.emulate(sys.argv[1], boards=1, cache_dir=Path(sys.argv[2]), key="mine")
"""


def test_foreground_says_how_to_use_it_and_ends_with_ctrl_c(cache_dir, tmp_path):
    build_server("aarch64", cache_dir=cache_dir)
    with script(FOREGROUND, "aarch64", cache_dir, folder=tmp_path) as (process, below):
        assert len(below) == 2
        process.send_signal(2)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "TVM_TRACKER_KEY=mine" in said and "say nothing about real ones" in said
        assert psutil.wait_procs(below, timeout=60)[1] == []


def test_missing_emulator_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    foreign = next(arch for arch in CPUS if arch != platform.machine())
    with pytest.raises(UserError, match="apt install qemu-user-static"):
        emulate.board_command(foreign, tmp_path)


def test_no_boards_are_an_error(cache_dir):
    with pytest.raises(UserError, match="at least 1"), emulated("aarch64", boards=0, cache_dir=cache_dir):
        pass
