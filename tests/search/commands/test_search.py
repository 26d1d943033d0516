"""The main job on the real example, with small budgets: killed, resumed, verified, loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_lowrank
from tvm_lowrank import example
from tvm_lowrank.bundle.manifest import REQUIRED, SITE_KEYS
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.plan import Choice, Plan

pytestmark = pytest.mark.slow

MODEL = ("--model", "tvm_lowrank.example:model", "--input-shape", "1,3,32,32")
IMAGES = 120


# Python imports from the current folder first: in a checkout that would not be the installed package
def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tvm_lowrank.cli", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900, cwd=sys.prefix)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the example's data, as a .npz."""
    root = tmp_path_factory.mktemp("search")
    with np.load(example.HERE / "images.npz") as stored:
        small = {name: array[:IMAGES] for name, array in stored.items()}
    np.savez(root / "data.npz", **small)
    return root


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A search that is killed twice without warning, once early and once late, and resumed each time."""
    out, cache = folder / "out", folder / "cache"
    mean, std = (",".join(map(str, values)) for values in (example.MEAN, example.STD))
    search = (
        *("search", "--budget", "5%", *MODEL, "--data", folder / "data.npz", "--mean", mean, "--std", std),
        *("--methods", "channel", "--trials", "2", "--out", out, "--cache", cache, "--resume"),
    )
    for wanted in ("probe", "evaluation"):
        process = subprocess.Popen(
            command(*search), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=sys.prefix
        )
        deadline = time.monotonic() + 600
        while not any(line["kind"] == wanted for line in _whole_lines(out / "journal.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, "the search ended before it was killed"
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    done = run(*search)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that another process is writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_no_measurement_is_repeated(bundle: Path, folder: Path) -> None:
    entries = Counter((line["kind"], line["key"]) for line in lines(bundle / "journal.jsonl"))
    assert {kind for kind, _ in entries} >= {"run", "probe", "evaluation"}
    assert max(entries.values()) == 1
    kernels = Counter(
        line["key"] for path in (folder / "cache").rglob("*.jsonl") for line in lines(path) if "ms" in line
    )
    assert kernels and max(kernels.values()) == 1


def test_manifest_says_everything(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert set(manifest) >= set(REQUIRED)
    assert [site["id"] for site in manifest["sites"]] == [*(f"conv{i}" for i in range(1, 9)), "classifier"]
    for site in manifest["sites"]:
        assert set(site) >= set(SITE_KEYS)
        assert site["ms"] > 0 and site["macs"] <= site["dense_macs"] and site["reason"]
    accuracy, latency = manifest["accuracy"], manifest["latency_ms"]
    assert accuracy["n"] == IMAGES and accuracy["drop"] <= manifest["budget"] == 5
    assert accuracy["ci95"][0] <= accuracy["drop"] <= accuracy["ci95"][1]
    assert latency["how"] == "measured" and latency["threads"] == 1
    assert manifest["speedup"] == pytest.approx(latency["dense"]["median"] / latency["compressed"]["median"])
    became = {site["id"]: Choice.from_json(site) for site in manifest["sites"]}
    assert Plan({name: choice for name, choice in became.items() if choice != Choice()}) == Plan.of(
        bundle / "plan.json"
    )


def test_libraries_compute_what_torch_computes(bundle: Path) -> None:
    """The dense library equals the source model; the compressed one stays near it."""
    import torch

    images = example.data()["evaluation"][0][:16]
    with torch.no_grad():
        expected = example.model()(torch.from_numpy(images)).numpy()
    dense = tvm_lowrank.load(bundle, which="dense")
    formats = {site["dense_format"] for site in dense.manifest["sites"]}
    # each layer adds its rounding
    bound = 1e-4 if formats == {"float32"} else 10 * max(FORMATS[format].roundoff for format in formats)
    np.testing.assert_allclose(dense(images), expected, atol=bound * np.abs(expected).max())
    compressed = tvm_lowrank.load(bundle)(images)
    assert np.mean(compressed.argmax(1) == expected.argmax(1)) > 0.7


def test_verify_repeats_the_accuracy_and_notices_a_change(bundle: Path, tmp_path: Path) -> None:
    done = run("verify", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in bundle.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["accuracy"]["compressed"] += 1
    (changed / "manifest.json").write_text(json.dumps(manifest))
    assert run("verify", changed).returncode == 1


def test_bench_prints_both(bundle: Path) -> None:
    done = run("bench", bundle, "--rounds", "2")
    assert done.returncode == 0 and "dense" in done.stdout and "compressed" in done.stdout, done.stderr


def test_without_data_the_accuracy_is_not_claimed(folder: Path) -> None:
    out = folder / "blind"
    options = ("--methods", "spatial", "--trials", "2", "--out", out, "--cache", folder / "cache")
    done = run("search", "--budget", "2%", *MODEL, *options)
    assert done.returncode == 0, done.stderr
    assert "accuracy is not measured" in done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["accuracy"] is None and manifest["data"] is None and manifest["speedup"] > 1
    assert 0 < manifest["predicted_damage"] <= 0.02
    images, labels = (array[:200] for array in example.data()["evaluation"])
    model = tvm_lowrank.load(out)
    correct = [int(model(images[i : i + 1]).argmax()) == labels[i] for i in range(len(images))]
    assert np.mean(correct) > 0.85
    assert run("verify", out).returncode == 2


def test_finished_search_is_not_overwritten(bundle: Path, folder: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    done = run("search", *MODEL, "--data", folder / "data.npz", "--out", bundle)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert (bundle / "manifest.json").read_bytes() == before
