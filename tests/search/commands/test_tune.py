"""The database of measured kernels: carried to other machines, filled ahead of a search, and read as a profile."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tvm

from support.command import Done, Run
from tvm_lowrank.codegen.lower import LOWERING_VERSION
from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import ConvSpec
from tvm_lowrank.options import DEFAULT_METHODS, ProfileOptions
from tvm_lowrank.plan import Choice
from tvm_lowrank.precision import possible, with_formats
from tvm_lowrank.searching.candidates import candidates, site_macs
from tvm_lowrank.searching.commands import tune
from tvm_lowrank.searching.commands.inputs import Inputs
from tvm_lowrank.searching.latency.cache import Entry, KernelCache, Latency, exported
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.peaks import Peaks, measure_peaks
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.searching.measure.bench import TrialError
from tvm_lowrank.targets.profile import load_profile

PROFILE = load_profile("x86")
OTHER = 4  # a number of threads that no test tunes for
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    front = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2)]
    return nn.Sequential(*front, nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
ARGUMENTS = ("--model", "net.py:build", "--input-shape", "1,3,8,8", "--trials", "1")


class FakeBench:
    """Runs nothing: every kernel takes a millisecond."""

    def __init__(self, *, fails: bool = False, stops_after: float = math.inf) -> None:
        self.timed, self.fails, self.stops_after = 0, fails, stops_after

    def each(self, tasks: Sequence[Any], work: Callable[[Any, Any], Any]) -> Iterator[Any]:
        for task in tasks:
            yield work(self, task)

    def build(self, jobs: Sequence[Any]) -> list[int]:
        return [*range(len(jobs))]

    def time(self, handle: int, seconds: float, limit: float = math.inf) -> list[float]:
        if self.fails:
            raise TrialError("it burns")
        if self.timed >= self.stops_after:
            raise KeyboardInterrupt
        self.timed += 1
        return [1e-3]

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


def one_line_error(done: Done, *named: str) -> None:
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(name in done.stderr for name in named), done.stderr


def entry(key: str, *, trials: int = 4, ms: float = 1.0) -> Entry:
    conv = Convolution.from_json(
        {
            "spatial": [1, 8, 8, 16],
            "reduction": [3, 3, 16],
            "group": 16,
            "padded": True,
            "format": "float32",
            "units": [],
            "input_bytes": 4096,
        }
    )
    tiling = Tiling((1, 1, 4, 16), 16)
    return Entry(key, f"conv {key}", Latency(ms, ms, ms / 3 + ms), tiling, trials, conv, {tiling: ms})


def database(folder: Path, *entries: Entry, threads: int = 1) -> KernelCache:
    cache = KernelCache.open(folder, PROFILE, threads=threads)
    cache.merge(entries)
    return cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the cache that a profile of it has filled on this machine."""
    root = tmp_path_factory.mktemp("tune")
    (root / "net.py").write_text(MODEL)
    return root


@pytest.fixture(scope="module")
def profiled(folder: Path) -> dict[str, Any]:
    """The model's profile on this machine, as JSON."""
    asked = ProfileOptions(
        model=f"{folder / 'net.py'}:build",
        input_shape=(1, 3, 8, 8),
        trials=1,
        cache=folder / "cache",
        candidates=2,
        json=True,
    )
    with redirect_stdout(io.StringIO()) as printed:
        tune.profile(asked)
    document: dict[str, Any] = json.loads(printed.getvalue())
    return document


def measured_by_a_search(root: Path, cache: Path, count: int) -> int:
    """How often a search's dense network and first candidates have to be timed with this cache."""
    bench = FakeBench()
    mod = import_model(f"{root / 'net.py'}:build", input_shape=(1, 3, 8, 8))
    sites = find_sites(mod)
    with LatencyOracle(PROFILE, cache_dir=cache, trials=1, bench=bench) as oracle:
        times = SiteTimes(mod, sites, oracle, batch=1)
        dense = times.fastest_dense(lambda site: possible(site.spec, PROFILE.formats))
        times.measure_others(dense)
        rows = tune.timed_kernels(with_formats(mod, dense.formats), oracle, batch=1)
        asked = ProfileOptions(model="net.py:build", candidates=count)
        times.measure(tune.likeliest(sites, rows, dense, asked, lanes=PROFILE.lanes))
    return bench.timed


def test_profile_is_consistent(profiled: dict[str, Any]) -> None:
    rows, total, peaks = profiled["kernels"], profiled["total"], profiled["peaks"]
    assert [row["site"] for row in rows if row["site"]] == ["0", "2", "4", "7"]
    assert "max_pool" in " ".join(row["name"] for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1) and total["share"] == 1
    for name in ("ms", "macs", "bytes"):
        assert sum(row[name] for row in rows) == pytest.approx(total[name])
    assert rows[1]["macs"] == 8 * 8 * 16 * 3 * 9
    for row in (*rows, total):
        assert row["of_peak_gb_per_s"] > 0 and (row["of_peak_gflops"] > 0) == (row["macs"] > 0)
        assert row["gflops"] == pytest.approx(2e-6 * row["macs"] / row["ms"])
        arithmetic = sum(2e-6 * macs / peaks["gflops"][format] for format, macs in row["macs_by_format"].items())
        least = max(arithmetic, 1e-6 * row["bytes"] / peaks["gb_per_s"])
        assert row["ms_above_roofline"] == pytest.approx(row["ms"] - least)
    worst = profiled["most_worth_improving"]
    assert worst in rows and worst["ms_above_roofline"] == max(row["ms_above_roofline"] for row in rows)
    assert min(*peaks["gflops"].values(), peaks["gb_per_s"]) > 0 and profiled["how"] == "measured"


def test_a_search_finds_what_profile_tuned(folder: Path, profiled: dict[str, Any]) -> None:
    assert measured_by_a_search(folder, folder / "cache", 2) == 0


def test_export_and_import_carry_everything(folder: Path, profiled: dict[str, Any], tmp_path: Path, run: Run) -> None:
    here = KernelCache.open(folder / "cache", PROFILE, threads=1)
    done = run("tune", "--cache", folder / "cache", "--export", "kernels.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and f"{len(here.entries)} kernels exported" in done.stdout
    done = run("tune", "--cache", "there", "--import", "kernels.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and f"{len(here.entries)} kernels added, 0 kept" in done.stdout
    there = KernelCache.open(tmp_path / "there", PROFILE, threads=1)
    assert there.entries == here.entries and len(here.entries) > len(profiled["kernels"])
    assert measured_by_a_search(folder, tmp_path / "there", 2) == 0
    assert measured_by_a_search(folder, tmp_path / "elsewhere", 2) > 0
    described = run("tune", "--cache", "there", cwd=tmp_path).stdout
    assert str(there.path.name) in described and f"{len(here.entries)} kernels" in described
    assert "--export" in described and "--import" in described


def test_only_the_newest_entry_is_exported(tmp_path: Path, run: Run) -> None:
    cache = database(tmp_path, entry("a", trials=2), entry("b"))
    cache.add(entry("a", trials=8))
    assert len(cache.path.read_text().splitlines()) == 3
    assert run("tune", "--cache", tmp_path, "--export", "out.jsonl", cwd=tmp_path).returncode == 0
    header, *lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert {line["key"]: line["trials"] for line in lines} == {"a": 8, "b": 4}
    assert header == {
        "schema": 1,
        "target": PROFILE.key,
        "profile": "x86",
        "tvm": tvm.__version__,
        "lowering": LOWERING_VERSION,
        "threads": 1,
        "kernels": 2,
    }


def test_import_keeps_entries_of_as_many_trials(tmp_path: Path, run: Run) -> None:
    database(tmp_path, *(entry(key, trials=4, ms=1.0) for key in ("fewer", "equal", "more")))
    news = [entry("fewer", trials=3), entry("equal", trials=4), entry("more", trials=5), entry("new", trials=1)]
    text = exported([replace(e, latency=Latency(2.0, 2.0, 2.0)) for e in news], PROFILE, threads=1)
    (tmp_path / "in.jsonl").write_text(text)
    done = run("tune", "--cache", tmp_path, "--import", "in.jsonl", cwd=tmp_path)
    assert done.stdout.startswith("2 kernels added, 2 kept"), done
    found = KernelCache.open(tmp_path, PROFILE, threads=1).entries
    assert {key: e.latency.ms for key, e in found.items()} == {"fewer": 1, "equal": 1, "more": 2, "new": 2}
    assert run("tune", "--cache", tmp_path, "--import", "in.jsonl", cwd=tmp_path).stdout.startswith("0 kernels added")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"threads": 2}, ["--threads 2, not 1", "import it with --threads 2"]),
        ({"tvm": "0.1"}, ["TVM 0.1", tvm.__version__, "tvm_lowrank profile --target x86"]),
        ({"lowering": 99}, ["lowering version 99", "tvm_lowrank profile"]),
        ({"target": "x86-llvm-z80"}, ["another processor", "x86-llvm-z80", "tvm_lowrank profile"]),
        ({"target": "rpi4-llvm", "profile": "rpi4"}, ["for target rpi4, not x86", "--target"]),
        ({"target": replace(PROFILE, emulated=True).key}, ["emulated", "--emulate"]),
        ({"schema": 2}, ["schema 2"]),
        ({"kernels": 3}, ["2 of 3 kernels"]),
    ],
)
def test_files_for_other_settings_are_refused(
    changed: dict[str, Any], named: list[str], tmp_path: Path, run: Run
) -> None:
    cache = database(tmp_path, entry("a"))
    before = cache.path.read_bytes()
    header, *lines = exported([entry("b"), entry("c")], PROFILE, threads=1).splitlines()
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps({**json.loads(header), **changed}), *lines]) + "\n")
    one_line_error(run("tune", "--cache", tmp_path, "--import", "in.jsonl", cwd=tmp_path), "in.jsonl", *named)
    assert cache.path.read_bytes() == before


WHOLE = exported([entry("b"), entry("c"), entry("d")], PROFILE, threads=1)
DAMAGED = {
    "empty": ("", "not an exported database"),
    "no header": (WHOLE.split("\n", 1)[1], "not an exported database"),
    "header without a field": (WHOLE.replace('"lowering"', '"lowing"'), "not an exported database"),
    "another kind of file": ("PK\x03\x04\n\x00", "not an exported database"),
    "another kind of JSON": ("[1, 2]\n", "not an exported database"),
    "cut in a line": (WHOLE[:-40], "line 4 of in.jsonl is damaged"),
    "cut between lines": (WHOLE[: WHOLE.index('{"key": "d"')], "2 of 3 kernels"),
    "a line of something else": (WHOLE.replace('{"key": "c"', '{"kex": "c"'), "line 3 of in.jsonl is damaged"),
    "text for a number": (WHOLE.replace('"trials": 4', '"trials": "x"', 1), "line 2 of in.jsonl is damaged"),
    "no trials": (WHOLE.replace('"trials": 4', '"trials": 0', 1), "line 2 of in.jsonl is damaged"),
    "no time": (WHOLE.replace('"ms": 1.0', '"ms": 0.0', 1), "line 2 of in.jsonl is damaged"),
    "no number": (WHOLE.replace('"ms": 1.0', '"ms": NaN', 1), "line 2 of in.jsonl is damaged"),
    "infinite tile": (WHOLE.replace("[1, 1, 4, 16]", "[1, 1, Infinity, 16]", 1), "line 2 of in.jsonl is damaged"),
    "a kernel twice": (WHOLE.replace('"key": "c"', '"key": "b"'), "line 3 of in.jsonl is damaged"),
}


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_damaged_files_change_nothing(case: str, tmp_path: Path, run: Run) -> None:
    text, named = DAMAGED[case]
    cache = database(tmp_path, entry("a"))
    before = cache.path.read_bytes()
    (tmp_path / "in.jsonl").write_text(text)
    one_line_error(run("tune", "--cache", tmp_path, "--import", "in.jsonl", cwd=tmp_path), named)
    assert cache.path.read_bytes() == before


def test_two_processes_that_import_at_once_lose_nothing(tmp_path: Path) -> None:
    """While this one measures, and opened the database before them."""
    count, cache = 300, database(tmp_path / "cache")
    context = multiprocessing.get_context("fork")  # a new process would import TVM for seconds
    ready = context.Barrier(3)

    def import_file(path: Path) -> None:
        ready.wait(60)
        tune.tune("x86", cache_dir=tmp_path / "cache", import_from=path)

    processes = []
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        own = [entry(f"{name}{i}") for i in range(count)]
        path.write_text(exported([*own, entry("shared")], PROFILE, threads=1))
        processes.append(context.Process(target=import_file, args=(path,)))
        processes[-1].start()
    ready.wait(60)
    mine = 0
    while mine < 5 or any(process.is_alive() for process in processes):
        cache.add(entry(f"mine{mine}"))
        mine += 1
    assert [process.exitcode for process in processes] == [0, 0]
    keys = Counter(json.loads(line)["key"] for line in cache.path.read_text().splitlines())
    expected = {f"{name}{i}" for name in "ab" for i in range(count)} | {f"mine{i}" for i in range(mine)}
    assert set(keys) == expected | {"shared"} and max(keys.values()) == 1
    cache.refresh()
    assert set(cache.entries) == set(keys)


def test_an_import_follows_a_torn_line(tmp_path: Path) -> None:
    cache = database(tmp_path, entry("a"))
    with cache.path.open("ab") as file:
        file.write(b'{"key": "tor')
    with pytest.warns(UserWarning, match="unfinished last line"):
        assert cache.merge([entry("b")]) == 1
    assert [json.loads(line)["key"] for line in cache.path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tune", "--export", "a", "--import", "b"], ["--export", "--import"]),
        (["tune", "--import", "absent.jsonl"], ["absent.jsonl"]),
        (["tune", "--import", "."], ["cannot read ."]),
        (["tune", "--export", "taken/file"], ["cannot write taken/file: File exists"]),
        (
            ["tune", "--export", "empty.jsonl", "--threads", str(OTHER)],
            [f"tvm_lowrank profile --target x86 --threads {OTHER}"],
        ),
        (["tune", "--target", "z80"], ["unknown target 'z80'"]),
        (["tune", "--threads", "0"], ["--threads 0"]),
        (["tune", "--emulate"], ["is this machine"]),
        (["profile", "--emulate"], ["is this machine"]),
        (["profile", "--trials", "0"], ["--trials 0"]),
        (["profile", "--batch", "0"], ["--batch 0"]),
        (["profile", "--candidates", "-1"], ["--candidates -1"]),
        (["profile", "--methods", "svd9"], ["svd9"]),
        (["profile", "--model", "absent.py:f", "--input-shape", "1,3,8,8"], ["absent.py"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: list[str], tmp_path: Path, run: Run) -> None:
    database(tmp_path / "cache", entry("a"))
    (tmp_path / "taken").write_text("no folder")
    one_line_error(run(*arguments, "--cache", "cache", cwd=tmp_path), *named)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "taken"}


def test_the_database_is_not_exported_onto_itself(tmp_path: Path) -> None:
    cache = database(tmp_path, entry("a"))
    with pytest.raises(UserError, match="another file"):
        tune.tune("x86", cache_dir=tmp_path, export_to=cache.path)
    assert KernelCache.open(tmp_path, PROFILE, threads=1).entries == cache.entries


def test_emulated_devices_have_a_database_of_their_own(tmp_path: Path, run: Run) -> None:
    arm = replace(load_profile("arm"), emulated=True)
    KernelCache.open(tmp_path, arm, threads=1).merge([entry("a")])
    assert "1 kernels" in run("tune", "--target", "arm", "--emulate", "--cache", tmp_path, cwd=tmp_path).stdout
    assert "no kernels" in run("tune", "--target", "arm", "--cache", tmp_path, cwd=tmp_path).stdout


def faked(monkeypatch: pytest.MonkeyPatch, cache: Path, bench: FakeBench) -> None:
    """Let `profile` measure with a bench that runs nothing."""

    @contextmanager
    def opened(inputs: Inputs) -> Iterator[Any]:
        asked, profile = inputs.asked, inputs.profile
        oracle = LatencyOracle(profile, cache_dir=cache, trials=asked.trials, bench=bench)
        times = SiteTimes(inputs.mod, inputs.sites, oracle, batch=asked.batch)
        yield SimpleNamespace(devices=bench, profile=profile, how="measured"), oracle, times

    monkeypatch.setattr(tune, "opened", opened)


def test_profile_prints_a_table(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, tmp_path, FakeBench())
    done = run("profile", *ARGUMENTS, "--candidates", "0", cwd=folder)
    assert done.returncode == 0, done.stderr
    title, _, columns, *rows = done.stdout.splitlines()
    assert title.split()[:3] == ["net.py:build", "on", "x86,"]
    assert columns.split()[:3] == ["kernel", "format", "ms"]
    names = [row.split()[0] for row in rows if row.startswith("  ") and row.strip()]
    assert [name for name in names if name.isdigit()] == ["0", "2", "4", "7"] and names[-1] == "total"
    assert rows[-1].startswith("most worth improving: ") and "peaks of the device" in rows[-2]


def test_interrupted_profile_goes_on(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped, rest = FakeBench(), FakeBench(stops_after=60), FakeBench()
    faked(monkeypatch, tmp_path / "whole", whole)
    run("profile", *ARGUMENTS, cwd=folder)
    faked(monkeypatch, tmp_path / "parts", stopped)
    done = run("profile", *ARGUMENTS, cwd=folder)
    assert done.returncode == 130 and "what was measured is kept" in done.stderr.splitlines()[-1]
    kept = set(KernelCache.open(tmp_path / "parts", PROFILE, threads=1).entries)
    assert kept
    faked(monkeypatch, tmp_path / "parts", rest)
    assert run("profile", *ARGUMENTS, cwd=folder).returncode == 0
    caches = [KernelCache.open(tmp_path / name, PROFILE, threads=1).entries for name in ("whole", "parts")]
    assert set(caches[0]) == set(caches[1]) > kept
    assert rest.timed < whole.timed


def test_peaks_that_cannot_be_measured_are_an_error() -> None:
    with pytest.raises(MeasurementError, match="it burns"):
        measure_peaks(FakeBench(fails=True), PROFILE, ["float32"], threads=1)


def test_roofline() -> None:
    peaks = Peaks(gflops={"float32": 100.0, "bfloat16": 200.0}, gb_per_s=10.0)
    assert peaks.ms(products={"float32": 10**9}, moved=1e6) == pytest.approx(20)
    assert peaks.ms(products={"float32": 10**9, "bfloat16": 10**9}, moved=1e6) == pytest.approx(30)
    assert peaks.ms(products={"float32": 10**6}, moved=1e9) == pytest.approx(100)


def site(name: str, channels: int) -> Site:
    spec = ConvSpec(channels, channels, (3, 3), padding=(1, 1, 1, 1))
    return Site(name, spec, (8, 8), None, None)  # type: ignore[arg-type]


def test_candidates_are_spread_over_sites_and_macs() -> None:
    sites = [site("slow", 256), site("fast", 64), site("left alone", 4)]
    options = {s.id: candidates(s, methods=DEFAULT_METHODS, lanes=16) for s in sites}
    assert not options["left alone"]
    chosen = tune.spread(sites, options, 11)
    assert chosen == tune.spread(sites, options, 11) and len(set(chosen)) == 11
    assert [name for name, _ in chosen] == ["slow"] * 6 + ["fast"] * 5
    every = sorted(site_macs(sites[0], choice) for choice in options["slow"])
    macs = [site_macs(sites[0], choice) for name, choice in chosen if name == "slow"]
    gaps = [after - before for before, after in pairwise(macs)]
    even = (every[-1] - every[0]) / 6
    assert all(0.5 * even < gap < 1.5 * even for gap in gaps)
    assert len({choice.method for _, choice in chosen}) > 2


def test_more_candidates_than_there_are() -> None:
    sites = [site("a", 64)]
    few: dict[str, list[Choice]] = {"a": candidates(sites[0], methods=["spatial"], lanes=16)}
    assert {choice for _, choice in tune.spread(sites, few, 1000)} == set(few["a"])
    assert tune.spread(sites, {"a": []}, 10) == [] and tune.spread(sites, few, 0) == []
