"""Searches of networks with several inputs, with data: from Python and from the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tvm_lowrank
from support.command import Run
from tvm_lowrank.bundle.verify import verify
from tvm_lowrank.searching.fit import reconstruct

SIZE, COUNT = 12, 80
SHAPE = ((1, 3, SIZE, SIZE), (1, 10))
OPTIONS: dict[str, Any] = {"methods": ("channel",), "precision": "float32", "trials": 1}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "PASSES", 2)


def layer() -> nn.Conv2d:
    """Of low rank, but for a little."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    u, _, v = torch.linalg.svd(torch.randn(64, 64 * 9), full_matrices=False)
    values = torch.exp(-torch.arange(64) / 6)
    conv.weight.data = (u * values @ v * (128 / values.square().sum()) ** 0.5).view_as(conv.weight)
    return conv


class Guided(nn.Module):
    """A picture and a vector, which chooses among the picture's features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.body, self.guide = nn.Conv2d(3, 64, 3, padding=1), layer(), nn.Linear(10, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, picture: Tensor, vector: Tensor) -> Tensor:
        y = self.body(self.front(picture).relu()) * (1 + 0.5 * self.guide(vector)[:, :, None, None])
        return self.head(y.relu().mean((2, 3)))


@torch.no_grad()
def guided() -> nn.Module:
    """Each class wins about as often."""
    net = Guided().eval()
    scores = net(*map(torch.from_numpy, images(9)))
    net.head.weight.mul_(3 / scores.std()), net.head.bias.zero_()
    net.head.bias.sub_(net(*map(torch.from_numpy, images(9))).mean(0))
    return net


def images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(COUNT, 3, 4, 4, generator=generator)
    pictures = nn.functional.interpolate(small, size=SIZE, mode="bilinear")
    return pictures.numpy(), torch.randn(COUNT, 10, generator=generator).numpy()


def splits() -> dict[str, Any]:
    found: dict[str, Any] = {"calibration": images(0)}
    for seed, name in enumerate(("selection", "evaluation"), start=1):
        with torch.no_grad():
            scores = guided()(*map(torch.from_numpy, images(seed)))
        found[name] = (images(seed), scores.argmax(1).numpy())
    return found


def arrays(data: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same as the arrays of a .npz."""
    parts = {name: own if name == "calibration" else own[0] for name, own in data.items()}
    found = {f"{name}_x_{number}": x for name, own in parts.items() for number, x in enumerate(own, 1)}
    return {**found, "selection_y": data["selection"][1], "evaluation_y": data["evaluation"][1]}


@pytest.mark.slow
def test_from_python(tmp_path: Path) -> None:
    """The library loses what it is said to lose; fine-tuning takes tuples, too."""
    data, out = splits(), tmp_path / "out"
    batches = [(tuple(own[part] for own in images(5)), np.zeros(40, int)) for part in (slice(40), slice(40, None))]
    asked: dict[str, Any] = {"data": data, "budget": 6.0, "out": out, "cache": tmp_path / "cache", **OPTIONS}
    manifest = tvm_lowrank.search(model=guided(), input_shape=SHAPE, **asked, finetune=batches, epochs=1)
    assert manifest["inputs"] == [[3, SIZE, SIZE], [10]]
    assert {plan["fit"] for plan in manifest["plans"]} >= {"finetuned"}
    accuracy, (x, labels) = manifest["accuracy"], data["evaluation"]
    assert accuracy["dense"] == 100 and accuracy["drop"] <= 6 and manifest["speedup"] > 1
    assert any(site["method"] == "channel" for site in manifest["sites"])
    found = tvm_lowrank.load(out)(x)
    assert 100 * (found.argmax(1) == labels).mean() == pytest.approx(accuracy["compressed"])
    session = onnxruntime.InferenceSession(out / "model.onnx")
    [other] = session.run(None, dict(zip(("x_1", "x_2"), x, strict=True)))
    np.testing.assert_allclose(other, found, atol=1e-3 * np.abs(found).max())
    assert verify(out, data=data).ok


@pytest.mark.slow
def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    """An ONNX file, a .npz and a metric of one's own; the search is resumed, and the bundle verified."""
    tensors = tuple(map(torch.from_numpy, images(7)))
    program = torch.export.export(guided(), tensors, dynamic_shapes=tuple({0: torch.export.Dim("n")} for _ in tensors))
    exported = torch.onnx.export(program, verbose=False)
    assert exported is not None
    exported.save(str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "data.npz", **arrays(splits()))
    (tmp_path / "metric.py").write_text("def right(outputs, targets):\n    return outputs.argmax(1) == targets\n")
    search = (
        *("search", "--model", "net.onnx", "--data", "data.npz", "--metric", "metric.py:right", "--budget", "6%"),
        *("--methods", "channel", "--trials", "1", "--precision", "float32", "--cache", "cache", "--out", "out"),
    )
    done = run(*search, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["accuracy"]["drop"] <= 6 and manifest["inputs"] == [[3, SIZE, SIZE], [10]]
    before = (tmp_path / "out" / "journal.jsonl").read_text()
    (tmp_path / "out" / "manifest.json").unlink()
    assert run(*search, "--resume", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "journal.jsonl").read_text() == before
    for command in ("verify", "bench"):
        done = run(command, "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


FILE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import numpy as np
from test_several_inputs import guided, images, splits
def good():
    return splits()
def bare():
    return {{**splits(), "calibration": images(0)[0]}}
def swapped():
    return {{**splits(), "calibration": images(0)[::-1]}}
def pixels():
    return {{**splits(), "calibration": (images(0)[0].astype("uint8"), images(0)[1])}}
def fewer():
    return {{**splits(), "calibration": (images(0)[0], images(0)[1][:7])}}
def batch():
    return [(images(0)[0], np.zeros(80, int))]
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data net.py:bare", "ndarray, the model has several inputs; give a tuple of arrays (n, 3, 12, 12), (n, 10)"),
        ("--data net.py:swapped", "as input 1; the model takes (n, 3, 12, 12), (n, 10)"),
        ("--data net.py:pixels", "as input 1; several inputs are float32, taken as they are"),
        ("--data net.py:fewer", "calibration has 80, 7 images in its inputs; give as many of each"),
        ("--data net.py:good --mean 0.5", "--mean and --std are for models of one input"),
        ("--data old.npz", "has no array 'calibration_x_1'; it needs calibration_x_1, calibration_x_2, selection_x_1"),
        ("--data images", "has images for one input, the model takes (n, 3, 12, 12), (n, 10); give a function or .npz"),
        ("--data example", "the bundled images are 3x32x32, the model takes (n, 3, 12, 12), (n, 10); give --data"),
        ("--data net.py:good --finetune net.py:batch", "images: ndarray, the model has several inputs; give a tuple"),
    ],
)
def test_what_is_wrong_is_said_in_the_first_seconds(run: Run, tmp_path: Path, more: str, message: str) -> None:
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "old.npz", calibration_x=images(0)[0])
    given = ("--model", "net.py:guided", "--input-shape", f"1,3,{SIZE},{SIZE}+1,10")
    start = time.monotonic()
    done = run("search", *given, "--out", "out", "--cache", "cache", *more.split(" "), cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert time.monotonic() - start < 20
    assert not (tmp_path / "out" / "journal.jsonl").exists()
