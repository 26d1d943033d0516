"""Runs ONNX models as their files say: with ONNX Runtime, and where that cannot, with ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def runner(model: onnx.ModelProto) -> Run:
    """The function that computes a model's outputs, in order, from its inputs by name."""
    try:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception:  # an operator or a type that it lacks, a version that is too new for it
        session = ReferenceEvaluator(model)
    return lambda feeds: [np.asarray(output) for output in session.run(None, dict(feeds))]


def run_node(node: onnx.NodeProto, values: Mapping[str, np.ndarray], opset: int) -> list[np.ndarray]:
    """The outputs of one operator of a version, from its inputs by name."""
    feeds = {name: np.asarray(values[name]) for name in node.input if name}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "node", inputs, outputs)
    imports = [helper.make_opsetid(node.domain, opset)]
    return runner(helper.make_model(graph, opset_imports=imports, ir_version=10))(feeds)
