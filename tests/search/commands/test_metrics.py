"""Searches by metrics of a whole split, of masks, pictures and boxes, and by ones that need no labels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tvm_lowrank
from support.command import Run
from tvm_lowrank.bundle.verify import print_manifest, verify
from tvm_lowrank.data.parts import objects
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.commands.deliver import _once
from tvm_lowrank.searching.fit import reconstruct
from tvm_lowrank.searching.journal import Journal, check_unused

SIZE, COUNT = 16, 80


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "PASSES", 2)


def images(seed: int, count: int = COUNT) -> np.ndarray:
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=SIZE, mode="bilinear").numpy()


def layer(wide: int, out: int) -> nn.Conv2d:
    """Of low rank, but for a little."""
    conv = nn.Conv2d(wide, out, 3, padding=1)
    u, _, v = torch.linalg.svd(torch.randn(out, wide * 9), full_matrices=False)
    values = torch.exp(-torch.arange(out) / 6)
    conv.weight.data = (u * values @ v * (2 * out / values.square().sum()) ** 0.5).view_as(conv.weight)
    conv.bias.data.zero_()  # type: ignore[union-attr]
    return conv


def body(end: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 64, 3, padding=1), layer(64, 64), layer(64, 64)]
    return nn.Sequential(*(own for part in parts for own in (part, nn.ReLU())), nn.Conv2d(64, end, 1)).eval()


def segmenter() -> nn.Module:
    """Scores of five classes for each pixel, each of which wins in a fifth of them."""
    net = body(5)
    with torch.no_grad():
        scores = net(torch.from_numpy(images(9)))
        net[-1].weight.mul_(3 / scores.std()), net[-1].bias.zero_()  # type: ignore[operator, union-attr]
        net[-1].bias.sub_(net(torch.from_numpy(images(9))).mean(dim=(0, 2, 3)))  # type: ignore[operator, union-attr]
    return net


def painter() -> nn.Module:
    """A picture of the same size, mostly from 0 to 1."""
    net = body(3)
    with torch.no_grad():
        made = net(torch.from_numpy(images(9)))
        net[-1].weight.mul_(0.2 / made.std()), net[-1].bias.zero_()  # type: ignore[operator, union-attr]
        net[-1].bias.add_(0.5)  # type: ignore[operator, union-attr]
    return net


def answered(net: nn.Module, of: Any) -> dict[str, Any]:
    splits: dict[str, Any] = {"calibration": images(0)}
    for seed, name in enumerate(("selection", "evaluation"), start=1):
        x = images(seed)
        with torch.no_grad():
            splits[name] = (x, of(net(torch.from_numpy(x)), seed))
    return splits


def masks(outputs: torch.Tensor, seed: int) -> np.ndarray:
    """The network's own masks, of which some pixels are other ones, and some do not count."""
    found = outputs.argmax(1).numpy().astype("uint8")
    drawn = np.random.default_rng(seed).random(found.shape)
    return np.where(drawn < 0.05, (found + 1) % 5, np.where(drawn < 0.1, 255, found)).astype("uint8")


def noisy(outputs: torch.Tensor, seed: int) -> np.ndarray:
    return outputs.numpy() + np.random.default_rng(seed).normal(0, 0.03, outputs.shape).astype("float32")


OPTIONS: dict[str, Any] = {"methods": ("channel",), "precision": "float32", "trials": 1}
SHAPE = (1, 3, SIZE, SIZE)


@pytest.mark.slow
def test_mean_iou_of_masks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = segmenter()
    splits = answered(net, masks)
    arrays = {f"{name}_{axis}": splits[name][i] for name in ("selection", "evaluation") for i, axis in enumerate("xy")}
    np.savez(tmp_path / "data.npz", calibration_x=splits["calibration"], **arrays)
    out, cache = tmp_path / "out", tmp_path / "cache"
    asked = {"data": tmp_path / "data.npz", "metric": "mean-iou", "budget": 3.0, "out": out, "cache": cache}
    manifest = tvm_lowrank.search(model=net, input_shape=SHAPE, **asked, **OPTIONS)
    accuracy = manifest["accuracy"]
    assert (accuracy["metric"], accuracy["unit"]) == ("mean-iou", "points")
    assert 85 < accuracy["dense"] < 95 and accuracy["drop"] <= 3
    low, high = accuracy["ci95"]
    assert low <= accuracy["drop"] <= high and 0 < high - low < 4
    assert any(site["method"] == "channel" for site in manifest["sites"]) and manifest["speedup"] > 1
    for plan in manifest["plans"]:
        assert 0 < plan["error"] < 2 and plan["drop"] < 60
    assert verify(out).ok
    capfd.readouterr()
    print_manifest(manifest)
    assert "accuracy (mean-iou, %)" in capfd.readouterr().out

    before = (out / "journal.jsonl").read_text()
    (out / "manifest.json").unlink()
    again = tvm_lowrank.search(model=net, input_shape=SHAPE, **asked, **OPTIONS, resume=True)
    assert (out / "journal.jsonl").read_text() == before, "nothing is looked at again"
    assert again["accuracy"] == accuracy and again["plans"] == manifest["plans"]


@pytest.mark.slow
def test_psnr_with_a_budget_in_decibels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = painter()
    splits, out, cache = answered(net, noisy), tmp_path / "out", tmp_path / "cache"
    asked = {"data": splits, "metric": "psnr", "out": out, "cache": cache, "output": "regression"}
    manifest = tvm_lowrank.search(model=net, input_shape=SHAPE, **asked, budget="0.5 dB", **OPTIONS)
    accuracy = manifest["accuracy"]
    assert (accuracy["metric"], accuracy["unit"], manifest["budget"]) == ("psnr", "dB", 0.5)
    assert accuracy["dense"] == pytest.approx(-20 * np.log10(0.03), abs=0.2)
    assert accuracy["drop"] == pytest.approx(accuracy["dense"] - accuracy["compressed"]) and accuracy["drop"] <= 0.5
    assert verify(out, data=splits).ok
    said = capfd.readouterr().err
    assert " dB, expected " in said and "points" not in said
    print_manifest(manifest)
    report = (out / "report.html").read_text()
    assert "accuracy (psnr, dB)" in capfd.readouterr().out
    assert "dB of psnr" in report and "The budget was 0.5 dB." in report and "drop, dB" in report
    assert "points of" not in report


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "budget"), [("agreement", 3.0), ("relative-error", 8.0)])
def test_without_labels(tmp_path: Path, metric: str, budget: float) -> None:
    """Neither split has any; the dense network, whatever it answers, is right."""
    net = segmenter()
    np.savez(
        tmp_path / "data.npz", **{f"{n}_x": images(i) for i, n in enumerate(("calibration", "selection", "evaluation"))}
    )
    asked = {"data": tmp_path / "data.npz", "metric": metric, "budget": budget, "out": tmp_path / "out"}
    manifest = tvm_lowrank.search(model=net, input_shape=SHAPE, **asked, cache=tmp_path / "cache", **OPTIONS)
    accuracy = manifest["accuracy"]
    assert accuracy["dense"] == (100 if metric == "agreement" else 0) and 0 < accuracy["drop"] <= budget
    assert abs(accuracy["dense"] - accuracy["compressed"]) == pytest.approx(accuracy["drop"])
    assert verify(tmp_path / "out").ok
    x = images(2)
    with torch.no_grad():
        dense = net(torch.from_numpy(x)).numpy()
    got = tvm_lowrank.load(tmp_path / "out")(x)
    error = np.sqrt(np.square(got - dense).sum() / np.square(dense).sum())
    wanted = 1 - (got.argmax(1) == dense.argmax(1)).mean() if metric == "agreement" else error
    assert accuracy["drop"] == pytest.approx(100 * wanted, rel=1e-3)


METRIC = """
import numpy as np

def decode(outputs):
    '''Each channel's brightest pixel as a box of three pixels.'''
    found = []
    for scores in outputs:
        places = [np.unravel_index(own.argmax(), own.shape) for own in scores]
        boxes = [[x - 1, y - 1, x + 2, y + 2] for y, x in places]
        found.append({"boxes": boxes, "labels": range(5), "scores": scores.max((1, 2))})
    return found

def whole(outputs, targets):
    '''How often the brightest pixel is in the box.'''
    hits = 0
    for own, target in zip(decode(outputs), targets):
        hits += sum(abs(np.subtract(a, b)).max() < 1 for a, b in zip(own["boxes"], target["boxes"]))
    return hits / (5 * len(targets))

def wrong(outputs, targets):
    return float("nan")

def late(outputs, targets):
    return 1.0 if len(targets) < 70 else float("nan")
"""


def boxes(outputs: torch.Tensor, seed: int) -> list[dict[str, Any]]:
    import importlib.util

    spec = importlib.util.spec_from_loader("metric", None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(METRIC, module.__dict__)
    return [{"boxes": np.array(own["boxes"]), "labels": np.arange(5)} for own in module.decode(outputs.numpy())]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["voc-map:{}:decode", "{}:whole"])
def test_boxes_in_lists(tmp_path: Path, metric: str) -> None:
    """A plan of one's own; the bundle says what it lost, and the same is measured again."""
    (tmp_path / "metric.py").write_text(METRIC)
    net, name = segmenter(), metric.format(tmp_path / "metric.py")
    splits, out = answered(net, boxes), tmp_path / "out"
    names = [site.id for site in sites_of(net)]
    plan = {names[1]: Choice("channel", 8)}
    manifest = tvm_lowrank.decompose(
        model=net, input_shape=SHAPE, data=splits, metric=name, plan=plan, trials=1, out=out, cache=tmp_path / "cache"
    )
    accuracy = manifest["accuracy"]
    assert accuracy["metric"] == name and accuracy["dense"] == pytest.approx(100, abs=1.5)
    assert 0 < accuracy["drop"] < 100 and accuracy["ci95"][0] < accuracy["drop"] < accuracy["ci95"][1]
    again = verify(out, data=splits)
    assert again.ok and again.ci95 == pytest.approx(accuracy["ci95"])


def sites_of(net: nn.Module) -> Any:
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.importers.importer import import_model

    return find_sites(import_model(net, input_shape=SHAPE))


@pytest.mark.parametrize(("rows", "times"), [(np.eye(3), 1), (np.arange(3), 1), (objects([(1,), "a", None]), 2)])
def test_rows_that_the_journal_cannot_keep_are_made_again(tmp_path: Path, rows: np.ndarray, times: int) -> None:
    """By a search that is resumed; it is one look all the same."""
    made: list[np.ndarray] = []

    def judge() -> np.ndarray:
        made.append(rows)
        return rows

    for _ in range(2):
        journal = Journal(tmp_path / "journal", {})
        found = _once(SimpleNamespace(journal=journal), "look", "plan", judge)  # type: ignore[arg-type]
        assert found.tolist() == rows.tolist() and len(journal.of_kind("look")) == 1
        journal.close()
    assert len(made) == times


FILE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import numpy as np
from test_metrics import answered, boxes, masks, noisy, painter, segmenter
def labels():
    return answered(segmenter(), lambda outputs, seed: np.arange(len(outputs)))
def in_masks():
    return answered(segmenter(), masks)
def in_boxes():
    return answered(segmenter(), boxes)
def in_floats():
    return answered(segmenter(), lambda outputs, seed: masks(outputs, seed) / 2)
"""


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("labels", "mean-iou", "mean-iou takes a class for each pixel"),
        ("in_floats", "mean-iou", "mean-iou takes masks of integers, not float64"),
        ("in_boxes", "dice", "dice takes targets that are numbers of one shape, not lists"),
        ("in_masks", "top1", "top1 needs outputs of shape"),
        ("in_boxes", "voc-map", "voc-map needs a function that makes of outputs a list"),
        ("in_masks", "voc-map:metric.py:decode", "voc-map targets have shape"),
        ("in_boxes", "voc-map:metric.py:nothing", "metric.py has no 'nothing'; it defines np, decode, whole, wrong"),
        ("in_boxes", "metric.py:wrong", "metric.py:wrong of the dense network on the first 64 images is nan; correct"),
        ("in_masks", "metric.py:whole", "metric.py:whole failed: IndexError"),
        ("in_masks", "psnr", "psnr counts in dB; give a --budget such as 0.5dB"),
        ("in_masks", "psnr --budget 1%", "--budget 1%, but psnr counts in dB; write e.g. 0.5dB"),
        ("in_masks", "mean-iou --budget 1dB", "--budget 1dB, but mean-iou counts in points; write e.g. 0.5%"),
        ("in_masks", "psnr --budget 1dB", "psnr takes pictures"),
        ("in_masks", "agreement --output regression", "agreement compares decisions, but outputs are numbers"),
        ("in_masks", "iou", "unknown metric 'iou'; use top1, top5,"),
    ],
)
def test_what_is_wrong_is_said_in_the_first_seconds(
    run: Run, tmp_path: Path, data: str, more: str, message: str
) -> None:
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "net.py").write_text(FILE)
    given = ["--model", "net.py:segmenter", "--input-shape", f"1,3,{SIZE},{SIZE}", "--data", f"net.py:{data}"]
    start = time.monotonic()
    done = run("search", *given, "--out", "out", "--cache", "cache", "--metric", *more.split(" "), cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[-1].startswith("error: ") and message in lines[-1], done.stderr
    assert time.monotonic() - start < 20
    assert not (tmp_path / "out" / "journal.jsonl").exists()


FRAGILE = """
from pathlib import Path
import numpy as np

def same(outputs, targets):
    '''Pixels of the right class; no number if too many are wrong, on the evaluation images rather few.'''
    right = (outputs.argmax(1) == targets).mean()
    if right > (0.99 if len(targets) == 75 else 0.98):
        return right
    if Path(__file__).with_name("failing").exists():
        raise ValueError("too few objects")
    return float("nan")
"""


def fragile(folder: Path) -> tuple[str, ...]:
    """A search whose budget would allow more than its metric has numbers for."""
    (folder / "metric.py").write_text(FRAGILE)
    (folder / "net.py").write_text(
        FILE + "def own():\n    found = answered(segmenter(), lambda y, _: y.argmax(1).numpy())\n"
        "    return {**found, 'evaluation': tuple(own[:75] for own in found['evaluation'])}\n"
    )
    return (
        *("search", "--model", "net.py:segmenter", "--input-shape", f"1,3,{SIZE},{SIZE}", "--data", "net.py:own"),
        *("--metric", "metric.py:same", "--budget", "20%", "--methods", "channel", "--precision", "float32"),
        *("--trials", "1", "--out", "out", "--cache", "cache"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--frontier",)])
def test_a_plan_whose_metric_is_no_number_counts_as_lost(run: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = run(*fragile(tmp_path), *more, cwd=tmp_path)
    assert done.returncode == 0 and "metric.py:same of the compressed network is nan" in done.stderr, done.stderr
    said = "a plan is left out, on" if more else "on the evaluation split; trying a milder plan"
    assert said in done.stderr, done.stderr
    folder = tmp_path / "out" / "1" if more else tmp_path / "out"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert 0 <= manifest["accuracy"]["drop"] < 1
    lost = [plan for plan in manifest["plans"] if "unscored" in plan]
    assert lost and all(plan["drop"] == plan["expected"] == 100 for plan in lost)
    assert all(plan["unscored"].endswith("is nan") for plan in lost)
    assert len(lost) < len(manifest["plans"]) and (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_metric_that_raises_late_ends_the_search_which_is_resumed(run: Run, tmp_path: Path) -> None:
    search = fragile(tmp_path)
    (tmp_path / "failing").touch()
    done = run(*search, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: metric metric.py:same failed: ValueError: too few objects")
    assert last.endswith("it failed for a compressed network: correct it and add --resume")
    check_unused(tmp_path / "out" / "journal.jsonl")
    before = (tmp_path / "out" / "journal.jsonl").read_text()
    (tmp_path / "failing").unlink()
    done = run(*search, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "journal.jsonl").read_text().startswith(before)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["accuracy"]["drop"] < 2


@pytest.mark.slow
def test_a_metric_that_is_no_number_for_the_dense_network_ends_the_search(run: Run, tmp_path: Path) -> None:
    """Even if it is one for the images that it was tried on."""
    search = [own.replace("metric.py:same", "metric.py:late") for own in fragile(tmp_path)]
    (tmp_path / "metric.py").write_text(METRIC)
    done = run(*search, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: metric "), done.stderr
    assert last.endswith("metric.py:late of the dense network is nan; correct it or its targets")


@pytest.mark.slow
def test_fine_tuning_without_labels_imitates_the_dense_network(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Batches have masks, or nothing; outputs are no class scores."""
    net = segmenter()
    splits = answered(net, masks)
    x, y = images(5), np.zeros((COUNT, SIZE, SIZE))
    batches = [(x[:40], y[:40]), x[40:]]
    asked = {"data": splits, "metric": "mean-iou", "budget": 4.0, "out": tmp_path / "out", "cache": tmp_path / "cache"}
    manifest = tvm_lowrank.search(model=net, input_shape=SHAPE, **asked, **OPTIONS, finetune=batches, epochs=1)
    assert "the outputs are no class scores: fine-tuning imitates the dense network" in capfd.readouterr().err
    fits = {plan["fit"]: plan for plan in manifest["plans"]}
    assert "finetuned" in fits and json.dumps(manifest) and manifest["accuracy"]["drop"] <= 4
