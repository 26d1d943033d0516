"""A search that trains with labels: after one without, in stages, by several workers, and interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.labelled_network import NETWORK

pytestmark = pytest.mark.slow

JOURNAL, MANIFEST = "journal.jsonl", "manifest.json"
SEARCH = (
    *("search", "--budget", "5%", "--model", "net.py:model", "--input-shape", "1,3,16,16", "--data", "net.py:data"),
    *("--methods", "channel", "--trials", "1", "--cache", "cache"),
)
LABELS = ("--finetune", "net.py:training", "--epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetuned")
    (root / "net.py").write_text(NETWORK.replace('os.environ["EPOCHS"]', '"epochs"'))
    return root


def start(folder: Path, *arguments: str, workers: int = 1) -> subprocess.Popen[str]:
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m") if workers > 1 else ()
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "tvm_lowrank.cli", *SEARCH, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def search(folder: Path, *arguments: str, workers: int = 1) -> subprocess.CompletedProcess[str]:
    process = start(folder, *arguments, workers=workers)
    out, said = process.communicate(timeout=600)
    assert "Traceback" not in said, said
    return subprocess.CompletedProcess([], process.returncode, out, said)


def entries(folder: Path, out: str, kind: str) -> list[dict[str, Any]]:
    path = folder / out / JOURNAL
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in found if line["kind"] == kind]


def manifest(folder: Path, out: str) -> dict[str, Any]:
    return json.loads((folder / out / MANIFEST).read_text())


@pytest.fixture(scope="module")
def without(folder: Path) -> dict[str, Any]:
    """The manifest of a search without labels, in `out`."""
    done = search(folder, "--out", "out")
    assert done.returncode == 0, done.stderr
    return manifest(folder, "out")


def test_labels_go_on_where_a_search_without_ended(folder: Path, without: dict[str, Any]) -> None:
    before = entries(folder, "out", "evaluation")
    done = search(folder, "--out", "out", "--resume", *LABELS, "--stages", "2")
    assert done.returncode == 0, done.stderr
    assert "stage 1 of 2: " in done.stderr and "stage 2 of 2: " in done.stderr
    after = entries(folder, "out", "evaluation")
    assert after[: len(before)] == before
    assert all(line["key"].startswith("finetuned") for line in after[len(before) :]) and len(after) > len(before)
    found = manifest(folder, "out")
    assert found["accuracy"]["looks"] >= without["accuracy"]["looks"] and found["accuracy"]["drop"] <= 5
    plans, earlier = ([{**own, "expected": None} for own in each["plans"]] for each in (found, without))
    assert plans[: len(earlier)] == earlier and {own["fit"] for own in plans[len(earlier) :]} == {"finetuned"}
    assert (folder / "out" / "report.html").read_text().count("<svg") == 3
    for kind in ("run", "probe", "plan", "evaluation", "look"):
        assert max(Counter(line["key"] for line in entries(folder, "out", kind)).values()) == 1
    again = search(folder, "--out", "out", "--resume", *LABELS, "--stages", "2")
    assert again.returncode == 0 and "nothing is repeated" in again.stderr


def test_two_workers_share_the_training(folder: Path, without: dict[str, Any]) -> None:
    done = search(folder, "--out", "two", *LABELS, workers=2)
    assert done.returncode == 0, done.stderr
    trained = sum(line["key"].startswith("finetuned") for line in entries(folder, "two", "evaluation"))
    assert done.stderr.count("epoch 1 of 1") == trained > 0
    assert done.stdout.count("bundle: two") == 1
    assert manifest(folder, "two")["accuracy"]["drop"] <= 5


def test_workers_without_training(folder: Path) -> None:
    process = start(folder, "--out", "idle", workers=2)
    _, said = process.communicate(timeout=600)  # torchrun itself ends with a traceback
    assert process.returncode != 0 and "2 workers, but nothing to share; give --finetune" in said


def test_an_interrupted_search_says_how_to_go_on(folder: Path) -> None:
    process, deadline = start(folder, "--out", "interrupted"), time.monotonic() + 300
    while not entries(folder, "interrupted", "probe"):
        assert process.poll() is None and time.monotonic() < deadline, "the search ended before it was interrupted"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1].endswith("a search goes on with --resume"), said
    assert "Traceback" not in said
