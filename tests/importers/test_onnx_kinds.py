"""Kinds of ONNX files that people have: each imports, and equals ONNX Runtime at two batch sizes, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers import from_onnx as from_onnx_module
from tvm_lowrank.importers import onnx_operators
from tvm_lowrank.importers.from_onnx import from_onnx

node = helper.make_node
Weights = dict[str, np.ndarray]


def weights(**shapes: Sequence[int]) -> Weights:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def network(
    nodes: Sequence[onnx.NodeProto],
    values: Weights,
    *,
    opset: int = 17,
    size: Sequence[Any] = (3, 15, 17),
    batch: int | str = "N",
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """x -> nodes -> y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, (batch, *size))],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4 if opset < 13 else 8)


def between(*nodes: onnx.NodeProto, channels: int = 8, **options: Any) -> tuple[list[onnx.NodeProto], Weights]:
    """A convolution, these operators from r to u, and another convolution; and their weights."""
    before = [node("Conv", ["x", "w1"], ["c"], pads=[1] * 4), node("LeakyRelu", ["c"], ["r"], alpha=0.1)]
    after = [node("Conv", ["u", "w2"], ["d"], pads=[1] * 4), node("Flatten", ["d"], ["y"])]
    return [*before, *nodes, *after], weights(w1=(8, 3, 3, 3), w2=(4, channels, 3, 3))


def check(model: onnx.ModelProto, *, apart: bool = False, tolerance: float = 1e-5) -> Any:
    """Import a model and compare it with ONNX Runtime, one image at a time where the file's batch is 1."""
    mod = from_onnx(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    size = [int(d) for d in list(mod["main"].params[0].ty.shape)[1:]]
    for count in (1, 3):
        x = np.random.default_rng(count).standard_normal((count, *size)).astype(np.float32)
        given = x.astype(np.float16) if "float16" in session.get_inputs()[0].type else x
        parts = given[:, None] if apart else [given]
        expected = np.concatenate([session.run(None, {"x": part})[0] for part in parts]).astype(np.float32)
        with torch.no_grad():
            got = TorchBridge(mod)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    return mod


MODES = [
    {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    for coordinates in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel")
    for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
] + [
    {"mode": mode, "coordinate_transformation_mode": coordinates}
    for mode in ("linear", "cubic")
    for coordinates in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel")
]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("scale", [0.5, 2.0, 1.7])
def test_resize_by_scales(mode: dict[str, str], scale: float) -> None:
    nodes, values = between(node("Resize", ["r", "", "scales"], ["u"], **mode))
    check(network(nodes, {**values, "scales": np.array([1, 1, scale, scale], np.float32)}))


def test_kernels_of_resize_stay() -> None:
    """What TVM has a kernel for is not done by matrices."""
    nodes, values = between(node("Resize", ["r", "", "scales"], ["u"], mode="linear"))
    script = check(network(nodes, {**values, "scales": np.array([1, 1, 2, 2], np.float32)})).script()
    assert "image.resize2d" in script and "matmul" not in script


def test_resize_to_sizes_with_empty_scales() -> None:
    """PyTorch's exporter of opset 11: the batch's size is read from the image itself."""
    values = {"none": np.zeros(0, np.float32), "zero": np.array([0]), "two": np.array([2]), "to": np.array([20, 24])}
    nodes, own = between(
        node("Shape", ["r"], ["s"]),
        node("Slice", ["s", "zero", "two", "zero"], ["head"]),
        node("Concat", ["head", "to"], ["sizes"], axis=0),
        node("Resize", ["r", "none", "none", "sizes"], ["u"], mode="linear", nearest_mode="floor"),
    )
    check(network(nodes, {**values, **own}, opset=11))


@pytest.mark.parametrize(
    ("opset", "operator"),
    [
        (8, node("Upsample", ["r"], ["u"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])),
        (9, node("Upsample", ["r", "sc"], ["u"], mode="nearest")),
        (9, node("Upsample", ["r", "sc"], ["u"], mode="linear")),
        (10, node("Resize", ["r", "sc"], ["u"], mode="nearest")),
        (10, node("Resize", ["r", "sc"], ["u"], mode="linear")),
        (9, node("Slice", ["r"], ["u"], axes=[2, 3], starts=[1, -9], ends=[9, 100])),
    ],
)
def test_old_versions(opset: int, operator: onnx.NodeProto) -> None:
    nodes, values = between(operator)
    scales = {"sc": np.array([1, 1, 2, 2], np.float32)} if "sc" in operator.input else {}
    check(network(nodes, {**values, **scales}, opset=opset))


@pytest.mark.parametrize("batch", ["N", 1])
def test_shape_arithmetic_with_attributes(batch: str | int) -> None:
    """`x.view(x.size(0), -1)` of PyTorch 1.0 to 1.4."""
    nodes = [
        node("Conv", ["x", "w1"], ["c"]),
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Shape", ["g"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n"], ["n1"], axes=[0]),
        node("Constant", [], ["m"], value=numpy_helper.from_array(np.array(-1))),
        node("Unsqueeze", ["m"], ["m1"], axes=[0]),
        node("Concat", ["n1", "m1"], ["t"], axis=0),
        node("Reshape", ["g", "t"], ["f"]),
        node("Gemm", ["f", "fc"], ["y"]),
    ]
    values = {**weights(w1=(8, 3, 3, 3), fc=(8, 5)), "zero": np.array(0)}
    mod = check(network(nodes, values, opset=11, batch=batch), apart=batch == 1)
    assert len(find_sites(mod)) == 2


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "SAME_UPPER", "output_shape": [29, 34]},
        {"output_shape": [30, 33]},
        {"output_shape": [31, 36], "output_padding": [1, 1]},
        {"pads": [0, 0, 1, 1]},
        {"pads": [1, 0, 1, 2], "output_padding": [1, 0]},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_transposed_convolutions_of_keras(attributes: dict[str, Any]) -> None:
    up = node("ConvTranspose", ["r", "up"], ["u"], strides=[2, 2], kernel_shape=[3, 3], **attributes)
    nodes, values = between(up, channels=6)
    check(network(nodes, {**values, **weights(up=(8, 6, 3, 3))}))


def test_one_image_baked_into_a_reshape(capfd: pytest.CaptureFixture[str]) -> None:
    """A channel shuffle that was traced with one image; the file says that its batch is open."""
    nodes, values = between(
        node("Reshape", ["r", "apart"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["b", "together"], ["u"]),
    )
    values |= {"apart": np.array([1, 2, 4, 15, 17]), "together": np.array([1, -1, 15, 17])}
    check(network(nodes, values), apart=True)
    assert "fixes the batch to 1" in capfd.readouterr().err


def recogniser(batch: int | str) -> onnx.ModelProto:
    """A text recogniser: (n, C, 1, T) to (n, T, classes), by way of (n T, C)."""
    nodes = [
        node("Conv", ["x", "w1"], ["c"], strides=[2, 1]),
        node("ReduceMean", ["c"], ["m"], axes=[2], keepdims=0),
        node("Transpose", ["m"], ["t"], perm=[0, 2, 1]),
        node("Shape", ["t"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["head"]),
        node("Concat", ["head", "classes"], ["back"], axis=0),
        node("Reshape", ["t", "rows"], ["flat"]),
        node("MatMul", ["flat", "fc"], ["l"]),
        node("Reshape", ["l", "back"], ["o"]),
        node("Softmax", ["o"], ["y"], axis=2),
    ]
    values = {"zero": np.array([0]), "two": np.array([2]), "classes": np.array([7]), "rows": np.array([-1, 8])}
    return network(nodes, {**values, **weights(w1=(8, 3, 3, 3), fc=(8, 7))}, batch=batch)


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_recognisers(batch: int | str) -> None:
    model = recogniser(batch)
    if batch == 4:
        mod = from_onnx(model)
        assert list(mod["main"].ret_ty.shape)[1:] == [15, 7]
    else:
        check(model, apart=batch == 1)


def quantised(name: str, value: np.ndarray) -> tuple[onnx.NodeProto, Weights]:
    scale = np.abs(value).max((1, 2, 3)) / 127
    whole = np.round(value / scale[:, None, None, None]).astype(np.int8)
    kept = {f"{name}_q": whole, f"{name}_s": scale.astype(np.float32), f"{name}_z": np.zeros(len(value), np.int8)}
    return node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name], axis=0), kept


def test_int8_weights() -> None:
    nodes, values = between(node("Relu", ["r"], ["u"]))
    pairs = [quantised(name, value) for name, value in values.items()]
    model = network([*(n for n, _ in pairs), *nodes], {k: v for _, kept in pairs for k, v in kept.items()})
    assert [site.weight.dtype for site in find_sites(check(model))] == [np.float32] * 2


def test_half_precision_weights_behind_a_cast() -> None:
    nodes, values = between(node("Relu", ["r"], ["u"]))
    casts = [node("Cast", [f"{name}_h"], [name], to=TensorProto.FLOAT) for name in values]
    check(network([*casts, *nodes], {f"{name}_h": value.astype(np.float16) for name, value in values.items()}))


def test_half_precision_throughout() -> None:
    nodes, values = between(node("Relu", ["r"], ["u"]))
    halves = {name: value.astype(np.float16) for name, value in values.items()}
    mod = check(network(nodes, halves, dtype=TensorProto.FLOAT16), tolerance=5e-3)
    assert str(mod["main"].params[0].ty.dtype) == "float32"


def channels_last(*before: onnx.NodeProto) -> onnx.ModelProto:
    turned = node("Transpose", ["p" if before else "x"], ["t"], perm=[0, 3, 1, 2])
    rest = [node("Conv", ["t", "w1"], ["c"]), node("GlobalAveragePool", ["c"], ["g"]), node("Flatten", ["g"], ["y"])]
    values = {**weights(w1=(8, 3, 3, 3)), "mean": np.array([0.1, 0.2, 0.3], np.float32)}
    return network([*before, turned, *rest], values, size=(20, 24, 3))


@pytest.mark.parametrize("before", [(), (node("Sub", ["x", "mean"], ["p"]),)], ids=["plain", "normalised"])
def test_channels_last(before: Sequence[onnx.NodeProto], capfd: pytest.CaptureFixture[str]) -> None:
    model = channels_last(*before)
    mod = from_onnx(model)
    assert [int(d) for d in list(mod["main"].params[0].ty.shape)[1:]] == [3, 20, 24]
    assert "N x H x W x C" in capfd.readouterr().err
    x = np.random.default_rng(1).standard_normal((3, 20, 24, 3)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    with torch.no_grad():
        got = TorchBridge(mod)(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_channel_that_is_last() -> None:
    """For which exporters reshape instead of transposing."""
    nodes = [node("Reshape", ["x", "to"], ["t"]), node("Conv", ["t", "w1"], ["c"]), node("Flatten", ["c"], ["y"])]
    model = network(nodes, {**weights(w1=(8, 1, 3, 3)), "to": np.array([-1, 1, 12, 9])}, size=(12, 9, 1))
    mod = from_onnx(model)
    x = np.random.default_rng(1).standard_normal((3, 12, 9, 1)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    with torch.no_grad():
        got = TorchBridge(mod)(torch.from_numpy(x.reshape(3, 1, 12, 9))).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("given", [(1, 3, 20, 24), (1, 20, 24, 3)])
def test_open_size_of_channels_last(given: tuple[int, ...]) -> None:
    model = channels_last()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dim.Clear()
    mod = from_onnx(model, given)
    assert [int(d) for d in list(mod["main"].params[0].ty.shape)[1:]] == [3, 20, 24]


def test_standardised_weights() -> None:
    """Weights that are computed from constants are sites' weights."""
    nodes, values = between(node("Relu", ["r"], ["u"]))
    nodes[0].input[1] = "w1_standard"
    computed = [
        node("ReduceMean", ["w1"], ["m"], axes=[1, 2, 3]),
        node("Sub", ["w1", "m"], ["centred"]),
        node("ReduceL2", ["centred"], ["norm"], axes=[1, 2, 3]),
        node("Div", ["centred", "norm"], ["w1_standard"]),
    ]
    assert len(find_sites(check(network([*computed, *nodes], values)))) == 2


def test_instance_norm() -> None:
    nodes, values = between(node("InstanceNormalization", ["r", "gamma", "beta"], ["u"]))
    check(network(nodes, {**values, **weights(gamma=(8,), beta=(8,))}))


@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_recurrent_layers_are_refused(operator: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[operator]
    nodes = [
        node("Conv", ["x", "w1"], ["c"], strides=[2, 1]),
        node("ReduceMean", ["c"], ["m"], axes=[2], keepdims=0),
        node("Transpose", ["m"], ["t"], perm=[2, 0, 1]),
        node(operator, ["t", "w", "r"], ["y"], hidden_size=6),
    ]
    model = network(nodes, weights(w1=(8, 3, 3, 3), w=(1, gates * 6, 8), r=(1, gates * 6, 6)))
    with pytest.raises(UserError, match=f"recurrent layer \\({operator}\\).*; "):
        from_onnx(model)


def test_int8_networks_are_refused() -> None:
    nodes, values = between(
        node("QuantizeLinear", ["r", "s"], ["q"]),
        node("ConvInteger", ["q", "w3"], ["i"]),
        node("Cast", ["i"], ["u"], to=TensorProto.FLOAT),
    )
    values |= {"s": np.float32(0.1), "w3": np.ones((8, 8, 1, 1), "int8")}
    with pytest.raises(UserError, match=r"whole numbers \(QuantizeLinear\); give the float32 model"):
        from_onnx(network(nodes, values))


# comparison


@pytest.mark.parametrize("last", ["Identity", "Sigmoid", "saturated"])
def test_a_wrong_operator_is_named(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output hides it: a sigmoid of numbers so large that it is 0 or 1."""

    pad = onnx_operators._CONVERTERS["Pad"]

    def wrong(*args: Any) -> Any:
        return onnx_operators.relax.op.multiply(pad(*args), onnx_operators.relax.const(np.float32(1.01)))

    monkeypatch.setitem(onnx_operators._CONVERTERS, "Pad", wrong)
    nodes, values = between(node("Relu", ["r"], ["q"]), node("Pad", ["q", "pads"], ["u"], name="the pad"))
    values["pads"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    if last == "saturated":
        values["far"] = np.float32(100.0)
        nodes[-1].output[0] = "z"
        nodes += [node("Add", ["z", "far"], ["a"]), node("Sigmoid", ["a"], ["y"])]
    elif last == "Sigmoid":
        nodes[-1].output[0] = "z"
        nodes.append(node("Sigmoid", ["z"], ["y"]))
    with pytest.raises(UserError, match=r"differs from the file, first at operator Pad \(the pad\); "):
        from_onnx(network(nodes, values))


def test_numbers_that_are_not_finite() -> None:
    """The logarithm of what may be negative: images are tried that give numbers."""
    nodes, values = between(node("Exp", ["r"], ["u"]))
    nodes.insert(0, node("Log", ["x0"], ["x"]))
    model = network(nodes, values)
    model.graph.input[0].name = "x0"
    from_onnx(model)


@pytest.mark.parametrize("slope", [0.3, 30.0])
def test_a_sigmoid_whose_outputs_are_tiny(slope: float) -> None:
    """Runtimes differ by what rounding at 1 does, which is as large as the outputs; a wrong network is still found."""
    nodes, values = between(node("Relu", ["r"], ["u"]))
    values |= {"low": np.full((1, 4, 1, 1), -15.0, np.float32), "slope": np.full((1, 1, 1, 1), slope, np.float32)}
    nodes = [*nodes[:-1], node("Mul", ["d", "slope"], ["e"]), node("Add", ["e", "low"], ["f"])]
    good = network([*nodes, node("Sigmoid", ["f"], ["y"])], values)
    mod = from_onnx(good)
    assert "sigmoid" in str(mod)


def test_a_wrong_network_behind_a_tiny_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, values = between(node("Relu", ["r"], ["u"]))
    values["low"] = np.full((1, 4, 1, 1), -15.0, np.float32)
    model = network([*nodes[:-1], node("Add", ["d", "low"], ["f"]), node("Sigmoid", ["f"], ["y"])], values)
    real = from_onnx_module.canonicalise

    def wrong(mod: Any, *arguments: Any) -> Any:
        bridge = TorchBridge(real(mod, *arguments))
        for site in bridge.sites[:1]:
            bridge.site_parameters(site).weight.mul_(1.1)
        return bridge.to_relax()

    monkeypatch.setattr(from_onnx_module, "canonicalise", wrong)
    with pytest.raises(UserError, match=r"differs from the file, first at operator Conv \(c\)"):
        from_onnx(model)
