"""Bad input on the command line: one line that names the thing, exit code 2, before any long work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi

from support.command import Run
from tvm_lowrank import example
from tvm_lowrank.cli import app as cli
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.targets.profile import load_profile

MODEL = """
import torch
from torch import nn

class Odd(nn.Module):
    def forward(self, x):
        return torch.fft.fft(nn.functional.conv2d(x, torch.ones(4, 3, 3, 3))).real

def good():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *head)

def poisoned():
    net = good()
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    return net

def odd():
    return Odd()

def none():
    return None
"""


def test_a_process_ends_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tvm_lowrank.cli", "search", "--budget", "banana"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data, a full output folder and a torn cache."""
    root = tmp_path_factory.mktemp("cli")
    (root / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    arrays = {
        "calibration_x": rng.integers(0, 256, (4, 8, 8, 3), "uint8"),
        "selection_x": rng.integers(0, 256, (4, 8, 8, 3), "uint8"),
        "selection_y": np.arange(4),
        "evaluation_x": rng.integers(0, 256, (4, 8, 8, 3), "uint8"),
        "evaluation_y": np.arange(4),
    }
    np.savez(root / "good.npz", **arrays)
    np.savez(root / "labels.npz", **{**arrays, "selection_y": np.array([0, 1, 2, 10])})
    np.savez(root / "empty.npz", **{**arrays, "selection_x": arrays["selection_x"][:0], "selection_y": np.arange(0)})
    (root / "full").mkdir()
    (root / "full" / "file").write_text("precious")
    (root / "broken.onnx").write_bytes(b"not a model")
    return root


GOOD_MODEL = ("--model", "net.py:good", "--input-shape", "1,3,8,8")
GOOD = (*GOOD_MODEL, "--data", "good.npz")
CASES: dict[str, tuple[Sequence[str], str]] = {
    "budget word": (["--budget", "banana"], "banana"),
    "budget negative": (["--budget=-1%"], "-1%"),
    "latency": (["--max-latency", "5 minutes"], "5 minutes"),
    "latency and budget": (["--max-latency", "5ms", "--budget", "1%"], "--budget and --max-latency"),
    "latency and frontier": (["--max-latency", "5ms", "--frontier"], "leave one out"),
    "confident frontier": (["--frontier", "--confident"], "--confident needs a --budget"),
    "frontier without data": ([*GOOD_MODEL, "--frontier"], "--frontier without --data"),
    "target": (["--target", "z80"], "unknown target 'z80'"),
    "emulated host": (["--emulate"], "is this machine"),
    "tracker for the host": (["--rpc-tracker", "127.0.0.1:9190"], "is this machine"),
    "no tracker": (["--target", "arm"], "--emulate"),
    "tracker address": (["--target", "arm", "--rpc-tracker", "here"], "HOST:PORT"),
    "metric": (["--metric", "top7"], "top7"),
    "method": (["--methods", "spatial,svd9"], "svd9"),
    "trials": (["--trials", "0"], "--trials 0"),
    "threads": (["--threads", "0"], "--threads 0"),
    "time limit": (["--time-limit", "soon"], "soon"),
    "mean": (["--mean", "a,b"], "--mean"),
    "out is full": (["--out", "full"], "full is not empty"),
    "out without parent": (["--out", "no/such"], "does not exist"),
    "out is a file": (["--out", "net.py"], "is a file"),
    "model missing": (["--model", "absent.py:f", "--data", "good.npz", "--input-shape", "1,3,8,8"], "absent.py"),
    "factory missing": (["--model", "net.py:absent", "--data", "good.npz", "--input-shape", "1,3,8,8"], "absent"),
    "factory of nothing": (["--model", "net.py:none", "--data", "good.npz", "--input-shape", "1,3,8,8"], "none"),
    "no input shape": (["--model", "net.py:good", "--data", "good.npz"], "input shape"),
    "input shape": (["--model", "net.py:good", "--data", "good.npz", "--input-shape", "3,8"], "3, 8"),
    "wrong input shape": (["--model", "net.py:good", "--data", "good.npz", "--input-shape", "1,4,8,8"], "4x8x8"),
    "NaN": (["--model", "net.py:poisoned", "--data", "good.npz", "--input-shape", "1,3,8,8"], "0"),
    "operator": (["--model", "net.py:odd", "--data", "good.npz", "--input-shape", "1,3,8,8"], "fft"),
    "broken onnx": (["--model", "broken.onnx", "--data", "good.npz"], "broken.onnx"),
    "data without model": (["--data", "good.npz"], "--model"),
    "data missing": ([*GOOD_MODEL, "--data", "absent.npz"], "absent.npz"),
    "labels": ([*GOOD_MODEL, "--data", "labels.npz"], "10"),
    "empty split": ([*GOOD_MODEL, "--data", "empty.npz"], "selection"),
}


@pytest.mark.needs("aarch64-linux-gnu-g++")
@pytest.mark.parametrize("case", sorted(CASES))
def test_bad_input_is_one_line_and_exit_code_2(case: str, folder: Path, run: Run) -> None:
    arguments, named = CASES[case]
    before = sorted(folder.rglob("*"))
    done = run(
        "search", "--cache", "cache", *arguments, *(() if "--out" in arguments else ("--out", "out")), cwd=folder
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and named in last, done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "full" / "file").read_text() == "precious"
    created = {path.name for path in folder.rglob("*")} - {path.name for path in before}
    assert created <= {"out", "__pycache__", "net.cpython-311.pyc"} | {p.name for p in folder.glob("__pycache__/*")}


def test_corrupt_cache_is_named_before_long_work(folder: Path, run: Run) -> None:
    """A line that is not JSON, in the middle of the file where this search would look."""
    profile = load_profile("x86")
    with LatencyOracle(profile, cache_dir=folder / "bad-cache"):
        (file,) = (folder / "bad-cache").rglob("*.jsonl")
    file.write_text('{"key": \n{"also": "wrong"}\n')
    done = run("search", "--cache", "bad-cache", *GOOD, "--out", "out2", cwd=folder)
    assert done.returncode == 2 and file.name in done.stderr and "delete" in done.stderr, done.stderr
    assert file.read_text() == '{"key": \n{"also": "wrong"}\n'


def test_damaged_journal_is_named_and_kept(folder: Path, run: Run) -> None:
    out = folder / "journalled"
    out.mkdir(exist_ok=True)
    text = '{"kind": "run"\n' + json.dumps({"kind": "probe", "key": "conv1", "value": 1.0}) + "\n"
    (out / "journal.jsonl").write_text(text)
    done = run("search", "--cache", "cache", *GOOD, "--out", out, "--resume", cwd=folder)
    assert done.returncode == 2 and "line 1 is damaged" in done.stderr, done.stderr
    assert (out / "journal.jsonl").read_text() == text


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_no_bundle(command: str, folder: Path, run: Run) -> None:
    for directory in ("absent", "full"):
        done = run(command, directory, cwd=folder)
        assert done.returncode == 2 and directory in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_interrupted_within_tvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """TVM makes another error of what is raised in a callback."""
    monkeypatch.setattr(cli, "app", tvm_ffi.convert(lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "goes on with --resume" in capsys.readouterr().err.splitlines()[-1]


def test_help_names_every_command_and_teaches(folder: Path, run: Run) -> None:
    text = run("--help", cwd=folder).stdout
    assert all(command in text for command in ("search", "inspect", "bench", "verify"))
    assert "--resume" in run("search", "--help", cwd=folder).stdout


def test_example_data_is_what_its_page_says() -> None:
    data = example.data()
    assert data["calibration"].shape == (1000, 3, 32, 32)
    assert data["selection"][0].shape == (1000, 3, 32, 32) and data["evaluation"][0].shape == (2000, 3, 32, 32)
    assert sum(path.stat().st_size for path in example.HERE.glob("*.npz")) <= 16e6
