"""ONNX's own tests: the light models, and the tests of single operators, with the outputs that come with them.

A network consists of more than one operator, and of images. So an operator's test becomes a network: its first input
is the image, reshaped from four dimensions, after a convolution that changes nothing; the other inputs are constants.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.from_onnx import from_onnx

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
LARGE = {"light_bvlc_alexnet", "light_vgg19", "light_zfnet512"}  # hundreds of megabytes of weights, all the same

# the operators that ONNX files may hold, in units of what a network does to images
CLAIMED = set(
    re.findall(
        r"\w+",
        """
        Abs Acos Add Asin Atan AveragePool BatchNormalization Ceil Clip Concat Conv ConvTranspose Cos Cosh
        DepthToSpace Div Dropout Elu Erf Exp Expand Flatten Floor Gather Gelu Gemm GlobalAveragePool
        GlobalMaxPool GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LRN
        LayerNormalization LeakyRelu Log LogSoftmax MatMul Max MaxPool Mean Min Mish Mul Neg PRelu Pad Pow
        Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Reshape Resize Round Selu Sigmoid Sign Sin Sinh Slice Softmax Softplus Softsign
        SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Transpose Unsqueeze Upsample
        """,
    )
)


def answer(mod: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return TorchBridge(mod)(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    "name",
    [pytest.param(p.stem, marks=[pytest.mark.slow] * (p.stem in LARGE)) for p in sorted(LIGHT.glob("*.onnx"))],
)
def test_light_models(name: str) -> None:
    mod = from_onnx(onnx.load(LIGHT / f"{name}.onnx"))
    tensor = onnx.TensorProto()
    tensor.ParseFromString((LIGHT / f"{name}_output_0.pb").read_bytes())
    expected = numpy_helper.to_array(tensor)
    shape = (1, *(int(d) for d in list(mod["main"].params[0].ty.shape)[1:]))
    x = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)  # what ONNX's runner takes
    np.testing.assert_allclose(answer(mod, x), expected.reshape(1, *expected.shape[1:]), rtol=1e-3, atol=1e-7)


CONCATENATED = ["2d_axis_1", "2d_axis_negative_1", "3d_axis_1", "3d_axis_2", "3d_axis_negative_1", "3d_axis_negative_2"]
NORMALISED = ["4d_axis0", "4d_axis_negative_4", "2d_axis0", "2d_axis_negative_2", "3d_axis0_epsilon"]
NORMALISED += ["3d_axis_negative_3_epsilon"]
ASPECT = [f"{way}sample_sizes_nearest_not_{size}" for way in ("up", "down") for size in ("larger", "smaller")]
# what is refused, and why; everything else passes
REFUSED = {
    "test_averagepool_2d_dilations": "dilation",
    "test_convtranspose_1d": "conv1d_transpose",
    "test_resize_tf_crop_and_resize_extrapolation_value": "extrapolates",
    "test_spacetodepth_crd_mode_example": "first at operator SpaceToDepth",
    # constants of several images, and operators on the first axis: they mix images
    **{f"test_concat_{case}": "batch" for case in CONCATENATED},
    **{f"test_layer_normalization_{case}": "batch" for case in NORMALISED},
    **{f"test_slice_{case}": "batch" for case in ("default_axes", "default_steps", "negative_axes")},
    **{f"test_resize_{case}": "aspect ratio" for case in ASPECT},
}
# ONNX Runtime and ONNX's reference disagree about the last position: 4.0 and 3.142857
DISPUTED = {f"test_resize_downsample_scales_{mode}_align_corners" for mode in ("linear", "cubic")}
TRAINING = ("training_mode", "training_dropout")


@cache
def node_tests() -> dict[str, Any]:
    """The tests of one claimed operator on several images of float32 numbers, by name.

    Tests of training, and tests in which the operator mixes what would be the images, are left out.
    """
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    found = {}
    for case in collect_testcases(None):
        nodes, sets = case.model.graph.node, case.data_sets
        if len(nodes) != 1 or nodes[0].op_type not in CLAIMED or not sets or any(t in case.name for t in TRAINING):
            continue
        first, answer = (values[0] if values else None for values in sets[0])
        if not isinstance(first, np.ndarray) or first.dtype != np.float32 or not 1 <= first.ndim <= 4:
            continue
        if first.size and np.ndim(answer) and len(answer) == len(first) and case.name not in DISPUTED:
            found[case.name] = case
    np.random.set_state(state)  # noqa: NPY002
    return found


def network(case: Any, batch: str | int) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """A test as a network, the images that it takes, and what it gives for them.

    another input has one value for each image too, the network is that of the first image.
    """
    (image, *others), (expected, *_) = case.data_sets[0]
    node, (name, *names) = case.model.graph.node[0], [i.name for i in case.model.graph.input]
    if any(np.ndim(other) == image.ndim and len(other) == len(image) > 1 for other in others):
        others = [v[:1] if np.ndim(v) == image.ndim and len(v) == len(image) else v for v in others]
        image, expected = image[:1], expected[:1]
    channels = image.shape[1] if image.ndim > 1 else 1
    weights = {n: np.asarray(v) for n, v in zip(names, others, strict=True)}
    weights |= {"_w": np.eye(channels, dtype=np.float32)[:, :, None, None]}
    weights |= {"_shape": np.array([-1, *image.shape[1:]], np.int64)}
    x = image.reshape(*image.shape, *[1] * (4 - image.ndim))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["_x", "_w"], ["_c"]), helper.make_node("Reshape", ["_c", "_shape"], [name]), node],
        case.name,
        [helper.make_tensor_value_info("_x", onnx.TensorProto.FLOAT, (batch or len(x), *x.shape[1:]))],
        [helper.make_empty_tensor_value_info(case.model.graph.output[0].name)],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=case.model.opset_import, ir_version=case.model.ir_version)
    return model, x, np.asarray(expected)


def outcome(case: Any) -> str:
    """What becomes of a test, of any batch or of its own: passed, or why it is refused; a wrong answer is an error."""
    for batch in ("N", 0):
        model, x, expected = network(case, batch)
        try:
            mod = from_onnx(model)
        except UserError as error:
            reason = str(error)
            continue
        np.testing.assert_allclose(answer(mod, x), expected, rtol=max(case.rtol, 1e-3), atol=max(case.atol, 1e-5))
        return "passed"
    return reason


def test_node_tests() -> None:
    outcomes = {name: outcome(case) for name, case in node_tests().items()}
    refused = {name: reason for name, reason in outcomes.items() if reason != "passed"}
    assert set(refused) == set(REFUSED), set(refused) ^ set(REFUSED)
    assert all(REFUSED[name] in reason for name, reason in refused.items()), refused
    assert len(outcomes) - len(refused) >= 333
    passed = {node_tests()[name].model.graph.node[0].op_type for name in set(outcomes) - set(refused)}
    assert CLAIMED - passed == {"Concat"}
