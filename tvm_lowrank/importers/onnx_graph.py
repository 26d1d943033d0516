"""ONNX graphs made ready for import: read as float32, channels first, in versions that are known, constants folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference, version_converter

from tvm_lowrank.importers.onnx_run import run_node

DOMAINS = ("", "ai.onnx")
_OLDEST = 10  # opset; from here on TVM's importer knows how operators take what used to be attributes
_REALS = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_FIRST = [0, 3, 1, 2]  # from channels last to channels first
_POINTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Neg", "Pow", "Sub"}


def opset_of(model: ModelProto) -> int:
    """The version of the operators."""
    return next((o.version for o in model.opset_import if o.domain in DOMAINS), 1)


def copied(model: ModelProto) -> ModelProto:
    """A model that may be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def inputs_of(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no weights."""
    weights = {w.name for w in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in weights]


def updated(model: ModelProto) -> ModelProto:
    """The model in a newer version of ONNX if its own is too old."""
    if opset_of(model) >= _OLDEST:
        return model
    try:
        return version_converter.convert_version(model, _OLDEST)
    except Exception:  # it does not know all operators; TVM's importer may
        return model


def in_float32(model: ModelProto) -> ModelProto:
    """The model with all other floating-point numbers read as float32."""
    model = copied(model)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _REALS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    for tensor in (*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)):
        if tensor.data_type in _REALS:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _REALS:
                attribute.i = TensorProto.FLOAT
    return model


def channels_first(model: ModelProto) -> tuple[ModelProto, frozenset[str]]:
    """The model of N x H x W x C images as one of N x C x H x W, and the values that it has in another order.

    It is such a model if nothing but arithmetic on single pixels comes before a transpose to channels first; others
    stay as they are.
    """
    (image,) = inputs_of(model)
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    chain = list(_chain(model, image.name, constants))
    if not chain or not _transposes(chain[-1], _FIRST):
        return model, frozenset()
    changed = copied(model)
    del changed.graph.node[:], changed.graph.value_info[:]
    names = {node.output[0] for node in chain}
    for node in model.graph.node:
        if not node.output or node.output[0] not in names:
            changed.graph.node.append(node)
        elif node.output[0] == chain[-1].output[0]:
            changed.graph.node.append(helper.make_node("Identity", node.input, node.output))
        else:
            changed.graph.node.append(_with_constants(changed.graph, node, constants))
    dims = next(i for i in changed.graph.input if i.name == image.name).type.tensor_type.shape.dim
    order = [onnx.TensorShapeProto.Dimension() for _ in _FIRST]
    for dim, source in zip(order, _FIRST, strict=True):
        dim.CopyFrom(dims[source])
    for dim, source in zip(dims, order, strict=True):
        dim.CopyFrom(source)
    return changed, frozenset((names - {chain[-1].output[0]}) | {image.name})


def _transposes(node: NodeProto, order: Sequence[int]) -> bool:
    return node.op_type == "Transpose" and any(list(a.ints) == list(order) for a in node.attribute)


def _chain(model: ModelProto, name: str, constants: Mapping[str, np.ndarray]) -> Iterator[NodeProto]:
    """The operators on single pixels from a value on, each the only use of the one before, and what comes then."""
    while True:
        users = [node for node in model.graph.node if name in node.input]
        if len(users) != 1 or name in {output.name for output in model.graph.output}:
            return
        yield users[0]
        others = [other for other in users[0].input if other and other != name]
        if users[0].op_type not in _POINTWISE or any(constants.get(o, np.empty([0] * 5)).ndim > 4 for o in others):
            return
        name = users[0].output[0]


def _with_constants(graph: onnx.GraphProto, node: NodeProto, constants: Mapping[str, np.ndarray]) -> NodeProto:
    """An operator on channels-last images as the same on channels-first ones."""
    changed = NodeProto()
    changed.CopyFrom(node)
    for i, name in enumerate(node.input):
        if name in constants and constants[name].ndim:
            array = constants[name].reshape([1] * (4 - constants[name].ndim) + list(constants[name].shape))
            changed.input[i] = f"{node.output[0]}.input{i}"
            turned = np.ascontiguousarray(array.transpose(_FIRST))
            graph.initializer.append(numpy_helper.from_array(turned, changed.input[i]))
    return changed


def shapes_folded(model: ModelProto, name: str, shape: Sequence[int]) -> ModelProto:
    """The model for inputs of a fixed shape, with the arithmetic on shapes done."""
    fixed = copied(model)
    given = next(i for i in fixed.graph.input if i.name == name)
    given.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    while True:
        before = len(fixed.graph.node)
        fixed = constants_folded(fixed, _known_shapes(fixed))
        if len(fixed.graph.node) == before or not any(node.op_type == "Shape" for node in fixed.graph.node):
            return constants_folded(fixed, {})


def _known_shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        v.name: tuple(int(d.dim_value) for d in v.type.tensor_type.shape.dim)
        for v in [*inferred.value_info, *inferred.input]
        if v.type.tensor_type.HasField("shape") and all(d.dim_value for d in v.type.tensor_type.shape.dim)
    }


def constants_folded(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> ModelProto:
    """The model with what depends on constants only worked out: shapes, pads and axes, and weights that are computed.

    ``shapes`` are those that are known, by the name of the value.
    """
    values = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    folded = copied(model)
    del folded.graph.node[:]
    for node in model.graph.node:
        outputs = _constant_outputs(node, values, shapes, opset_of(model))
        if outputs is None:
            folded.graph.node.append(node)
            continue
        for name, value in zip(node.output, outputs, strict=True):
            values[name] = value
            folded.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return cut(folded, [output.name for output in folded.graph.output])


def _constant_outputs(
    node: NodeProto, values: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], opset: int
) -> list[np.ndarray] | None:
    if node.op_type == "Shape" and node.input[0] in shapes:
        bounds = {a.name: a.i for a in node.attribute}
        return [np.array(shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")], np.int64)]
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        return [numpy_helper.to_array(node.attribute[0].t)]
    if node.domain not in DOMAINS or node.op_type in _RANDOM or any(name and name not in values for name in node.input):
        return None
    if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        return None
    try:
        return run_node(node, values, opset)
    except Exception:  # an operator that is not known, which the importer says better
        return None


def cut(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The part of a model that makes some of its values, which are its outputs."""
    part, needed, kept = copied(model), set(names), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= _read(node)
    weights = [weight for weight in part.graph.initializer if weight.name in needed]
    inputs = inputs_of(part)  # older versions list the weights among them
    del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.initializer[:]
    part.graph.node.extend(reversed(kept))
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    part.graph.input.extend(inputs)
    part.graph.initializer.extend(weights)
    part.ir_version = max(part.ir_version, 4)
    return part


def _read(node: NodeProto) -> set[str]:
    """The values that an operator, or the branches and bodies in it, may read."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    outputs = {output.name for graph in graphs for output in graph.output}
    return outputs.union(node.input, *(_read(inner) for graph in graphs for inner in graph.node))
