"""ONNX and TorchScript files with several inputs: they import, and equal their source at two batch sizes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from support.models import randomised
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers import from_onnx as from_onnx_module
from tvm_lowrank.importers.from_onnx import from_onnx
from tvm_lowrank.importers.importer import import_model


class Guided(nn.Module):
    """A picture, and a vector that is projected and added."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.guide, self.head = nn.Linear(10, 16), nn.Linear(16, 5)

    def forward(self, picture: Tensor, vector: Tensor) -> Tensor:
        y = self.front(picture).relu() + self.guide(vector)[:, :, None, None]
        return self.head(self.body(y).relu().mean((2, 3)))


class Siamese(nn.Module):
    """How far apart two pictures are, by the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = (self.body(own).flatten(1) for own in (first, second))
        return torch.stack([(a - b).square().sum(1), (a * b).sum(1)], dim=1)


class Streams(nn.Module):
    """Two streams of other sizes, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.motion = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.both = nn.Conv2d(16, 6, 1)

    def forward(self, still: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([self.still(still), self.motion(motion)], dim=1).relu()
        return self.both(y), y.mean((2, 3))


NETWORKS: dict[str, tuple[Any, tuple[tuple[int, ...], ...], set[str]]] = {
    "guided": (Guided, ((3, 8, 10), (10,)), {"front", "body", "guide", "head"}),
    "siamese": (Siamese, ((3, 8, 8), (3, 8, 8)), {"body.0", "body.2", "body.0_2", "body.2_2"}),
    "streams": (Streams, ((3, 12, 16), (4, 6, 8)), {"still", "motion", "both"}),
}


def given(shapes: tuple[tuple[int, ...], ...], count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, *shape, generator=generator) for shape in shapes)


def agree(mod: Any, model: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> None:
    bridge = TorchBridge(mod)
    assert bridge.inputs.shapes == shapes
    for count in (1, 3):
        x = given(shapes, count)
        with torch.no_grad():
            wanted, found = model(*x), bridge.outputs.parted(bridge(bridge.inputs.images(x)))
        for own, y in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            torch.testing.assert_close(own, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def exported(model: nn.Module, shapes: tuple[tuple[int, ...], ...], path: Path, *, dynamo: bool, open: bool) -> Path:
    options: dict[str, Any] = {}
    if open and dynamo:
        options["dynamic_shapes"] = tuple({0: torch.export.Dim("n")} for _ in shapes)
    elif open:
        options["dynamic_axes"] = {f"in{number}": {0: "n"} for number in range(len(shapes))}
    names = [f"in{number}" for number in range(len(shapes))]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, given(shapes, 2 if open else 1), path, dynamo=dynamo, input_names=names, **options)
    logging.disable(level)
    return path


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dynamo", "open"), [(False, True), (False, False), (True, True)])
def test_onnx(name: str, dynamo: bool, open: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, shapes, sites = NETWORKS[name]
    model = randomised(make())
    path = exported(model, shapes, tmp_path / "m.onnx", dynamo=dynamo, open=open)
    capfd.readouterr()
    mod = import_model(path)
    assert "not compared" not in capfd.readouterr().err
    agree(mod, model, shapes)
    assert {site.id for site in find_sites(mod)} == sites
    with_shapes = import_model(path, input_shape=tuple((1, *shape) for shape in shapes))
    assert TorchBridge(with_shapes).inputs == TorchBridge(mod).inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_torchscript(name: str, tmp_path: Path) -> None:
    make, shapes, _ = NETWORKS[name]
    model = randomised(make()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, given(shapes, 2)).save(str(tmp_path / "m.pt"))
    agree(import_model(tmp_path / "m.pt", input_shape=tuple((1, *shape) for shape in shapes)), model, shapes)


def two(
    nodes: list[onnx.NodeProto] | None = None,
    *,
    shapes: tuple[Any, ...] = (("n", 3, 6, 6), ("n", 3, 6, 6)),
    dtype: int = TensorProto.FLOAT,
    more: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """a -> Conv, b -> nodes -> c, and their sum."""
    weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype("float32")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["a", "w"], ["p"], pads=[1] * 4),
            *(nodes or [helper.make_node("Relu", ["b"], ["c"])]),
            helper.make_node("Add", ["p", "c"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, shapes[0]),
            helper.make_tensor_value_info("b", dtype, shapes[1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(own, name) for name, own in {"w": weight, **(more or {})}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def of_onnxruntime(model: onnx.ModelProto, count: int, shapes: tuple[tuple[int, ...], ...]) -> Any:
    x = given(shapes, count)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return x, session.run(None, dict(zip("ab", (own.numpy() for own in x), strict=True)))[0]


def test_inputs_keep_the_order_of_the_file() -> None:
    """A file of channels-last images as well: they are taken as the file has them."""
    turn = [helper.make_node("Transpose", ["b"], ["c"], perm=[0, 3, 1, 2])]
    model = two(turn, shapes=(("n", 3, 6, 6), ("n", 6, 6, 3)))
    bridge = TorchBridge(from_onnx(model))
    assert bridge.inputs.shapes == ((3, 6, 6), (6, 6, 3))
    for count in (1, 3):
        x, wanted = of_onnxruntime(model, count, bridge.inputs.shapes)
        with torch.no_grad():
            found = bridge(bridge.inputs.images(x)).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_an_import_that_differs_names_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the second input becomes."""
    nodes = [helper.make_node("Neg", ["b"], ["n"]), helper.make_node("Clip", ["n", "low", "high"], ["c"])]
    model = two(nodes, more={"low": np.float32(-0.5), "high": np.float32(0.5)})  # type: ignore[dict-item]
    from_onnx(model)
    monkeypatch.setitem(from_onnx_module.Importer._convert_operator.__globals__["_CONVERTERS"], "Clip", wrong_clip)
    with pytest.raises(UserError, match=r"first at operator Clip \(c\); replace it"):
        from_onnx(model)


def wrong_clip(_builder: Any, inputs: Any, _attrs: Any) -> Any:
    from tvm import relax

    return relax.op.clip(inputs[0], -0.5, 0.4)


def test_open_sizes_are_given() -> None:
    model = two(shapes=(("n", 3, "h", "w"), ("n", 3, "h", "w")))
    with pytest.raises(UserError, match="leaves the size of 'a' open; give"):
        from_onnx(model)
    assert TorchBridge(from_onnx(model, ((1, 3, 6, 6), (1, 3, 6, 6)))).inputs.shapes == ((3, 6, 6),) * 2


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (two(), (1, 3, 6, 6), r"the model has 2 inputs \(a, b\), not 1; give the shape of each"),
        (two(), ((1, 3, 6, 6),) * 3, r"the model has 2 inputs \(a, b\), not 3; give the shape of each"),
        (two(), ((1, 3, 6, 6), (1, 3, 6, 7)), "the model takes images of 3x6x6, not 3x6x7; leave the input shape out"),
        (two(), ((1, 3, 6, 6), (1, 3)), "the model takes images of 3x6x6, not 3; leave the input shape out"),
        (two(dtype=TensorProto.INT64), None, "input 'b' is int64, not float32; export"),
        (two(shapes=((4, 3, 6, 6), (1, 3, 6, 6))), None, r"different batches \('a' 4, 'b' 1\); the first dimension"),
        (
            two(shapes=((1, 3, 6, 6), (1,))),
            None,
            "input 'b' has 1 dimensions; those of several have the batch and more",
        ),
    ],
)
def test_errors(model: onnx.ModelProto, shape: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_onnx(model, shape)
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_torchscript_of_another_number_of_inputs(tmp_path: Path) -> None:
    torch.jit.script(nn.Conv2d(3, 8, 3)).save(str(tmp_path / "m.pt"))
    with pytest.raises(UserError, match=r"torch cannot export .*; give") as caught:
        import_model(tmp_path / "m.pt", input_shape=((1, 3, 6, 6), (1, 4)))
    assert "\n" not in str(caught.value)
