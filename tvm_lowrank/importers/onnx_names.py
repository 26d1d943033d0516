"""The ids of an ONNX model's sites: what its exporter noted, or the names of its weights and nodes."""

from __future__ import annotations

import ast

import onnx

from tvm_lowrank.importers.linear import weight_digest
from tvm_lowrank.importers.onnx_graph import Skeleton


def conv_ids(source: Skeleton) -> list[str | None]:
    """The id of each 2-D convolution, in order: the exporter's scope, the weight's name, or the node's name."""
    weights = source.weights
    convs = [node for node in source.model.graph.node if node.op_type == "Conv"]
    return [_conv_id(node) for node in convs if node.input[1] not in weights or weights[node.input[1]].ndim == 4]


def linear_ids(source: Skeleton) -> dict[str, str | None]:
    """The ids of the linear layers, by weight."""
    ids = {}
    for node in source.model.graph.node:
        weight = source.weights.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if weight is not None and weight.ndim == 2:
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
