"""Boards are TVM's own RPC servers on this machine, behind TVM's own tracker."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from itertools import count

import numpy as np
import psutil
import pytest
import tvm
from torch import nn
from tvm import te

from support.lowering_networks import canonical, network, run, sample
from tvm_lowrank.codegen.lower import build, kernels, lower
from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.searching.latency.oracle import LatencyOracle, TuningError
from tvm_lowrank.searching.measure import remote as remote_module
from tvm_lowrank.searching.measure.bench import Job, TrialError
from tvm_lowrank.searching.measure.fleet import Fleet
from tvm_lowrank.searching.measure.remote import Board, Remote, free_boards
from tvm_lowrank.searching.measure.thermal import settle
from tvm_lowrank.targets.emulate import emulated
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.targets.toolchain import host_arch

pytestmark = pytest.mark.slow

PROFILE = load_profile("x86")
TARGET = PROFILE.tvm_target()
KEYS = count()
SETTINGS = {"compiler": "g++", "cool_down": 0.0, "patience": 60.0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(module, port, *options):
    """A process of its own group, for TVM's servers are two processes."""
    address = ("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1))
    command = [sys.executable, "-W", "ignore", "-m", f"tvm.exec.{module}", *address, *options]
    # not a checkout, which would hide the installed package
    return subprocess.Popen(command, cwd=sys.prefix, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def tracker():
    port = free_port()
    process = start("rpc_tracker", port)

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    yield port
    kill(process)


@contextmanager
def boards(tracker, number, *, wait=True):
    """(key, {address: process}) of running servers."""
    key = f"board{next(KEYS)}"
    options = ("--tracker", f"127.0.0.1:{tracker}", "--key", key)
    processes = {
        f"127.0.0.1:{port}": start("rpc_server", port, *options) for port in [free_port() for _ in range(number)]
    }
    try:
        if wait:
            wait_for(lambda: free_boards(Remote(key, port=tracker)) == number)
        yield key, processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                kill(process)


@pytest.fixture(scope="module")
def shared(tracker):
    """The key of a board that survives the tests."""
    with boards(tracker, 1) as (key, _):
        yield key


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A board with the server of tvm_lowrank, which survives crashes and can choose cores."""
    with emulated(host_arch(), cache_dir=tmp_path_factory.getbasetemp() / "devices") as board:
        yield board


@contextmanager
def fleet(tracker, key, *, threads=1, **options):
    made = Fleet(Remote(key, port=tracker, **{**SETTINGS, **options}), target=TARGET, threads=threads)
    with closing(made):
        yield made


@pytest.fixture(scope="module")
def net():
    return network(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 1))


@pytest.fixture(scope="module")
def lowered(net):
    return lower(canonical(net, (16, 8, 8)), batch=2, target=TARGET)


@pytest.fixture(scope="module")
def job(lowered):
    conv = next(k for k in kernels(lowered) if k.is_conv)
    return Job(conv.func, Tiling((1, 1, 4, 32), 16))


def time_once(bench, job):
    bench.forget()
    (handle,) = bench.build([job])
    return bench.time(handle, 0.01)


def test_numbers_are_those_of_this_machine(tracker, shared, tmp_path, lowered):
    executable = build(lowered, {}, TARGET)
    library = tmp_path / "model.so"
    executable.export_library(str(library))
    images = sample(5, 16, 8, 8)
    with fleet(tracker, shared) as made:
        outputs = made.run(library, images, batch=2)
        times = made.measure_interleaved({"one": library, "same": library}, images[:2], rounds=2, seconds=0.01)
        with pytest.raises(TrialError, match=r"broken: .*file too short"):
            (tmp_path / "broken.so").write_bytes(b"nothing")
            made.measure_interleaved({"broken": tmp_path / "broken.so"}, images[:2])
    for start_ in (0, 2):
        np.testing.assert_array_equal(outputs[start_ : start_ + 2], run(executable, images[start_ : start_ + 2]))
    assert outputs.shape[0] == 5
    assert {name: len(ms) for name, ms in times.items()} == {"one": 2, "same": 2}
    assert min(ms for values in times.values() for ms in values) > 0


class Dying:
    """A fleet that loses one board between two measurements of a kernel, when two boards are at work."""

    def __init__(self, made, processes):
        self.made, self.processes = made, processes
        self.began, self.killed = threading.Barrier(2), ""

    def each(self, tasks, work):
        seen = set()

        def watched(bench, task):
            if bench.board.name not in seen:
                seen.add(bench.board.name)
                if self.began.wait(60) == 0:
                    self.killed, timed = bench.board.name, bench.time
                    outcomes = iter([timed])

                    def dying(handle, seconds, limit=math.inf):
                        if next(outcomes, None) is None:
                            kill(self.processes[self.killed])
                        return timed(handle, seconds, limit)

                    bench.time = dying
            return work(bench, task)

        return self.made.each(tasks, watched)

    def close(self):
        self.made.close()


def test_two_boards_tune_at_once_and_one_may_die(tracker, tmp_path, lowered, capsys):
    wanted = kernels(lowered)
    with boards(tracker, 2) as (key, processes), fleet(tracker, key) as made:
        dying = Dying(made, processes)
        with LatencyOracle(PROFILE, cache_dir=tmp_path, trials=2, bench=dying) as oracle:
            latencies = oracle.measure(wanted)
    assert set(latencies) == {kernel.key for kernel in wanted}
    (path,) = tmp_path.rglob("*.jsonl")
    assert len(path.read_text().splitlines()) == len(latencies)  # every kernel once, none from the lost session
    assert f"board {dying.killed} was lost" in capsys.readouterr().err


def test_no_board_is_an_error_after_the_patience(tracker, tmp_path, lowered):
    with boards(tracker, 1) as (key, processes), fleet(tracker, key, patience=1) as made:
        done = []

        def progress(finished, total):
            done.append(finished)
            if finished == 1:
                kill(processes.popitem()[1])

        oracle = LatencyOracle(PROFILE, cache_dir=tmp_path, trials=1, bench=made)
        with pytest.raises(
            MeasurementError, match=f"lost .* and no board with key '{key}' is free .*gave up after 1 s"
        ):
            oracle.measure(kernels(lowered), progress)
        again = LatencyOracle(PROFILE, cache_dir=tmp_path, trials=1)
    assert done == [0, 1]
    assert sum(again.known(kernel.key) is not None for kernel in kernels(lowered)) >= 1


def test_board_that_starts_late_is_waited_for(tracker, job, capsys, monkeypatch):
    monkeypatch.setattr("tvm_lowrank.searching.measure.fleet.QUIET", 0.0)
    with boards(tracker, 1, wait=False) as (key, _), fleet(tracker, key, patience=60) as made:
        assert [min(samples) > 0 for samples in made.each([job], time_once)] == [True]
    message = capsys.readouterr().err
    assert f"start the RPC server on one (--tracker 127.0.0.1:{tracker} --key {key})" in message
    assert message.count("waiting up to 60 s") == 1


def test_tracker_that_is_not_there(job):
    with fleet(free_port(), "any", patience=0) as made, pytest.raises(MeasurementError, match="no RPC tracker answers"):
        list(made.each([job], time_once))


def test_session_that_expires_is_begun_again(tracker, shared, job, capsys):
    slow = iter([3.0])

    def work(bench, job):
        time.sleep(next(slow, 0))
        return time_once(bench, job)

    with fleet(tracker, shared, session_timeout=2) as made:
        assert [min(samples) > 0 for samples in made.each([job], work)] == [True]
    assert "session has expired" in capsys.readouterr().err


def test_board_that_hangs_is_left(tracker, job, monkeypatch, capsys):
    stopped = []

    def work(bench, job):
        if not stopped:
            bench.forget()
            stopped.append(bench.board.name)
            os.killpg(processes[bench.board.name].pid, signal.SIGSTOP)
        return time_once(bench, job)

    with boards(tracker, 2) as (key, processes), fleet(tracker, key) as made:
        monkeypatch.setattr(remote_module, "SEND_TIMEOUT", 3.0)
        assert len(list(made.each([job], work))) == 1
    assert f"board {stopped[0]} was lost (no answer within 3 s)" in capsys.readouterr().err


def test_what_was_called_off_ends_at_once(tracker, shared, job):
    class Enough(Exception):
        pass

    timed = threading.Event()

    def work(bench, task):
        if task == "first":
            return
        bench.forget()
        (handle,) = bench.build([job])
        while bench.time(handle, 1.0):
            timed.set()

    with fleet(tracker, shared) as made:
        with pytest.raises(Enough), closing(made.each(["first", "endless"], work)) as results:
            for _ in results:
                assert timed.wait(60)
                raise Enough
        assert threading.active_count() == 1
        made.close()
        assert not [child for child in psutil.Process().children() if "search.link" in " ".join(child.cmdline())]
        # and the fleet can be used again
        assert len(list(made.each([job], time_once))) == 1


def test_candidate_that_crashes_the_device_is_given_up(device, job):
    a = te.placeholder((64,), name="a")
    wild = te.compute((64,), lambda i: a[i + 2**40], name="b")
    crash = Job(tvm.IRModule({"main": te.create_prim_func([a, wild])}), None)

    def work(bench, jobs):
        bench.forget()
        outcomes = []
        for handle in bench.build(jobs):
            try:
                outcomes.append(min(bench.time(handle, 0.01)) > 0)
            except TrialError as error:
                outcomes.append(str(error))
        return outcomes

    with fleet(device.port, device.key) as made:
        (outcomes,) = made.each([[crash, job]], work)
    assert outcomes == ["the device was lost 3 times while it ran", True]
    assert all(known.failures == 0 for known in made.boards.values())


def test_what_cannot_be_linked_says_why(tracker, shared, tmp_path, lowered):
    wrong = {"options": ("-no-such-option",)}
    with fleet(tracker, shared, **wrong) as made, pytest.raises(TuningError, match="no-such-option"):
        LatencyOracle(PROFILE, cache_dir=tmp_path, trials=1, bench=made).measure(kernels(lowered))
    said = r"small matrix product: .*no-such-option"
    with fleet(tracker, shared, **wrong, cool_down=1) as made, pytest.raises(MeasurementError, match=said):
        list(made.each([0], time_once))


def test_cores_can_be_chosen(tracker, shared, device, job):
    with fleet(device.port, device.key, cores=(0,)) as made:
        list(made.each([job], time_once))
    (board,) = made.boards.values()
    assert board.info["pinned"]
    assert board.info["model"]
    with fleet(tracker, shared, cores=(0,)) as made, pytest.raises(UserError, match="cannot choose cores; start"):
        list(made.each([job], time_once))
    with pytest.raises(UserError, match="2 cores for 1 threads"):
        Fleet(Remote("any", cores=(0, 1), compiler="g++"), target=TARGET, threads=1)


def test_board_that_has_too_few_threads(device, job):
    with (
        fleet(device.port, device.key, threads=4096) as made,
        pytest.raises(UserError, match=r"threads, not 4096; start"),
    ):
        list(made.each([job], time_once))


def test_missing_compiler():
    with pytest.raises(UserError, match="no compiler riscv-g\\+\\+; install it"):
        Fleet(Remote("any", compiler="riscv-g++"), target=TARGET, threads=1)


@pytest.mark.parametrize(
    ("seconds", "pauses", "reference", "said"),
    [
        ([1.05], 0, 1.0, ""),
        ([0.9], 0, 0.9, ""),
        ([1.3, 1.2, 1.08], 2, 1.0, "30% slower"),
        ([1.3, 1.2, 1.2, 1.2], 3, 1.2, "going on all the same"),
    ],
)
def test_hot_board_is_left_to_cool_down(seconds, pauses, reference, said, capsys):
    board, paused, looks = Board("pi", reference=1.0), [], iter(seconds)
    settle(board, lambda: next(looks), limit=30.0, pause=paused.append)
    assert len(paused) == pauses
    assert board.reference == reference
    assert said in capsys.readouterr().err
    assert next(looks, None) is None


def test_hot_board_is_used_after_a_while(device, job, capsys):
    with fleet(device.port, device.key, cool_down=0.5) as made:
        list(made.each([job], time_once))
        (board,) = made.boards.values()
        board.reference /= 100
        assert len(list(made.each([job], time_once))) == 1
    assert "is still" in capsys.readouterr().err
