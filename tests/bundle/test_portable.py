"""The compressed network as `model.pt2` and `model.onnx`: the same function, at any batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from support import models
from tvm_lowrank import Choice, DecomposeConv2D, UserError
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.portable import write_portable
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.precision import with_formats

PLAN = {"body.0": Choice("cp3", 12), "body.2": Choice("spatial", 6), "head": Choice("svd", 6)}


class Residual(nn.Module):
    """What exporters find hard: a residual addition, a grouped layer, a pool, a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(torch.max_pool2d(self.depthwise(x), 2).flatten(1))


def run_pt2(path: Path, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch.export.load(path).module()(torch.from_numpy(images)).numpy()


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(["output"], {"x": images})[0]


@pytest.mark.slow
def test_both_are_the_same_function(tmp_path: Path) -> None:
    mod = DecomposeConv2D(PLAN)(import_model(models.randomised(Residual()).eval(), input_shape=(1, 3, 16, 16)))
    write_portable(mod, tmp_path)
    for count in (1, 5):
        images = np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype("float32")
        expected = predict(TorchBridge(mod), images)
        for run, name in ((run_pt2, "model.pt2"), (run_onnx, "model.onnx")):
            np.testing.assert_allclose(run(tmp_path / name, images), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_they_are_imported_again(tmp_path: Path) -> None:
    mod = DecomposeConv2D(PLAN)(import_model(models.randomised(Residual()).eval(), input_shape=(1, 3, 16, 16)))
    # other tools have number formats of their own: these files stay in float32
    write_portable(with_formats(mod, {"body.0": "bfloat16", "stem": "float16"}), tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("float32")
    expected = predict(TorchBridge(mod), images)
    for name in ("model.pt2", "model.onnx"):
        again = import_model(tmp_path / name, input_shape=(1, 3, 16, 16))
        np.testing.assert_allclose(
            predict(TorchBridge(again), images), expected, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


def test_what_cannot_be_exported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mod = import_model(models.randomised(Residual()).eval(), input_shape=(1, 3, 16, 16))
    (tmp_path / "model.onnx").write_text("of an earlier search")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    write_portable(mod, tmp_path)
    assert "the bundle has no model.onnx: RuntimeError: no such operator" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    mod = import_model(models.randomised(Residual()).eval(), input_shape=(1, 3, 16, 16))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*model\.pt2"):
        write_portable(mod, tmp_path / "file")
