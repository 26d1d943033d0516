"""`model.onnx` of networks with convolutions in int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from onnx import TensorProto
from torch import Tensor, nn

from support import models
from tvm_lowrank import Choice, DecomposeConv2D
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.grids import calibrated
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle import qdq
from tvm_lowrank.bundle.portable import write_portable
from tvm_lowrank.formats import FLOAT32, Grid
from tvm_lowrank.graph import chain_of, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.precision import formats_of, grids_of, with_formats, with_grids

SHAPE = (3, 16, 16)
PLAN = {"body.0": Choice("cp3", 12), "body.2": Choice("spatial", 6)}


class Branches(nn.Module):
    """A residual addition, a max-pool, a concatenation, a mean, and numbers on both sides of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1))
        self.left, self.right = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.last, self.head = nn.Conv2d(40, 24, 3, padding=1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.max_pool2d(torch.relu(x + self.body(x)), 2)
        x = torch.relu(self.last(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(x.mean((2, 3)))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)


def float32() -> tvm.IRModule:
    return DecomposeConv2D(PLAN)(import_model(models.randomised(Branches()).eval(), input_shape=(1, *SHAPE)))


def integers(*others: str, format: str = FLOAT32) -> tvm.IRModule:
    """The network in int8, but for some sites."""
    mod = float32()
    sites = {chain_of(site.id) for site in find_sites(mod)}
    return calibrated(with_formats(mod, {site: format if site in others else "int8" for site in sites}), images(32))


def written(mod: tvm.IRModule, folder: Path) -> onnx.ModelProto:
    folder.mkdir(exist_ok=True)
    write_portable(mod, folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return onnx.load(folder / "model.onnx")


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimised(path: Path, *, at: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs by default."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(at), 4
    onnxruntime.InferenceSession(path, options)
    return count(onnx.load(at))


def in_int8(model: onnx.ModelProto) -> set[str]:
    ending = ".weight.whole"
    weights = [weight for weight in model.graph.initializer if weight.name.endswith(ending)]
    assert all(weight.data_type == TensorProto.INT8 for weight in weights)
    return {weight.name.removesuffix(ending) for weight in weights}


def off(path: Path, mod: tvm.IRModule, number: int = 5, *, optimise: bool = True) -> float:
    """How far ONNX Runtime is from the module, in units of how far that is from float32; mean squares."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    exact = with_formats(mod, dict.fromkeys(formats_of(mod["main"]), FLOAT32))
    x = images(number)
    (found,) = session.run(["output"], {"x": x})
    wanted, without = predict(TorchBridge(mod), x), predict(TorchBridge(exact), x)
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean((wanted - without) ** 2)))


def imported(path: Path) -> np.ndarray:
    return predict(TorchBridge(import_model(path, input_shape=(1, *SHAPE))), images(5))


@pytest.mark.slow
def test_all_in_int8(tmp_path: Path) -> None:
    mod, sites = integers(), find_sites(float32())
    model = written(mod, tmp_path)
    assert in_int8(model) == {site.id for site in sites}
    # a pair for each value that is read, one of which is read twice, and for those before the max-pool and the
    # concatenation; biases are parts of the convolutions
    assert count(model)["QuantizeLinear"] == len(sites) - 1 + 3
    assert count(model)["DequantizeLinear"] == count(model)["QuantizeLinear"] + len(sites)
    assert count(model)["Conv"] == len(sites) and count(model)["Add"] == 1
    assert [output.name for output in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param

    path = tmp_path / "model.onnx"
    for number in (1, 5):
        assert off(path, mod, number, optimise=False) < 0.01
        assert off(path, mod, number) < 0.7
    # all but those of which nothing rounds the sum: in front of the residual addition, of the mean, and of the end
    kernels = optimised(path, at=tmp_path / "optimised.onnx")
    assert kernels["QLinearConv"] == len(sites) - 3 and kernels["QLinearConcat"] == 1

    exact = float32()
    assert count(written(exact, tmp_path / "float32"))["Conv"] == len(sites)
    smaller = path.stat().st_size / (tmp_path / "float32" / "model.onnx").stat().st_size
    assert smaller < 0.8, smaller  # the network is small: names take more than half of it
    np.testing.assert_allclose(
        torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(images(3))).detach().numpy(),
        predict(TorchBridge(exact), images(3)),
        atol=1e-4,
    )


@pytest.mark.slow
def test_it_is_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mod = integers()
    written(mod, tmp_path)
    wanted = predict(TorchBridge(float32()), images(5))
    found = imported(tmp_path / "model.onnx")
    assert "the file's int8 activations are read as float32" in " ".join(capsys.readouterr().err.split())
    # the weights are those of int8
    assert np.abs(found - wanted).max() < np.abs(predict(TorchBridge(mod), images(5)) - wanted).max()
    again = import_model(tmp_path / "model.onnx", input_shape=(1, *SHAPE))
    assert [site.id for site in find_sites(again)] == [site.id for site in find_sites(mod)]


@pytest.mark.slow
@pytest.mark.parametrize("others", [("left", "body.0"), ("stem", "right", "head"), ("body.2", "last")])
@pytest.mark.parametrize("format", [FLOAT32, "bfloat16"])
def test_mixed_formats(others: Sequence[str], format: str, tmp_path: Path) -> None:
    mod = integers(*others, format=format)
    model = written(mod, tmp_path)
    assert in_int8(model) == {site.id for site in find_sites(mod) if chain_of(site.id) not in others}
    # also as ONNX Runtime runs it by default, which would round the weights of the others; half precision is left out
    assert off(tmp_path / "model.onnx", mod) < 1.5
    if format == FLOAT32:
        whole = {weight.name for weight in model.graph.initializer if weight.data_type == TensorProto.INT8}
        optimised(tmp_path / "model.onnx", at=tmp_path / "optimised.onnx")
        after = onnx.load(tmp_path / "optimised.onnx").graph
        assert not [w.name for w in after.initializer if w.data_type == TensorProto.INT8 and w.name not in whole]
    imported(tmp_path / "model.onnx")


@pytest.mark.slow
def test_two_grids_of_one_value(tmp_path: Path) -> None:
    """It is not rounded for all, but for each convolution apart."""
    mod = integers()
    grid = grids_of(mod["main"])["left"]
    mod = with_grids(mod, {"right": Grid(grid.scale * 1.5, grid.zero)})
    model = written(mod, tmp_path)
    assert {"left.input.whole", "right.input.whole"} <= {o for node in model.graph.node for o in node.output}
    assert off(tmp_path / "model.onnx", mod) < 0.7


@pytest.mark.slow
def test_equal_layers_are_kept_apart(tmp_path: Path) -> None:
    """Exporters merge small constants that are equal."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3))).eval()
    for layer in net[1:]:
        layer.load_state_dict(net[0].state_dict())
    mod = import_model(net, input_shape=(1, *SHAPE))
    mod = calibrated(with_formats(mod, {"0.0": "int8", "2.0": "int8"}), images(8))
    assert in_int8(written(mod, tmp_path)) == {"0.0", "2.0"}
    assert off(tmp_path / "model.onnx", mod) < 0.7


class Several(nn.Module):
    """Two inputs; of three outputs one is what a convolution reads, and one that of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.mask = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.middle, self.end = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, picture: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu(self.picture(picture) + self.mask(mask))
        y = self.middle(x)
        return x, self.end(torch.relu(y)), y


@pytest.mark.slow
def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    mod = import_model(models.randomised(Several()), input_shape=((1, *SHAPE), (1, 1, *SHAPE[1:])))
    images = [np.random.default_rng(0).standard_normal((5, n, *SHAPE[1:]), dtype=np.float32) for n in (3, 1)]
    bridge = TorchBridge(mod)
    x = bridge.inputs.images(images)
    mod = calibrated(with_formats(mod, {site.id: "int8" for site in find_sites(mod)}), x)
    model = written(mod, tmp_path)
    assert len(in_int8(model)) == 4 and len(model.graph.input) == 2 and len(model.graph.output) == 3
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x_1": images[0], "x_2": images[1]})
    wanted = bridge.outputs.parted(predict(TorchBridge(mod), x))
    exact = bridge.outputs.parted(predict(bridge, x))
    for got, own, other in zip(found, wanted, exact, strict=True):
        assert np.abs(got - own).mean() < 0.5 * np.abs(own - other).mean()


def test_what_is_not_the_network_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mod = import_model(models.randomised(nn.Sequential(nn.Conv2d(3, 8, 3))), input_shape=(1, *SHAPE))
    mod = calibrated(with_formats(mod, {"0": "int8"}), images(8))
    quantised = qdq.quantised
    monkeypatch.setattr(qdq, "quantised", lambda weight: (quantised(weight)[0], quantised(weight)[1] * np.float32(1.1)))
    write_portable(mod, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "the bundle has no model.onnx: ValueError: its outputs in ONNX Runtime are off by" in said
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2"}
