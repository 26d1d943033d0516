"""The device server, built for this machine's processor, against TVM's own tracker and client."""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm
from tvm import rpc, te

from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.errors import UserError
from tvm_lowrank.targets import emulate
from tvm_lowrank.targets.server import build_server
from tvm_lowrank.targets.toolchain import cross_compiler, runtime_folder

pytestmark = pytest.mark.slow

ARCH = platform.machine()
OTHER = next(arch for arch in ("x86_64", "aarch64") if arch != ARCH)
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    # the base folder is that of the whole test run: other modules find the same builds there
    return build_server(ARCH, cache_dir=tmp_path_factory.getbasetemp() / "devices") / "server"


@pytest.fixture(scope="module")
def tracker():
    with emulate.tracker() as port:
        yield port


def until(condition, seconds=60.0):
    """The first true value of a condition that takes a while."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def registered(port, key):
    """The port of the server that waits for a client under a key."""
    try:
        summary = rpc.connect_tracker(HOST, port).summary()
    except OSError:
        return None
    if summary["queue_info"].get(key, {}).get("free") != 1:
        return None
    return next(info["addr"][1] for info in summary["server_info"] if info["key"] == f"server:{key}")


@contextmanager
def serving(program, tracker, key, *options, work_dir=None, emulator=()):
    """A registered server; yields its process and its port."""
    command = [*emulator, program, "--tracker", f"{HOST}:{tracker}", "--key", key, "--port", "0", *options]
    if work_dir is not None:
        command += ["--work-dir", work_dir]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process, until(lambda: registered(tracker, key))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def request(tracker, key, **options):
    return rpc.connect_tracker(HOST, tracker).request(key, max_retry=1, **options)


def tell(session):
    return json.loads(session.get_function("tvm_lowrank.device_info")())


def test_sessions_follow_one_another_and_leave_nothing(program, tracker, tmp_path):
    with serving(program, tracker, "follow", work_dir=tmp_path):
        for name in ("first", "second"):
            session = request(tracker, "follow")
            (folder,) = tmp_path.iterdir()
            assert list(folder.iterdir()) == []
            session.upload(bytearray(name, "ascii"), name)
            assert session.download(name) == bytearray(name, "ascii")
            for gone in (name, name, ""):  # MetaSchedule's runner removes like this
                session.remove(gone)
            assert list(folder.iterdir()) == []
            session.upload(bytearray(b"left behind"), name)
            del session
            until(lambda: registered(tracker, "follow"))
            assert list(tmp_path.iterdir()) == []


def test_device_tells_about_itself_and_takes_cores(program, tracker):
    core = str(max(os.sched_getaffinity(0)))
    with serving(program, tracker, "cores", "--cores", core) as (process, _):
        session = request(tracker, "cores")
        about = tell(session)
        assert about["architecture"] == ARCH
        assert about["tvm"] == tvm.__version__
        assert about["cores"] >= 1 and len(about["mhz"]) == len(about["governor"]) == about["cores"]
        (child,) = psutil.Process(process.pid).children()
        assert child.cpu_affinity() == [int(core)]
        assert session.get_function("runtime.NumThreads")() == 1
        every = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        session.get_function("tvm_lowrank.use_cores")(every)
        with pytest.raises(Exception, match="core 999 is not one that this process may use"):
            session.get_function("tvm_lowrank.use_cores")("999")


def test_stranger_is_sent_away(program, tracker):
    with serving(program, tracker, "strict") as (_, port):
        with pytest.raises(Exception, match="cannot find server that matches key"):
            rpc.connect(HOST, port, "strict")
        with socket.create_connection((HOST, port)) as browser:
            browser.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(ConnectionResetError):
                assert browser.recv(1) == b""
        assert tell(request(tracker, "strict"))


def test_match_key_that_nobody_uses_is_replaced(program, tracker):
    with serving(program, tracker, "replaced"):
        connection = socket.create_connection((HOST, tracker))
        rpc.base.recvall(connection, connection.send((rpc.base.RPC_TRACKER_MAGIC).to_bytes(4, "little")))
        rpc.base.sendjson(connection, [rpc.base.TrackerCode.REQUEST, "replaced", "", 1])
        code, (_, _, match_key) = rpc.base.recvjson(connection)
        assert code == rpc.base.TrackerCode.SUCCESS and match_key.startswith("replaced:")
        assert registered(tracker, "replaced") is None
        until(lambda: registered(tracker, "replaced"))
        assert tell(request(tracker, "replaced"))
        connection.close()


@pytest.mark.parametrize(
    ("options", "asked", "expected"), [([], 1, "longer than 1 s"), (["--timeout", "0.5"], 100, "longer than 0.5 s")]
)
def test_long_session_is_ended(program, tracker, tmp_path, options, asked, expected):
    with serving(program, tracker, "impatient", *options, work_dir=tmp_path):
        session = request(tracker, "impatient", session_timeout=asked)
        until(lambda: registered(tracker, "impatient"))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(Exception, match=expected):
            tell(session)
        assert tell(request(tracker, "impatient", session_timeout=60))


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "folder/file", "..", "link"])
def test_only_plain_names_in_the_sessions_folder(program, tracker, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    with serving(program, tracker, "confined", work_dir=work_dir):
        session = request(tracker, "confined")
        (folder,) = work_dir.iterdir()
        (folder / "link").symlink_to(outside)
        for use in (lambda: session.upload(bytearray(b"changed"), name), lambda: session.download(name)):
            with pytest.raises(Exception, match=r"not the plain name of a file|is a link"):
                use()
        for use in (session.remove, session.load_module):
            with pytest.raises(Exception, match=r"not the plain name of a file|is a link"):
                use(name)
        assert [path.name for path in folder.iterdir()] == ["link"]
    assert outside.read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "work"]


def test_large_upload_and_unlinked_module_are_refused(program, tracker, tmp_path):
    with serving(program, tracker, "small", "--max-upload", "1", work_dir=tmp_path):
        session = request(tracker, "small")
        session.upload(bytearray(1 << 20), "just.so")
        with pytest.raises(Exception, match="larger than the 1 MiB"):
            session.upload(bytearray((1 << 20) + 1), "large.so")
        (folder,) = tmp_path.iterdir()
        assert [path.name for path in folder.iterdir()] == ["just.so"]
        session.upload(bytearray(b"objects"), "model.tar")
        with pytest.raises(Exception, match=r"only \.so files.*no linker on the device"):
            session.load_module("model.tar")
        with pytest.raises(Exception, match="was not uploaded"):
            session.load_module("missing.so")


@pytest.mark.needs("qemu-x86_64-static")
@pytest.mark.skipif(ARCH != "x86_64", reason="needs a server for x86-64")
def test_library_for_another_processor_is_refused(program, tracker, tmp_path):
    def module(cpu):
        a, b = (te.placeholder((64,), name=name) for name in "ab")
        func = te.create_prim_func([a, b, te.compute((64,), lambda i: a[i] + b[i])]).with_attr("global_symbol", "main")
        goal = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "mattr": ["-prefer-256-bit"]})
        return tvm.tirx.build(tvm.IRModule({"main": func}), target=goal)

    export_library(module("skylake-avx512"), tmp_path / "new.so")
    export_library(module("haswell"), tmp_path / "old.so")
    module("skylake-avx512").export_library(str(tmp_path / "silent.so"))
    with serving(program, tracker, "older", emulator=(shutil.which("qemu-x86_64-static"), "-cpu", "Haswell")):
        session = request(tracker, "older")
        for name in ("new.so", "old.so", "silent.so"):
            session.upload(str(tmp_path / name), name)
        with pytest.raises(
            Exception, match=r"new\.so.* needs a processor with avx512f, .*, which this one does not have"
        ):
            session.load_module("new.so")
        values = [tvm.runtime.tensor(np.ones(64, "float32"), session.cpu()) for _ in range(3)]
        session.load_module("old.so")["main"](*values)
        assert values[2].numpy().tolist() == [2.0] * 64
        silent = session.load_module("silent.so")["main"]  # so the test could fail
        with pytest.raises(Exception, match="session crashed: Illegal instruction"):
            silent(*values)


def test_server_outlives_its_tracker(program):
    with emulate.tracker(first_port=19190) as port:
        command = [program, "--tracker", f"{HOST}:{port}", "--key", "loyal", "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: registered(port, "loyal"))
    try:
        with emulate.tracker(first_port=port) as again:
            assert again == port
            until(lambda: registered(port, "loyal"))
            assert tell(request(port, "loyal"))
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert log.count("the tracker has gone") == 1 and log.count("registered with the tracker") == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "eof"])
def test_end_takes_the_session_along(program, tracker, tmp_path, how):
    key = f"mortal-{how}"
    command = [program, "--tracker", f"{HOST}:{tracker}", "--key", key, "--port", "0", "--work-dir", tmp_path]
    process = subprocess.Popen([*command, "--until-eof"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: registered(tracker, key))
    session = request(tracker, key)
    children = psutil.Process(process.pid).children()
    assert len(children) == len(list(tmp_path.iterdir())) == 1
    if how == "eof":
        process.stdin.close()
    else:
        process.send_signal(how)
    assert process.wait(10) == 0
    process.stderr.close()
    process.stdin.close()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Exception, match="server was stopped"):
        tell(session)


def test_killed_server_takes_the_session_along(program, tracker, tmp_path):
    with serving(program, tracker, "killed", work_dir=tmp_path) as (process, _):
        session = request(tracker, "killed")
        children = psutil.Process(process.pid).children()
        process.kill()
        assert len(children) == 1
        assert psutil.wait_procs(children, timeout=60)[1] == []
        with pytest.raises(tvm.error.InternalError):
            tell(session)


def test_listening_for_strangers_is_warned_of(program, tracker):
    with serving(program, tracker, "open", "--host", "0.0.0.0") as (process, _):
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert "listening on 0.0.0.0:" in log and "warning: RPC runs whatever it is sent" in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--tracker HOST:PORT is missing"),
        ("--tracker here --key a", "an address like"),
        ("--tracker a:0 --key a", "from 1 to 65535"),
        ("--tracker a:1", "--key KEY is missing"),
        ("--tracker a:1 --key a,b", "letters, digits"),
        ("--tracker a:1 --key", "--key needs a value"),
        ("--tracker a:1 --key a --port 70000", "from 0 to 65535"),
        ("--tracker a:1 --key a --port 9000 --port-end 9000", "greater than --port"),
        ("--tracker a:1 --key a --work-dir /no/such/folder", "no folder that can be written to"),
        ("--tracker a:1 --key a --timeout soon", "seconds"),
        ("--tracker a:1 --key a --max-upload 0", "from 1"),
        ("--tracker a:1 --key a --cores 0,0", "named twice"),
        ("--tracker a:1 --key a --cores 1000", "may use"),
        ("--tracker a:1 --key a --verbose", "unknown option --verbose; --help"),
    ],
)
def test_bad_option_is_one_line(program, options, message):
    done = subprocess.run([program, *options.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_ports_in_use_are_an_error(program):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        command = [program, "--tracker", "a:1", "--key", "a", "--port", str(port), "--port-end", str(port + 1)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"from {port} to {port} is in use" in done.stderr


def test_folder_runs_from_anywhere(program, tmp_path):
    (tmp_path / "board").mkdir()
    for path in program.parent.iterdir():
        (tmp_path / "board" / path.name).write_bytes(path.read_bytes())
    moved = tmp_path / "board" / "server"
    moved.chmod(0o755)
    done = subprocess.run([moved, "--help"], capture_output=True, text=True, timeout=10, cwd="/", env={})
    assert done.returncode == 0 and done.stdout.startswith("usage: server")


def test_build_is_kept(program):
    assert build_server(ARCH, cache_dir=program.parent.parent.parent) == program.parent


def test_missing_compiler_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"g\+\+-aarch64-linux-gnu.*CXX_aarch64_linux_gnu"):
        cross_compiler("aarch64-linux-gnu" if ARCH != "aarch64" else "x86_64-linux-gnu")


def test_compiler_can_be_chosen(monkeypatch, tmp_path):
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX_aarch64_linux_gnu", str(compiler))
    assert Path(cross_compiler("aarch64-linux-gnu")) == compiler
    monkeypatch.setenv("CXX_aarch64_linux_gnu", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"CXX_aarch64_linux_gnu is .*gone"):
        cross_compiler("aarch64-linux-gnu")


def test_runtime_that_does_not_exist_is_explained(tmp_path):
    with pytest.raises(UserError, match="apache-tvm has no packages for armv7"):
        runtime_folder("armv7", cache_dir=tmp_path)
    with pytest.raises(UserError, match="unknown architecture 'vax'"):
        runtime_folder("vax", cache_dir=tmp_path)


def test_failed_download_is_explained_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match=f"cannot download apache-tvm==.* for {OTHER}.*PIP_FIND_LINKS"):
        runtime_folder(OTHER, cache_dir=tmp_path)
    assert list((tmp_path / "runtime").iterdir()) == []
