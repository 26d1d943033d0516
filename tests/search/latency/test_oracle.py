import json
import math
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
from torch import nn

from support.lowering_networks import canonical, expected, network, run, sample
from tvm_lowrank.codegen.lower import build, kernels, lower
from tvm_lowrank.codegen.schedule import Tiling, workload
from tvm_lowrank.errors import UserError
from tvm_lowrank.searching.latency.oracle import LatencyOracle, TuningError
from tvm_lowrank.searching.measure import local
from tvm_lowrank.searching.measure.bench import Job, TrialError
from tvm_lowrank.searching.measure.local import LocalBench, measure_interleaved
from tvm_lowrank.targets.profile import load_profile

PROFILE = load_profile("x86")
TARGET = PROFILE.tvm_target()


class FakeBench:
    """Runs nothing: a schedule takes as long as its channel tile is far from 32."""

    def __init__(self, broken=()):
        self.jobs, self.timed, self.broken = [], 0, broken

    def each(self, tasks, work):
        for task in tasks:
            yield work(self, task)

    def build(self, jobs):
        first = len(self.jobs)
        self.jobs += jobs
        failed = TrialError("cannot be built")
        return [failed if "build" in self.broken else first + i for i in range(len(jobs))]

    def time(self, handle, seconds, limit=math.inf):
        if "time" in self.broken:
            raise TrialError("cannot be run")
        self.timed += 1
        tiling = self.jobs[handle].tiling
        return [1e-3 * (1 + abs(32 - tiling.tile[-1]))] if tiling else [2e-3]

    def forget(self):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def net():
    return network(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2))


@pytest.fixture(scope="module")
def lowered(net):
    return lower(canonical(net, (16, 8, 8)), batch=1, target=TARGET)


def oracle(folder, bench, **options):
    return LatencyOracle(PROFILE, cache_dir=folder, trials=options.pop("trials", 6), bench=bench, **options)


def cache_file(folder):
    (path,) = folder.rglob("*.jsonl")
    return path


def test_second_run_measures_nothing(tmp_path, lowered):
    first, second = FakeBench(), FakeBench()
    latencies = oracle(tmp_path, first).measure(kernels(lowered))
    again = oracle(tmp_path, second)
    assert again.measure(kernels(lowered)) == latencies
    assert first.timed > 0
    assert second.timed == 0
    assert all(again.known(key) == latency for key, latency in latencies.items())


def test_the_fastest_schedule_is_chosen(tmp_path, lowered):
    asked = oracle(tmp_path, FakeBench())
    conv = next(k for k in kernels(lowered) if k.is_conv)
    asked.measure([conv])
    assert asked.database[conv.key].tile[-1] == 32


def test_trials_are_a_limit_and_all_different(tmp_path, lowered):
    bench = FakeBench()
    oracle(tmp_path, bench, trials=5).measure([next(k for k in kernels(lowered) if k.is_conv)])
    tilings = [job.tiling for job in bench.jobs]
    assert len(tilings) == len(set(tilings)) <= 5


def test_more_trials_are_worth_another_measurement(tmp_path, lowered):
    conv = next(k for k in kernels(lowered) if k.is_conv)
    oracle(tmp_path, FakeBench(), trials=3).measure([conv])
    more, fewer = FakeBench(), FakeBench()
    oracle(tmp_path, more, trials=8).measure([conv])
    oracle(tmp_path, fewer, trials=2).measure([conv])
    assert more.timed > 0
    assert fewer.timed == 0


def test_equal_kernels_are_tuned_once(tmp_path, lowered):
    conv = next(k for k in kernels(lowered) if k.is_conv)
    calls = []
    oracle(tmp_path, FakeBench()).measure([conv, conv], lambda done, total: calls.append((done, total)))
    assert calls == [(0, 1), (1, 1)]


def test_each_kernel_is_on_disk_when_the_next_starts(tmp_path, lowered):
    class Killed(FakeBench):
        def forget(self):
            if self.timed:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oracle(tmp_path, Killed()).measure(kernels(lowered))
    assert len(cache_file(tmp_path).read_text().splitlines()) == 1


def test_torn_last_line_is_ignored_and_replaced(tmp_path, lowered):
    oracle(tmp_path, FakeBench()).measure(kernels(lowered))
    path = cache_file(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    with pytest.warns(UserWarning, match="unfinished last line"):
        again = oracle(tmp_path, FakeBench())
        again.measure(kernels(lowered))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines]


@pytest.mark.parametrize("damage", [b"not json\n", b"{}\n", b"[]\n", b'{"key": 1}\n', b"\xff\n"])
def test_damaged_cache_is_an_error_before_any_work(tmp_path, lowered, damage):
    oracle(tmp_path, FakeBench()).measure(kernels(lowered))
    path = cache_file(tmp_path)
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(UserError, match="delete the file") as error:
        oracle(tmp_path, FakeBench())
    assert str(path) in str(error.value)


def test_two_oracles_share_a_cache(tmp_path, lowered):
    all_kernels = kernels(lowered)
    benches = [FakeBench(), FakeBench()]
    oracles = [oracle(tmp_path, bench) for bench in benches]
    threads = [threading.Thread(target=o.measure, args=(all_kernels,)) for o in oracles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = FakeBench()
    oracle(tmp_path, late).measure(all_kernels)
    assert late.timed == 0


def test_settings_that_change_the_code_have_their_own_cache(tmp_path, lowered):
    conv = [k for k in kernels(lowered) if k.is_conv][:1]
    oracle(tmp_path, FakeBench()).measure(conv)
    other = FakeBench()
    oracle(tmp_path, other, threads=2).measure(conv)
    assert other.timed > 0


@pytest.mark.parametrize(("step", "message"), [("build", "cannot be built"), ("time", "cannot be run")])
def test_kernel_that_never_works_is_an_error_with_the_reason(tmp_path, lowered, step, message):
    with pytest.raises(TuningError, match=message):
        oracle(tmp_path, FakeBench(broken=(step,))).measure(kernels(lowered))


@pytest.mark.slow
def test_tuned_library_computes_what_torch_does(tmp_path, net, lowered):
    with LatencyOracle(PROFILE, cache_dir=tmp_path, trials=2) as asked:
        latencies = asked.measure(kernels(lowered))
        library = build(lowered, asked.database, TARGET)
    assert all(0 < latency.p10 <= latency.ms <= latency.p90 for latency in latencies.values())
    x = sample(1, 16, 8, 8)
    np.testing.assert_allclose(run(library, x), expected(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_models_are_measured_in_turns(tmp_path, lowered):
    exported = tmp_path / "model.so"
    executable = build(lowered, {}, TARGET)
    executable.export_library(str(exported))
    x = sample(1, 16, 8, 8)
    times = measure_interleaved({"exported": exported, "compiled": executable}, x, rounds=2, seconds=0.01)
    assert {name: len(values) for name, values in times.items()} == {"exported": 2, "compiled": 2}
    assert min(ms for values in times.values() for ms in values) > 0
    with pytest.raises(TrialError, match="missing"):
        measure_interleaved({"missing": tmp_path / "missing.so"}, x, rounds=1)


@pytest.fixture
def bench():
    made = LocalBench(target=TARGET, threads=1, workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def job(lowered):
    conv = next(k for k in kernels(lowered) if k.is_conv)
    return Job(conv.func, Tiling((1, 1, 4, 32), 16))


@pytest.mark.slow
def test_worker_that_dies_is_replaced(bench, job):
    first, refused, second = bench.build([job, Job(job.func, Tiling((1, 1, 3, 32), 16)), job])
    assert "does not divide" in str(refused)
    (worker,) = bench.pool.workers
    worker.process.kill()
    worker.process.wait()
    assert isinstance(bench.build([job])[0], TrialError)
    # what was built before is built again where it is needed
    assert min(bench.time(first, 0.01) + bench.time(second, 0.01)) > 0
    assert worker.starts == 2


@pytest.mark.slow
def test_worker_that_hangs_is_stopped(bench, job, monkeypatch):
    (handle,) = bench.build([job])
    monkeypatch.setattr(local, "RUN_TIMEOUT", -1.5)
    with pytest.raises(TrialError, match="no answer"):
        bench.time(handle, 1.6)
    monkeypatch.undo()
    assert min(bench.time(handle, 0.01)) > 0


def test_tensor_intrinsics_are_not_imported(tmp_path, lowered):
    """They take 16 s to parse, in every process, and float32 code needs none."""
    conv = next(k for k in kernels(lowered) if k.is_conv)
    import tvm

    space = workload(conv.func)
    script = (
        "import sys, tvm\n"
        "from tvm_lowrank.searching.latency.oracle import LatencyOracle\n"
        "from tvm_lowrank.searching.measure.worker import Session\n"
        "source, target = sys.stdin.read().split('\\0')\n"
        f"tiling = dict(tile=(1, 1, 1, {space.spatial[-1]}), vector=16, channels_first=True, stripe=0)\n"
        "Session().build(0, source, tiling, target, 1)\n"
        "print('tvm.s_tir.tensor_intrin' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=tvm.ir.save_json(conv.func) + "\0" + tvm.ir.save_json(TARGET),
        capture_output=True,
        text=True,
        check=True,
        cwd=sys.prefix,  # not a checkout, which would hide the installed package
    )
    assert done.stdout.strip() == "False"


def test_patience_with_a_busy_machine_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in (("0", 0.0), ("2.5", 2.5)):
        monkeypatch.setenv("TVM_LOWRANK_PATIENCE", text)
        with closing(LocalBench(target=TARGET, threads=1, workers=1)) as bench:
            assert bench.patience == seconds
    for text in ("-1", "inf", "long"):
        monkeypatch.setenv("TVM_LOWRANK_PATIENCE", text)
        with pytest.raises(UserError, match=f"TVM_LOWRANK_PATIENCE='{text}' is no number of seconds"):
            LocalBench(target=TARGET, threads=1, workers=1)
