"""ONNX models in int8 read as float32: without the pairs of QuantizeLinear and DequantizeLinear on activations.

A pair rounds a value to whole multiples of a scale, and limits it to the range of these. The rounding is left out. The
range stays where it starts at 0 and the value might be less: tools leave out a ReLU or a ReLU6 that a range implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tvm_lowrank.importers.onnx_graph import copied, opset_of

# whose values are never less than 0, in a network where a range that starts at 0 follows; always, or if what they read
# first is not, or all that they read
_ALWAYS = {"Clip", "HardSigmoid", "Relu", "Sigmoid", "Softmax"}
_IF_FIRST = {"AveragePool", "Flatten", "GlobalAveragePool", "Identity", "MaxPool", "ReduceMean", "Reshape", "Transpose"}
_IF_ALL = {"Add", "Concat", "Mul"}


def without_pairs(model: ModelProto) -> tuple[ModelProto, int]:
    """A model without the pairs on its activations, and how many it had; those on weights stay.

    A QuantizeLinear stays whose scale is not one known number, or whose result is used as whole numbers.
    """
    if all(node.op_type != "QuantizeLinear" for node in model.graph.node):
        return model, 0
    constants = _constants(model)
    pairs = _pairs(model, constants)
    changed = copied(model)
    del changed.graph.node[:]
    positive: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in pairs:
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in pairs:
            quantise = pairs[node.input[0]]
            node = _instead(changed, quantise, node, constants, positive=quantise.input[0] in positive)
        changed.graph.node.append(node)
        read = [name in positive for name in node.input]
        if (
            node.op_type in _ALWAYS
            or (node.op_type in _IF_FIRST and read[0])
            or (node.op_type in _IF_ALL and all(read))
        ):
            positive.update(node.output)
    return changed, len(pairs)


def _constants(model: ModelProto) -> dict[str, np.ndarray]:
    found = {own.name: numpy_helper.to_array(own) for own in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def _pairs(model: ModelProto, constants: Mapping[str, np.ndarray]) -> dict[str, NodeProto]:
    """The first nodes of pairs, by what they give."""
    outputs = {output.name for output in model.graph.output}
    found = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants and node.output[0] not in outputs
    }
    for node in model.graph.node:
        for name in found.keys() & set(node.input):
            grid = _grid(found[name], constants)
            if node.op_type != "DequantizeLinear" or grid is None or grid != _grid(node, constants):
                del found[name]
    return found


def _grid(node: NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[float, int, np.dtype[Any]] | None:
    """Scale, zero and type of whole numbers, if they are the same for the whole tensor and known."""
    scale = constants.get(node.input[1])
    if len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
    else:
        zero = None if any(own.name == "output_dtype" for own in node.attribute) else np.array(0, "uint8")
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return None
    return float(scale.reshape(())), int(zero.reshape(())), zero.dtype


def _instead(
    model: ModelProto,
    quantise: NodeProto,
    dequantise: NodeProto,
    constants: Mapping[str, np.ndarray],
    *,
    positive: bool,
) -> NodeProto:
    """What stands in a model for a pair."""
    grid = _grid(quantise, constants)
    assert grid is not None
    (scale, zero, kind), value, name = grid, quantise.input[0], dequantise.output[0]
    if positive or zero != np.iinfo(kind).min:
        return helper.make_node("Identity", [value], [name], dequantise.name)
    largest = scale * (int(np.iinfo(kind).max) - zero)
    if opset_of(model) < 11:
        return helper.make_node("Clip", [value], [name], dequantise.name, min=0.0, max=largest)
    real = constants[quantise.input[1]].dtype
    bounds = {f"{name}.least": np.array(0, real), f"{name}.largest": np.array(largest, real)}
    model.graph.initializer.extend(numpy_helper.from_array(own, bound) for bound, own in bounds.items())
    return helper.make_node("Clip", [value, *bounds], [name], dequantise.name)
