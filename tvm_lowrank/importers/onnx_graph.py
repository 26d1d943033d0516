"""ONNX models made ready for import: read as float32, channels first, in known versions, constants folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference, version_converter

from tvm_lowrank.importers.onnx_run import run_node

DOMAINS = ("", "ai.onnx")
_SMALL = 4096  # numbers of a weight that a shape may depend on
_OLDEST = 10  # opset; from here on TVM's importer knows how operators take what used to be attributes
REALS = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# operators that also give what a training needs: statistics, masks, indices
_ALSO = {"BatchNormalization", "Dropout", "MaxPool"}
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


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its weights, and these beside it by name: they are large, and a model is copied often."""

    model: ModelProto
    weights: Mapping[str, np.ndarray]

    def part(self, names: Sequence[str]) -> Skeleton:
        """The part that makes some of its values, which are its outputs."""
        return replace(self, model=cut(self.model, names))

    def whole(self) -> ModelProto:
        """The model with its small weights, and with the others as inputs: all that shapes depend on."""
        model = copied(self.model)
        for name, array in self.weights.items():
            if array.size <= _SMALL:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        return model


def skeleton(model: ModelProto) -> Skeleton:
    """A model as one in float32, whatever its floating-point numbers are, in a version of ONNX that TVM knows."""
    weights = {w.name: _real(numpy_helper.to_array(w)) for w in model.graph.initializer}
    bare = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(inputs_of(model))
    bare.graph.output.extend(model.graph.output)
    for value in (*bare.graph.input, *bare.graph.output):
        if value.type.tensor_type.elem_type in REALS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for attribute in (a for node in bare.graph.node for a in node.attribute):
        if attribute.name in ("to", "dtype") and attribute.i in REALS:
            attribute.i = TensorProto.FLOAT
        if attribute.t.data_type in REALS:
            array = _real(numpy_helper.to_array(attribute.t))
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
    return constants_folded(_updated(Skeleton(bare, weights)), {})


def _real(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if helper.np_dtype_to_tensor_dtype(array.dtype) in REALS else array


def _updated(source: Skeleton) -> Skeleton:
    """The model in a newer version of ONNX if its own is too old."""
    if opset_of(source.model) >= _OLDEST:
        return source
    try:
        model = version_converter.convert_version(source.whole(), _OLDEST)
    except Exception:  # it does not know all operators; TVM's importer may
        return source
    inputs = {i.name for i in source.model.graph.input}
    made = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    kept = [i for i in model.graph.input if i.name in inputs]
    del model.graph.initializer[:], model.graph.input[:], model.graph.value_info[:]
    model.graph.input.extend(kept)
    return Skeleton(model, {**source.weights, **made})


def channels_first(source: Skeleton) -> tuple[Skeleton, frozenset[str]]:
    """The model of N x H x W x C images as one of N x C x H x W, and the values that it has in another order.

    It is such a model if nothing but arithmetic on single pixels comes before a transpose to channels first; others
    stay as they are, as do those of several inputs.
    """
    if len(source.model.graph.input) > 1:
        return source, frozenset()
    model, (image,) = source.model, source.model.graph.input
    chain = list(_chain(model, image.name, source.weights))
    if not chain or not _turns(chain[-1], image, source.weights):
        return source, frozenset()
    changed, weights = copied(model), dict(source.weights)
    del changed.graph.node[:], changed.graph.value_info[:]
    names = {node.output[0] for node in chain}
    for node in model.graph.node:
        if not node.output or node.output[0] not in names:
            changed.graph.node.append(node)
        elif node.output[0] == chain[-1].output[0]:
            changed.graph.node.append(helper.make_node("Identity", node.input, node.output))
        else:
            changed.graph.node.append(_with_constants(node, weights))
    dims = changed.graph.input[0].type.tensor_type.shape.dim
    order = [onnx.TensorShapeProto.Dimension() for _ in dims]
    for dim, place in zip(order, _FIRST, strict=False):
        dim.CopyFrom(dims[place])
    for dim, first in zip(dims, order, strict=True):
        dim.CopyFrom(first)
    return Skeleton(changed, weights), frozenset((names - {chain[-1].output[0]}) | {image.name})


def _turns(node: NodeProto, image: onnx.ValueInfoProto, weights: Mapping[str, np.ndarray]) -> bool:
    """Whether an operator makes channels-last images channels first; a single channel need only be reshaped."""
    if node.op_type == "Reshape" and node.input[1] in weights:
        height, width, channels = ([d.dim_value for d in image.type.tensor_type.shape.dim] + [0] * 4)[1:4]
        return channels == 1 and height > 1 and weights[node.input[1]].tolist()[1:] == [1, height, width]
    return node.op_type == "Transpose" and any(list(a.ints) == _FIRST for a in node.attribute)


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


def _with_constants(node: NodeProto, weights: dict[str, np.ndarray]) -> NodeProto:
    """An operator on channels-last images as the same on channels-first ones; its weights are added."""
    changed = NodeProto()
    changed.CopyFrom(node)
    for i, name in enumerate(node.input):
        if name in weights and weights[name].ndim:
            array = weights[name].reshape([1] * (4 - weights[name].ndim) + list(weights[name].shape))
            changed.input[i] = f"{node.output[0]}.input{i}"
            weights[changed.input[i]] = np.ascontiguousarray(array.transpose(_FIRST))
    return changed


def shapes_folded(source: Skeleton, shapes: Mapping[str, Sequence[int]]) -> Skeleton:
    """The model for inputs of fixed shapes, with the arithmetic on shapes done."""
    model = copied(source.model)
    for image in model.graph.input:
        image.CopyFrom(helper.make_tensor_value_info(image.name, TensorProto.FLOAT, shapes[image.name]))
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    fixed = replace(source, model=model)
    while any(node.op_type == "Shape" for node in fixed.model.graph.node):
        before = len(fixed.model.graph.node)
        fixed = constants_folded(fixed, _known_shapes(fixed))
        if len(fixed.model.graph.node) == before:
            break
    return fixed


def _known_shapes(source: Skeleton) -> dict[str, tuple[int, ...]]:
    inferred = shape_inference.infer_shapes(source.whole(), data_prop=True).graph
    return {
        v.name: tuple(int(d.dim_value) for d in v.type.tensor_type.shape.dim)
        for v in [*inferred.value_info, *inferred.input]
        if v.type.tensor_type.HasField("shape") and all(d.dim_value for d in v.type.tensor_type.shape.dim)
    }


def constants_folded(source: Skeleton, shapes: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """The model with what depends on constants only worked out: shapes, pads and axes, and weights that are computed.

    ``shapes`` are those that are known, by the name of the value.
    """
    weights, kept = dict(source.weights), []
    for node in source.model.graph.node:
        outputs = _constant_outputs(node, weights, shapes, opset_of(source.model))
        if outputs is None:
            kept.append(node)
        else:
            weights.update(zip(node.output, outputs, strict=True))
    model = copied(source.model)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return Skeleton(cut(model, [output.name for output in model.graph.output]), weights)


def _constant_outputs(
    node: NodeProto, weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], opset: int
) -> list[np.ndarray] | None:
    if node.op_type == "Shape" and node.input[0] in shapes:
        bounds = {a.name: a.i for a in node.attribute}
        return [np.array(shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")], np.int64)]
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        return [numpy_helper.to_array(node.attribute[0].t)]
    if node.domain not in DOMAINS or node.op_type in _RANDOM or any(n and n not in weights for n in node.input):
        return None
    if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        return None
    try:
        return run_node(node, weights, opset)
    except Exception:  # an operator that is not known, which the importer says better
        return None


def cut(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The part of a model that makes some of its values, which are its outputs."""
    part, needed, kept = copied(model), set(names), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(_without_unread(node, needed) if node.op_type in _ALSO else node)
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


def _without_unread(node: NodeProto, needed: set[str]) -> NodeProto:
    """An operator without its last outputs if nobody reads them."""
    shortened = NodeProto()
    shortened.CopyFrom(node)
    while shortened.output[-1] not in needed:
        del shortened.output[-1]
    return shortened


def _read(node: NodeProto) -> set[str]:
    """The values that an operator, or the branches and bodies in it, may read."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    outputs = {output.name for graph in graphs for output in graph.output}
    return outputs.union(node.input, *(_read(inner) for graph in graphs for inner in graph.node))
