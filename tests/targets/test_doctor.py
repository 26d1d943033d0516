"""Everything that can be wrong with a device really is wrong here: compilers, trackers, servers, boards."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import typer
from tvm import rpc
from typer.testing import CliRunner

from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.targets import commands, emulate, probe
from tvm_lowrank.targets.doctor import STEPS, Examination, examine
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.targets.toolchain import host_arch, tvm_versions

pytestmark = pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static")
HOST = "127.0.0.1"
ALL = [name for name, *_ in STEPS]
# boards of this machine's architecture, which need no emulator
PROFILE = replace(load_profile("x86"), name="board", rpc_key="board")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "devices"


@pytest.fixture(scope="module")
def board(cache_dir):
    """A board with the tool's own server."""
    with emulate.emulated(host_arch(), cache_dir=cache_dir, key="board") as made:
        yield made


def results(profile, board, **options):
    """Name of each step to what was found, and to what was wrong."""
    tracker = (HOST, board) if isinstance(board, int) else (board.host, board.port)
    steps = list(examine(profile, tracker=tracker, **options))
    return {s.name: s.detail for s in steps if s.error is None}, {s.name: s.detail for s in steps if s.error}


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def run(*arguments):
    app = typer.Typer()
    commands.mount(app)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_emulated_board_is_well(cache_dir):
    done = run("doctor", "--target", "arm", "--emulate", "--cache", cache_dir)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"✓ {name}" for name in ALL]
    assert f"{tvm_versions()['apache-tvm']} on both sides" in done.stdout
    assert ("emulated: it says nothing" in lines[-1]) == (host_arch() != "aarch64")
    assert done.exit_code == 0


def test_emulated_board_at_a_tracker_is_not_started_again(board, tmp_path):
    profile = tmp_path / "mine.toml"
    head = f'[target]\nkind = "llvm"\nmtriple = "{PROFILE.triple}"\nmcpu = "host"\n'
    profile.write_text(head + '[vector]\nlanes = "detect"\nregisters = "detect"\n[rpc]\nkey = "board"\n')
    done = run("doctor", "--target", profile, "--emulate", "--rpc-tracker", f"{board.host}:{board.port}")
    assert done.exit_code == 0 and "emulated: it says nothing" in done.stdout


def test_this_machine_needs_no_tracker():
    good = {step.name for step in examine(load_profile("x86")) if step.error is None}
    assert good | {"clock"} == {"compiler", "link", "round trip", "clock"}  # other work may disturb the clock
    with pytest.raises(UserError, match="is this machine"):
        run("doctor", "--emulate")


def test_missing_compiler_does_not_hide_the_rest(board):
    good, bad = results(replace(PROFILE, compiler="riscv-g++"), board)
    assert bad == {"compiler": "no compiler riscv-g++ (target board); install it, or name another in [link]"}
    assert list(good) == ["tracker", "key", "free board", "TVM versions"]


def test_linker_that_fails(board):
    good, bad = results(replace(PROFILE, options=("-no-such-option",)), board)
    assert list(bad) == ["link"] and "no-such-option" in bad["link"]
    assert "TVM versions" in good


def test_no_tracker():
    port = free_port()
    good, bad = results(PROFILE, port)
    assert list(good) == ["compiler", "link"] and list(bad) == ["tracker"]
    assert re.search(f"no RPC tracker answers at {HOST}:{port} .*refused.*; start one", bad["tracker"])
    _, quickly = results(PROFILE, port, quick=True)
    assert list(quickly) == ["tracker"] and "start one" in quickly["tracker"]


def test_something_else_at_the_trackers_port():
    with socket.create_server((HOST, 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400"), daemon=True).start()
        _, bad = results(PROFILE, other.getsockname()[1])
    assert "is no RPC tracker" in bad["tracker"]


def test_no_tracker_named(monkeypatch):
    monkeypatch.delenv("TVM_TRACKER_HOST", raising=False)
    done = run("doctor", "--target", "rpi4")
    assert done.exit_code == 1
    assert "✗ tracker" in done.stdout and "--rpc-tracker HOST:PORT" in done.stdout and "--emulate" in done.stdout


def test_wrong_key(board):
    good, bad = results(PROFILE, board, key="rpi9")
    assert list(good) == ["compiler", "link", "tracker"] and list(bad) == ["key"]
    assert "no board with key 'rpi9' and has only board; start the RPC server" in bad["key"]
    assert f"--tracker {board.host}:{board.port} --key rpi9" in bad["key"]


def test_board_in_use(board):
    held = rpc.connect_tracker(board.host, board.port).request(board.key, session_timeout=60)
    good, bad = results(PROFILE, board)
    assert good["key"] == "board, 1 board(s)"
    assert list(bad) == ["free board"] and "every board with key 'board' is in use, 0 more" in bad["free board"]
    _, quickly = results(PROFILE, board, quick=True)
    assert list(quickly) == ["free board"] and "in use" in quickly["free board"]
    del held
    deadline = time.monotonic() + 20
    while results(PROFILE, board, quick=True)[1]:
        assert time.monotonic() < deadline


# TVM's own server, once for each way of being ill; what it runs for a session runs in a process of its own
SERVERS = """
import ctypes, json, pathlib, subprocess, sys
import numpy as np, tvm_ffi
from tvm.rpc import server
from tvm_lowrank.targets import probe

folder, tracker = pathlib.Path(sys.argv[1]), ("127.0.0.1", int(sys.argv[2]))
source = "#include <stdint.h>\\nvoid OldFFIGetVersion(uint32_t* v) { v[0] = 0; v[1] = 1; v[2] = 3; }"
build = ["gcc", "-xc", "-", "-shared", "-fPIC", "-o", folder / "old.so"]
subprocess.run(build, input=source, text=True, check=True)
original = server._server_env

def environment(illness, work_path):
    made = original(None, work_path)
    weight = probe.tensors()[1][5, 4, 0, 1]
    changes = {
        "broken memory": (weight.tobytes(), np.float32(100 + weight).tobytes()),
        "other ffi": (b"TVMFFIGetVersion", b"OldFFIGetVersion"),
    }
    ctypes.CDLL(folder / "old.so", ctypes.RTLD_GLOBAL)

    @tvm_ffi.register_global_func("tvm.rpc.server.load_module", override=True)
    def load(name):
        path = pathlib.Path(made.relpath(name))
        path.write_bytes(path.read_bytes().replace(*changes.get(illness, (b"", b""))))
        return server._load_module(str(path))

    if illness == "other version":
        about = json.dumps({"tvm": "0.26.1", "architecture": "any", "cores": 1})
        tvm_ffi.register_global_func("tvm_lowrank.device_info", lambda: about)
    return made

server._server_env = environment
for key in sys.argv[3:]:
    address = "127.0.0.77" if key == "elsewhere" else None
    server.PopenRPCServerState(
        "127.0.0.1", 9300, 9900, tracker_addr=tracker, key=key.replace(" ", "-"), load_library=key, silent=True,
        custom_addr=address,
    )
"""
CONDITIONS = ("healthy", "broken memory", "other ffi", "other version", "elsewhere", "hanging")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The port of a tracker with a board for each condition, and the process of all their servers."""
    with emulate.tracker() as port:
        command = [sys.executable, "-W", "ignore", "-c", SERVERS, tmp_path_factory.mktemp("servers"), str(port)]
        process = subprocess.Popen([*command, *CONDITIONS], cwd=sys.prefix, start_new_session=True)
        try:
            tracker = rpc.connect_tracker(HOST, port)
            deadline = time.monotonic() + 60
            while len(tracker.summary()["server_info"]) < len(CONDITIONS):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            yield port, process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_tvms_own_server_is_well(servers):
    good, bad = results(PROFILE, servers[0], key="healthy")
    assert set(bad) <= {"clock"}
    assert "TVM's own server" in good["TVM versions"] and "as here" in good["TVM versions"]
    assert "largest error" in good["round trip"]


@pytest.mark.parametrize(
    ("condition", "step", "message"),
    [
        (
            "broken-memory",
            "round trip",
            r"results are wrong by .* of the largest value; check that target board .* fits",
        ),
        ("other-ffi", "TVM versions", r"the board's TVM was built with 0\.1\.3; install the same on both sides"),
        ("other-version", "TVM versions", r"has TVM 0\.26\.1, this machine 0\.27.*; install the same on both sides"),
        ("elsewhere", "TVM versions", r"connecting to the board's server 127\.0\.0\.77:\d+: .*; check that it can be"),
    ],
)
def test_board_that_is_ill(servers, condition, step, message):
    good, bad = results(PROFILE, servers[0], key=condition)
    assert list(bad) == [step] and re.search(message, bad[step])
    assert list(good) == ALL[: ALL.index(step)]


def test_board_that_hangs(servers, monkeypatch):
    port, process = servers
    monkeypatch.setattr(probe, "LIMIT", 5)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        _, bad = results(PROFILE, port, key="hanging")
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    assert re.search(r"connecting to the board's server .*: no answer within 5 s", bad["TVM versions"])


def test_code_for_another_processor(board):
    other = next(name for name in ("arm", "x86") if load_profile(name).arch != host_arch())
    good, bad = results(replace(load_profile(other), rpc_key="board"), board)
    assert "TVM versions" in good and list(bad) == ["round trip"]
    assert "loading a library: " in bad["round trip"] and "check that target" in bad["round trip"]


@pytest.mark.parametrize(
    ("slowest", "emulated", "message"),
    [(1.05, False, ""), (1.5, True, ""), (1.5, False, "spread 50% (governor ondemand, 71 °C); set the governor")],
)
def test_clock_that_changes(slowest, emulated, message, tmp_path):
    about = {"governor": ["ondemand", "ondemand", None], "celsius": 71.2}
    facts = {"seconds": [0.01] * 10 + [0.01 * slowest] * 10, "about": about}
    examination = Examination(replace(PROFILE, emulated=emulated), None, "board", tmp_path, facts)
    if message:
        with pytest.raises(MeasurementError, match=re.escape(message)):
            examination.clock()
    else:
        assert "ms a convolution" in examination.clock()


def test_targets_are_listed():
    done = run("targets")
    assert done.exit_code == 0
    for text in ("Raspberry Pi 4, 32-bit", "aarch64-linux-android24", "16 × 4", "this machine", "--target my.toml"):
        assert text in done.stdout


def test_server_can_be_taken_along(tmp_path, cache_dir):
    done = run("device", "build", "--arch", host_arch(), "--out", tmp_path / "board", "--cache", cache_dir)
    assert "board/server --tracker HOST:PORT --key KEY" in done.stdout
    assert subprocess.run([tmp_path / "board" / "server", "--help"], capture_output=True).returncode == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder with --out"):
        run("device", "build", "--arch", host_arch(), "--out", tmp_path / "file", "--cache", cache_dir)
