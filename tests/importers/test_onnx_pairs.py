"""ONNX files in int8: read as float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn
from tvm.ir import Call

from support import models
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import bindings, find_sites
from tvm_lowrank.importers import onnx_operators
from tvm_lowrank.importers.from_onnx import from_onnx
from tvm_lowrank.importers.importer import import_model

SHAPE = (3, 16, 16)
node = helper.make_node


class Mixed(nn.Module):
    """Activations of several kinds, a residual addition, pools, a concatenation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.max_pool2d(torch.relu(x + self.body(x)), 2)
        x = torch.cat([nn.functional.leaky_relu(self.left(x), 0.1), torch.clamp(self.right(x), 0, 6)], 1)
        return self.head(x.mean((2, 3)))


class Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self._images = iter(images[:, None])

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"x": image}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)


def answers(mod: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return TorchBridge(mod)(torch.from_numpy(x)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_a_network_that_onnx_runtime_quantised(
    activations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = models.randomised(Mixed())
    file, whole = tmp_path / "net.onnx", tmp_path / "int8.onnx"
    options = {"input_names": ["x"], "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "verbose": False}
    torch.onnx.export(net, (torch.zeros(2, *SHAPE),), file, dynamo=True, **options)
    kinds = {"activation_type": QuantType[activations], "weight_type": QuantType.QInt8}
    quantize_static(file, whole, Reader(images(32)), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    operators = Counter(own.op_type for own in onnx.load(whole).graph.node)
    assert operators["QuantizeLinear"] > 5 and operators["Relu"] + operators["Clip"] < 3

    capsys.readouterr()
    mod = import_model(whole)
    said = " ".join(capsys.readouterr().err.split())
    assert "the file's int8 activations are read as float32; --precision int8 rounds them again" in said
    assert [site.weight.shape for site in find_sites(mod)] == [
        own.weight.shape if own.weight.dim() == 4 else (*own.weight.shape, 1, 1)
        for own in (net.stem, net.body, net.left, net.right, net.head)
    ]
    x = images(5)
    with torch.no_grad():
        wanted = net(torch.from_numpy(x)).numpy()
    (rounded,) = onnxruntime.InferenceSession(whole).run(None, {"x": x})
    # what is left are the weights' own rounding, and ranges that a few images do not fill
    assert np.abs(answers(mod, x) - wanted).mean() < np.abs(rounded - wanted).mean() < 0.1 * np.abs(wanted).mean()


def pair(value: str, name: str, *, zero: str | None = "z") -> list[onnx.NodeProto]:
    grid = ["s"] if zero is None else ["s", zero]
    return [
        node("QuantizeLinear", [value, *grid], [f"{name}_q"]),
        node("DequantizeLinear", [f"{name}_q", *grid], [name], f"the pair of {name}"),
    ]


def network(nodes: list[onnx.NodeProto], zero: np.ndarray, *, opset: int = 17, **others: np.ndarray) -> onnx.ModelProto:
    """A convolution from x to c, these operators from c to u, and another convolution."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, ins, 3, 3)).astype("float32") * 0.3 for name, ins in (("a", 3), ("b", 4))}
    values = {**weights, "s": np.float32(0.01), "z": zero, **others}
    graph = helper.make_graph(
        [node("Conv", ["x", "a"], ["c"]), *nodes, node("Conv", ["u", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", *SHAPE))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def operators(mod: Any) -> list[str]:
    calls = (binding.value for binding in bindings(mod["main"]) if isinstance(binding.value, Call))
    return [name for call in calls if (name := str(call.op.name).removeprefix("relax.")) != "nn.conv2d"]


@pytest.mark.parametrize(
    ("zero", "before", "wanted"),
    [
        (np.uint8(0), [], ["clip"]),  # a ReLU that was left out
        (np.int8(-128), [], ["clip"]),
        (np.uint16(0), [], ["clip"]),
        (np.uint8(7), [], []),
        (np.int8(0), [], []),
        (np.uint8(0), [node("Relu", ["c"], ["r"])], ["nn.relu"]),
        (np.uint8(0), [node("Neg", ["c"], ["r"])], ["negative", "clip"]),
    ],
)
def test_a_range_that_starts_at_0(zero: np.ndarray, before: list[onnx.NodeProto], wanted: list[str]) -> None:
    model = network([*before, *pair("r" if before else "c", "u")], zero, opset=21 if zero.dtype == "uint16" else 17)
    mod = from_onnx(model)
    assert operators(mod) == wanted
    if not wanted or zero.dtype == "uint16":  # numbers are beyond the range; ONNX Runtime lacks the type
        return
    x = images(3) * 0.3
    (rounded,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert np.abs(answers(mod, x) - rounded).max() < 0.05 * np.abs(rounded).max()


@pytest.mark.parametrize("opset", [10, 13, 19])
def test_old_and_new_versions(opset: int) -> None:
    nodes = [*pair("c", "m"), node("MaxPool", ["m"], ["p"], kernel_shape=[2, 2]), *pair("p", "u")]
    assert operators(from_onnx(network(nodes, np.uint8(0), opset=opset))) == ["clip", "nn.max_pool2d"]


def test_weights_are_rounded() -> None:
    model = network(pair("c", "u"), np.int8(0))
    exact = [site.weight for site in find_sites(from_onnx(model))]
    model.graph.node[-1].input[1] = "bd"
    for own in reversed(pair("b", "bd")):
        model.graph.node.insert(0, own)
    rounded = [site.weight for site in find_sites(from_onnx(model))]
    np.testing.assert_array_equal(rounded[0], exact[0])
    np.testing.assert_allclose(rounded[1], np.rint(exact[1] / 0.01) * 0.01, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("QuantizeLinear", ["c", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "t", "z"], ["u"])],
        [node("QuantizeLinear", ["c", "v", "w"], ["q"]), node("DequantizeLinear", ["q", "v", "w"], ["u"])],
        [
            node("QuantizeLinear", ["c", "s", "z"], ["q"]),
            node("MaxPool", ["q"], ["p"], kernel_shape=[2, 2]),
            node("DequantizeLinear", ["p", "s", "z"], ["u"]),
        ],
    ],
    ids=["another scale", "by channel", "used as whole numbers"],
)
def test_others_are_refused(nodes: list[onnx.NodeProto]) -> None:
    scales, zeros = np.full(4, 0.01, "float32"), np.zeros(4, "uint8")
    with pytest.raises(UserError, match=r"whole numbers \(QuantizeLinear\); give the float32 model"):
        from_onnx(network(nodes, np.uint8(0), t=np.float32(0.02), v=scales, w=zeros))


def test_a_wrong_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is with the file without its pairs."""
    clip = onnx_operators._CONVERTERS["Clip"]

    def wrong(*args: Any) -> Any:
        return onnx_operators.relax.op.multiply(clip(*args), onnx_operators.relax.const(np.float32(1.01)))

    monkeypatch.setitem(onnx_operators._CONVERTERS, "Clip", wrong)
    with pytest.raises(UserError, match=r"differs from the file, first at operator Clip \(the pair of u\)"):
        from_onnx(network(pair("c", "u"), np.uint8(0)))
