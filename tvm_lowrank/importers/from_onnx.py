"""ONNX files to the canonical Relax function."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax, tirx
from tvm.ir import GenericConst, IRModule
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import canonicalise, condense
from tvm_lowrank.importers.from_torch import quietly
from tvm_lowrank.importers.linear import weight_digest

# a batch that no other dimension of a network is likely to have, for graphs that TVM imports with a fixed one only
_UNUSUAL_BATCH = 61
_DOMAINS = ("", "ai.onnx")
_FOLDABLE = {"Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Gather", "Mul", "Range", "Reshape"}
_FOLDABLE |= {"ScatterElements", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
_SMALL = 4096


def from_onnx_file(path: Path, input_shape: tuple[int, ...] | None) -> IRModule:
    """The canonical Relax module of an ONNX file; `input_shape` (N, C, H, W) fills in dimensions that it leaves open.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    model = quietly(
        lambda: onnx.load(str(path)),
        lambda e: f"cannot load {path}: {condense(e)}; is it an ONNX file with its external data?",
    )
    return from_onnx(model, input_shape)


def from_onnx(model: onnx.ModelProto, input_shape: tuple[int, ...] | None = None) -> IRModule:
    """The canonical Relax module of a loaded ONNX model.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    name, shape = _input(model.graph, input_shape)
    if len(model.graph.output) != 1:
        outputs = ", ".join(o.name for o in model.graph.output)
        raise UserError(
            f"the model returns {len(model.graph.output)} tensors ({outputs}); cut the graph so that it returns one"
        )
    ids, linear_ids = _conv_ids(model.graph), _linear_ids(model.graph)
    if isinstance(shape[0], int) and shape[0] > 0:
        return canonicalise(_imported(model, name, shape), ids, linear_ids)
    try:
        return canonicalise(_imported(model, name, (tirx.Var("batch", "int64"), *shape[1:])), ids, linear_ids)
    except UserError:
        # shape arithmetic that TVM cannot follow symbolically becomes constants when the batch is fixed
        return canonicalise(_imported(model, name, (_UNUSUAL_BATCH, *shape[1:])), ids, linear_ids)


def _input(graph: onnx.GraphProto, input_shape: tuple[int, ...] | None) -> tuple[str, tuple[Any, ...]]:
    """The name and shape of the image input; an open batch is 0."""
    weights = {w.name for w in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs)
        raise UserError(f"the model has {len(inputs)} inputs ({names}); only one image input is supported")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise UserError(f"input {inputs[0].name!r} is {dtype}, not float32; export the model in float32")
    dims = [int(d.dim_value) for d in tensor.shape.dim]
    if len(dims) not in (0, 4):
        raise UserError(f"input {inputs[0].name!r} has {len(dims)} dimensions; images are N,C,H,W")
    dims = dims or [0, 0, 0, 0]
    if input_shape is not None and any(d and d != g for d, g in zip(dims[1:], input_shape[1:], strict=True)):
        given, has = "x".join(map(str, input_shape[1:])), "x".join(map(str, dims[1:]))
        raise UserError(f"the model takes images of {has}, not {given}; leave the input shape out")
    filled = [dims[0], *(d or (input_shape or dims)[i] for i, d in enumerate(dims[1:], 1))]
    if not all(filled[1:]):
        raise UserError(f"the model leaves the size of {inputs[0].name!r} open; give N,C,H,W such as 1,3,224,224")
    return inputs[0].name, tuple(filled)


class _Importer(ONNXGraphImporter):
    """TVM's importer with Relax operators where it emits kernels, and convolutions bound in the graph's order."""

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> relax.Expr:
        data = inputs[0] if len(inputs) else None
        if op_name == "Clip":
            return self.bb.normalize(_clip(data, inputs, attrs))
        if op_name == "Pad":
            return self.bb.normalize(_pad(data, inputs, attrs))
        if op_name == "Tile" and isinstance(inputs[1], GenericConst):
            return self.bb.normalize(relax.op.tile(data, [int(r) for r in inputs[1].value.numpy()]))
        if op_name == "Conv" and attrs.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
            attrs["pads"] = _same_pads(data, inputs[1], attrs)
            attrs["auto_pad"] = b"NOTSET"
        value = super()._convert_operator(op_name, inputs, attrs, opset)
        # left unbound, a convolution would be bound where it is first used, which is not the order of the nodes
        return self.bb.emit(value) if op_name == "Conv" else value


def _same_pads(data: relax.Expr, weight: relax.Expr, attrs: dict[str, Any]) -> list[int]:
    """The pads (befores, afters) of ``auto_pad``, so that the convolution keeps them instead of a kernel in front."""
    size, kernel = ([int(d) for d in list(expr.ty.shape)[2:]] for expr in (data, weight))
    strides = attrs.get("strides", [1] * len(size))
    dilations = attrs.get("dilations", [1] * len(size))
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return small + large if attrs["auto_pad"] == b"SAME_UPPER" else large + small


def _scalar(inputs: Any, index: int, default: float) -> float:
    if len(inputs) <= index or inputs[index] is None:
        return default
    if not isinstance(inputs[index], GenericConst):
        raise ValueError("a bound that is computed at run time")
    value = float(inputs[index].value.numpy())
    return default if np.isnan(value) else value


def _clip(data: relax.Expr, inputs: Any, attrs: dict[str, Any]) -> relax.Expr:
    low = _scalar(inputs, 1, float(attrs.get("min", -np.inf)))
    return relax.op.clip(data, low, _scalar(inputs, 2, float(attrs.get("max", np.inf))))


def _pad(data: relax.Expr, inputs: Any, attrs: dict[str, Any]) -> relax.Expr:
    pads = attrs.get("pads") or attrs.get("paddings")
    if pads is None:
        if not isinstance(inputs[1], GenericConst):
            raise ValueError("pads that are computed at run time")
        pads = [int(p) for p in inputs[1].value.numpy()]
    rank = len(data.ty.shape)
    axes: Sequence[int] = range(rank)
    if len(inputs) > 3 and inputs[3] is not None:
        axes = [int(a) % rank for a in inputs[3].value.numpy()]
    before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    width = [0] * (2 * rank)
    for axis, first, last in zip(axes, before, after, strict=True):
        width[2 * axis : 2 * axis + 2] = [first, last]
    if min(width) < 0:
        raise ValueError("negative pads")
    mode = attrs.get("mode", b"constant").decode()
    value = _scalar(inputs, 2, float(attrs.get("value", 0.0)))
    return relax.op.nn.pad(data, width, {"edge": "replicate", "wrap": "circular"}.get(mode, mode), value)


def _imported(model: onnx.ModelProto, name: str, shape: tuple[Any, ...]) -> IRModule:
    opset = next((o.version for o in model.opset_import if o.domain in _DOMAINS), 1)

    def run() -> IRModule:
        folded = _shapes_folded(model, name, shape) if isinstance(shape[0], int) else _constants_folded(model, {})
        return _Importer({name: list(shape)}, "float32").from_onnx(folded.graph, opset)

    return quietly(run, _unsupported)


def _shapes_folded(model: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The model for inputs of a fixed shape, with the arithmetic on shapes done."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    given = next(i for i in fixed.graph.input if i.name == name)
    given.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    del fixed.graph.value_info[:]
    fixed.graph.output[0].type.tensor_type.ClearField("shape")
    while any(node.op_type == "Shape" for node in fixed.graph.node):
        before = len(fixed.graph.node)
        inferred = onnx.shape_inference.infer_shapes(fixed).graph
        shapes = {
            v.name: tuple(int(d.dim_value) for d in v.type.tensor_type.shape.dim)
            for v in [*inferred.value_info, *inferred.input]
            if v.type.tensor_type.HasField("shape") and all(d.dim_value for d in v.type.tensor_type.shape.dim)
        }
        fixed = _constants_folded(fixed, shapes)
        if len(fixed.graph.node) == before:
            break
    return _constants_folded(fixed, {})


def _constants_folded(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model with its small constant arithmetic done: TVM needs pads, axes and shapes as plain constants."""
    values = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer if np.prod(w.dims) <= _SMALL}
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    del folded.graph.node[:]
    for node in model.graph.node:
        outputs = _constant_outputs(node, values, shapes)
        if outputs is None:
            folded.graph.node.append(node)
            continue
        for name, value in zip(node.output, outputs, strict=True):
            values[name] = value
            folded.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return folded


def _constant_outputs(
    node: onnx.NodeProto, values: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> list[np.ndarray] | None:
    if node.op_type == "Shape" and node.input[0] in shapes:
        bounds = {a.name: a.i for a in node.attribute}
        return [np.array(shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")], np.int64)]
    if node.op_type not in _FOLDABLE or any(name and name not in values for name in node.input):
        return None
    outputs = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input if name})
    return outputs if all(np.size(output) <= _SMALL for output in outputs) else None


def _unsupported(error: Exception) -> str:
    reason = condense(error)
    marker = "not supported for frontend ONNX:"
    if marker in reason:
        names = reason.partition(marker)[2].strip()
        return f"operator {names} is not supported by TVM's importer; replace it in the model"
    return f"TVM cannot import the model: {reason}; replace the operator in the model"


def _conv_ids(graph: onnx.GraphProto) -> list[str | None]:
    """The id of each 2-D convolution, in order: the exporter's scope, the weight's name, or the node's name."""
    ranks = {w.name: len(w.dims) for w in graph.initializer}
    return [_conv_id(node) for node in graph.node if node.op_type == "Conv" and ranks.get(node.input[1], 4) == 4]


def _linear_ids(graph: onnx.GraphProto) -> dict[str, str | None]:
    """The ids of the linear layers, by weight."""
    matrices = {w.name: w for w in graph.initializer if len(w.dims) == 2}
    ids = {}
    for node in graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices:
            weight = numpy_helper.to_array(matrices[node.input[1]])
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            ids[weight_digest(weight if transposed else weight.T)] = _conv_id(node)
    return ids


def _conv_id(node: onnx.NodeProto) -> str | None:
    return _module_path(node) or _weight_path(node.input[1]) or _node_path(node.name)


def _module_path(node: onnx.NodeProto) -> str | None:
    """What torch's exporter notes: ``['', 'layer1', 'layer1.conv1', 'conv2d_3']`` and the classes of these scopes."""
    notes = {p.key.removeprefix("pkg.torch.onnx."): p.value for p in node.metadata_props}
    try:
        scopes, classes = (ast.literal_eval(notes[key]) for key in ("name_scopes", "class_hierarchy"))
        is_layer = str(classes[-2]).rsplit(".", 1)[-1].startswith(("Conv", "Linear"))
        return str(scopes[-2]) or None if is_layer else None
    except (KeyError, ValueError, SyntaxError, IndexError, TypeError):
        return None


def _weight_path(name: str) -> str | None:
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def _node_path(name: str) -> str | None:
    """``/layer2/layer2.0/conv1/Conv_1`` is layer2.0.conv1; a Sequential's children carry its name in front."""
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts) or None
