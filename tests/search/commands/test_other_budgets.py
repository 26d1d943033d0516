"""`search --max-latency` and `search --frontier` end to end, on a network that takes a fraction of a millisecond."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvm_lowrank
from support.command import Run
from tvm_lowrank.bundle.manifest import REQUIRED
from tvm_lowrank.errors import UserError
from tvm_lowrank.quantities import milliseconds
from tvm_lowrank.reference import load_object
from tvm_lowrank.searching.commands import frontier, libraries, within
from tvm_lowrank.searching.commands.frontier import pareto, thinned
from tvm_lowrank.searching.fit import reconstruct

MODEL = """
import torch
from torch import nn

def build():
    generator = torch.Generator().manual_seed(0)
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 64), (64, 64), (64, 64))]
    for conv in convs[1:]:
        weight = conv.weight.data
        low = torch.randn(64, 12, generator=generator) @ torch.randn(12, 576, generator=generator) / 12**0.5
        noise = torch.randn(64, 576, generator=generator)
        weight.copy_(((low + 0.7 * noise) / 24).reshape(weight.shape))
    convs[0].weight.data.copy_(torch.randn(64, 3, 3, 3, generator=generator) / 5)
    head = nn.Linear(64, 10)
    head.weight.data.copy_(torch.randn(10, 64, generator=generator))
    for layer in (*convs, head):
        layer.bias.data.zero_()
    body = [part for conv in convs for part in (conv, nn.ReLU())]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    with torch.no_grad():  # answers that depend on the image
        logits = net(nn.functional.interpolate(torch.randn(50, 3, 6, 6, generator=generator), size=24, mode="bilinear"))
        head.weight *= 4 / logits.std(dim=0, keepdim=True).T
        head.bias -= 4 * (logits / logits.std(dim=0)).mean(dim=0)
    return net
"""
SIZE, IMAGES = 24, 60
OPTIONS = ("--model", "net.py:build", "--input-shape", f"1,3,{SIZE},{SIZE}", "--methods", "channel", "--trials", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and images with its own answers as labels."""
    root = tmp_path_factory.mktemp("budgets")
    (root / "net.py").write_text(MODEL)
    model, arrays = load_object(f"{root / 'net.py'}:build")(), {}
    for seed, split in enumerate(("calibration", "selection", "evaluation")):
        small = torch.randn(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        x = torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear")
        with torch.no_grad():
            arrays |= {f"{split}_x": x.numpy(), f"{split}_y": model(x).argmax(1).numpy()}
    del arrays["calibration_y"]
    np.savez(root / "data.npz", **arrays)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconstructions of two passes, few rounds of measurements, few points of a frontier."""
    monkeypatch.setattr(reconstruct, "PASSES", 2)
    for module, name in ((libraries, "DENSE_ROUNDS"), (within, "ROUNDS"), (frontier, "ROUNDS")):
        monkeypatch.setattr(module, name, 4)
    monkeypatch.setattr(frontier, "STEP", 5.0)


def search(run: Run, folder: Path, *arguments: str, data: bool = True) -> Any:
    return run(
        "search", *OPTIONS, *(("--data", "data.npz") if data else ()), "--cache", "cache", *arguments, cwd=folder
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_most_accurate_within_a_latency(folder: Path, run: Run) -> None:
    impossible = search(run, folder, "--max-latency", "1us", "--out", "impossible")
    assert impossible.returncode == 2 and "more than --max-latency 0.001ms" in impossible.stderr.splitlines()[-1]
    journal = lines(folder / "impossible" / "journal.jsonl")
    assert not any(line["kind"] in ("probe", "evaluation", "look") for line in journal)
    dense, fastest = (next(line["value"] for line in journal if line["kind"] == kind) for kind in ("dense", "latency"))
    assert fastest < dense

    limit = math.sqrt(dense * fastest)
    arguments = ("--max-latency", f"{1e3 * limit:.1f}us", "--out", "within")
    for _ in range(4):  # a busy machine may be slower now than it was when it gave the limit
        done = search(run, folder, *arguments, "--force")
        if "more than --max-latency" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "within" / "manifest.json").read_text())
    assert set(manifest) >= set(REQUIRED) and manifest["budget"] is None
    assert (
        manifest["latency_ms"]["compressed"]["median"] <= manifest["max_latency_ms"] == pytest.approx(limit, rel=0.01)
    )
    assert any(site["method"] == "channel" for site in manifest["sites"]) and manifest["speedup"] > 1
    assert manifest["accuracy"]["looks"] == 1 and manifest["accuracy"]["drop"] < 60
    assert manifest["plans"] == [], "the selection split decides nothing here"
    assert run("verify", "within", cwd=folder).returncode == 0

    before = (folder / "within" / "journal.jsonl").read_text()
    (folder / "within" / "manifest.json").unlink()
    assert search(run, folder, *arguments, "--resume").returncode == 0
    assert (folder / "within" / "journal.jsonl").read_text() == before
    again = json.loads((folder / "within" / "manifest.json").read_text())
    assert [s["rank"] for s in again["sites"]] == [s["rank"] for s in manifest["sites"]]
    assert again["latency_ms"] == manifest["latency_ms"] and again["accuracy"] == manifest["accuracy"]


@pytest.mark.slow
def test_dense_is_delivered_where_it_is_fast_enough(folder: Path, run: Run) -> None:
    done = search(run, folder, "--max-latency", "10s", "--out", "slow", data=False)
    assert done.returncode == 0 and "is within 10000 ms" in done.stderr, done.stderr
    manifest = json.loads((folder / "slow" / "manifest.json").read_text())
    assert {site["method"] for site in manifest["sites"]} == {"dense"} and manifest["max_latency_ms"] == 10000
    assert manifest["accuracy"] is None and manifest["predicted_damage"] == 0


@pytest.mark.slow
def test_frontier(folder: Path, run: Run) -> None:
    arguments = ("--frontier", "--budget", "10%", "--out", "front")
    done = search(run, folder, *arguments)
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "front" / "frontier.json").read_text())
    rows = table["bundles"]
    assert 1 <= len(rows) <= 8 and [row["bundle"] for row in rows] == [str(n + 1) for n in range(len(rows))]
    times, drops = [row["ms"] for row in rows], [row["selection_drop"] for row in rows]
    assert times == sorted(times, reverse=True) and times[0] < table["dense"]["ms"]
    assert drops == sorted(drops) and drops[-1] <= 50
    assert table["looks"] == len(rows) and len(done.stdout.splitlines()) > len(rows)
    images, tried = np.load(folder / "data.npz")["evaluation_x"], []
    for row in rows:
        bundle = folder / "front" / row["bundle"]
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["budget"] is None and manifest["accuracy"]["looks"] == len(rows)
        assert manifest["latency_ms"]["compressed"]["median"] == row["ms"]
        plan = json.loads((bundle / "plan.json").read_text())
        assert row["selection_drop"] in [own["drop"] for own in manifest["plans"] if own["plan"] == plan]
        assert (bundle / "report.html").read_text().count("<svg") == 3
        tried.append(manifest["plans"])
        assert tvm_lowrank.load(bundle)(images[:3]).shape == (3, 10)
    assert run("verify", "front/1", cwd=folder).returncode == 0
    bench = run("bench", "front/1", "--rounds", "2", "--cache", "cache", cwd=folder)
    assert bench.returncode == 0 and "compressed" in bench.stdout, bench.stderr

    before = (folder / "front" / "journal.jsonl").read_text()
    evaluated = [line["value"] for line in map(json.loads, before.splitlines()) if line["kind"] == "evaluation"]
    assert all(own == tried[0] for own in tried) and len(tried[0]) > 1
    assert [(own["plan"], own["fit"]) for own in tried[0]] == [
        (own["plan"], own["fit"]) for own in evaluated if own["plan"]["sites"]
    ]
    assert max(Counter((line["kind"], line["key"]) for line in map(json.loads, before.splitlines())).values()) == 1
    (folder / "front" / "frontier.json").unlink()
    assert search(run, folder, *arguments, "--resume").returncode == 0
    assert (folder / "front" / "journal.jsonl").read_text() == before
    assert json.loads((folder / "front" / "frontier.json").read_text())["bundles"] == rows
    for row in rows:
        assert json.loads((folder / "front" / row["bundle"] / "manifest.json").read_text())["plans"] == tried[0]

    kernels = [line for path in (folder / "cache").rglob("kernels.jsonl") for line in lines(path)]
    assert max(Counter(line["key"] for line in kernels).values()) == 1


@pytest.mark.parametrize(
    ("text", "ms"), [("5ms", 5), ("800us", 0.8), ("800 µs", 0.8), ("0.005s", 5), ("5", 5), (".5ms", 0.5), ("2.s", 2000)]
)
def test_latencies_are_read(text: str, ms: float) -> None:
    assert milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "ms", "0", "0.0ms", "-5ms", "5m", "5 minutes", "1e3", "nan", "5ms 3us"])
def test_other_latencies_are_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-latency .* is not a time above 0"):
        milliseconds(text)


def test_pareto_keeps_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (2.0, 2.0), (2.5, 2.0), (1.0, 5.0), (3.5, 1.0), (1.0, 6.0)]
    assert pareto(points, lambda point: point) == [(3.0, 1.0), (2.0, 2.0), (1.0, 5.0)]
    assert pareto([], lambda point: point) == []


def test_thinned_keeps_the_ends_and_an_even_spread() -> None:
    sizes = [100.0, 99.0, 50.0, 49.0, 25.0, 12.0, 11.9, 6.0]
    assert len(thinned(sizes, float, 5)) == 5 and {100.0, 25.0, 6.0} <= set(thinned(sizes, float, 5))
    assert thinned(sizes, float, 3)[::2] == [100.0, 6.0]
    assert thinned(sizes, float, 8) == sizes and thinned([], float, 3) == []
