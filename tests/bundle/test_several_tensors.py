"""Networks with several outputs or inputs: libraries, from Python, C and on a device, and files for other tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tvm_lowrank
from support.models import randomised
from tvm_lowrank.bundle.package import package
from tvm_lowrank.errors import UserError
from tvm_lowrank.options import CompileOptions
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.targets.profile import load_profile

pytestmark = pytest.mark.slow

SIZE, BATCH = 12, 2
HALF = [format for format in load_profile("x86").formats if format != "float32"]
MAIN = f"{Path(__file__)}:detector"
PROGRAM = """
import ctypes, sys
import numpy as np
folder, images, results = sys.argv[1:]
library = ctypes.CDLL(f"{folder}/lib/libtlr.so")
pointer, size = ctypes.c_void_p, ctypes.c_size_t
library.tlr_load.restype = pointer
library.tlr_error.restype = ctypes.c_char_p
for name in ("tlr_output_size", "tlr_output_count"):
    getattr(library, name).argtypes, getattr(library, name).restype = [pointer], size
library.tlr_output_shape.argtypes = [pointer, size, pointer]
library.tlr_output_shape.restype = ctypes.POINTER(ctypes.c_int64)
library.tlr_run.argtypes = [pointer, pointer, size, pointer]
model = library.tlr_load(folder.encode(), 0, 1)
assert model, library.tlr_error()
x = np.load(images)
shapes = []
for number in range(library.tlr_output_count(model)):
    count = size()
    shape = library.tlr_output_shape(model, number, ctypes.byref(count))
    shapes.append([shape[axis] for axis in range(count.value)])
assert not library.tlr_output_shape(model, len(shapes), None)
outputs = np.empty((len(x), library.tlr_output_size(model)), np.float32)
assert library.tlr_run(model, x.ctypes.data, len(x), outputs.ctypes.data) == 0
ends = np.cumsum([np.prod(shape) for shape in shapes])
parts = np.split(outputs, ends[:-1], axis=1)
np.savez(results, *[part.reshape(len(x), *shape) for part, shape in zip(parts, shapes)])
"""


class Detector(nn.Module):
    """Boxes and class probabilities of each position, and a feature that a convolution reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.boxes, self.classes = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 5, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(self.front(x)).relu()
        return {"boxes": self.boxes(y).flatten(2), "classes": self.classes(y).softmax(1), "features": y}


def detector() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Detector()).eval()


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 3, SIZE, SIZE)).astype("float32")


def expected() -> list[np.ndarray]:
    with torch.no_grad():
        return [value.numpy() for value in detector()(torch.from_numpy(images())).values()]


def agree(found: Any, tolerance: float = 1e-4) -> None:
    for own, wanted in zip(found, expected(), strict=True):
        assert own.shape == wanted.shape
        np.testing.assert_allclose(own, wanted, atol=tolerance * np.abs(wanted).max())


def made(folder: Path, format: str = "float32", **options: Any) -> Path:
    """A bundle whose plan leaves the function as it was: all 32 channels."""
    plan = folder / "plan.json"
    sites: dict[str, dict[str, object]] = {name: {"method": "dense"} for name in ("boxes", "classes")}
    sites["body"] = {"method": "channel", "rank": 32}
    rounded = {name: {**own, "format": format} for name, own in sites.items()}
    plan.write_text(json.dumps({"schema": 1, "sites": rounded}))
    asked = CompileOptions(
        out=folder / "bundle",
        model=MAIN,
        input_shape=(1, 3, SIZE, SIZE),
        batch=BATCH,
        trials=1,
        cache=folder / "cache",
        **options,
    )
    apply_plan(asked, plan)
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("several"))


def test_from_python(bundle: Path) -> None:
    agree(tvm_lowrank.load(bundle)(images()))
    agree(tvm_lowrank.load(bundle, which="dense")(images()))


def test_from_c(bundle: Path, tmp_path: Path) -> None:
    packaged = package(bundle, tmp_path / "package", with_runtime=True, cache_dir=tmp_path)
    np.save(tmp_path / "images.npy", images())
    command = [sys.executable, "-c", PROGRAM, packaged, tmp_path / "images.npy", tmp_path / "results.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "results.npz") as results:
        agree([results[name] for name in results.files])


def test_with_other_tools(bundle: Path) -> None:
    with torch.no_grad():
        agree(torch.export.load(bundle / "model.pt2").module()(torch.from_numpy(images())))
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["output_1", "output_2", "output_3"]
    agree(session.run(None, {"x": images()}))


@pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static")
def test_on_an_emulated_device(tmp_path: Path) -> None:
    """`apply_plan` compares what the device computes with PyTorch."""
    assert (made(tmp_path, target="arm", emulate=True) / "model.so").is_file()


@pytest.mark.skipif(not HALF, reason="this processor computes in float32 only")
def test_half_precision(tmp_path: Path) -> None:
    """An output that a convolution reads in half precision is rounded, as `apply_plan` is told by PyTorch."""
    agree(tvm_lowrank.load(made(tmp_path, HALF[0]))(images()), tolerance=0.05)


class Guided(nn.Module):
    """A picture and a vector, which chooses among the picture's features."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.guide, self.head = nn.Linear(10, 32), nn.Linear(32, 5)

    def forward(self, picture: Tensor, vector: Tensor) -> Tensor:
        y = self.body(self.front(picture)) * self.guide(vector)[:, :, None, None]
        return self.head(y.relu().mean((2, 3)))


def guided() -> nn.Module:
    return randomised(Guided()).eval()


def test_several_inputs(tmp_path: Path) -> None:
    """They are one for the library, one after another; Python, PyTorch and ONNX take them apart."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5, 10)).astype("float32")
    both = (images(), vectors)
    with torch.no_grad():
        wanted = guided()(*map(torch.from_numpy, both)).numpy()
    manifest = tvm_lowrank.search(
        model=guided(),
        input_shape=((1, 3, SIZE, SIZE), (1, 10)),
        methods=("channel", "spatial"),
        budget=0.01,
        precision="float32",
        batch=BATCH,
        trials=1,
        out=tmp_path / "bundle",
        cache=tmp_path / "cache",
    )
    assert manifest["inputs"] == [[3, SIZE, SIZE], [10]]
    assert manifest["input_shape"] == [BATCH, 3 * SIZE**2 + 10, 1, 1]
    dense = tvm_lowrank.load(tmp_path / "bundle", which="dense")
    np.testing.assert_allclose(dense(both), wanted, atol=1e-4 * np.abs(wanted).max())
    compressed = tvm_lowrank.load(tmp_path / "bundle")(both)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "bundle" / "model.pt2").module()(*map(torch.from_numpy, both)).numpy()
    np.testing.assert_allclose(found, compressed, atol=1e-4 * np.abs(compressed).max())
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx")
    [found] = session.run(None, {"x_1": both[0], "x_2": both[1]})
    np.testing.assert_allclose(found, compressed, atol=1e-4 * np.abs(compressed).max())
    for wrong in ((images(),), (vectors, images()), (images(), vectors[:3])):
        with pytest.raises(UserError, match=r"takes \(n, 3, 12, 12\), \(n, 10\) in float32"):
            dense(wrong)
