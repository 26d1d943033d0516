"""Convolutions in int8 as ONNX has them: pairs of QuantizeLinear and DequantizeLinear, and int8 weights.

The exporter writes the network in float32, with the values that matter here as further outputs (`marks`): so each is
found by a name that was given to it. Pairs stand where `TorchBridge` rounds. A runtime that knows this form computes in
integers what is between a DequantizeLinear and the next QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.formats import FLOAT32, FORMATS, Grid, quantised
from tvm_lowrank.graph import Site, bias_adds, bindings, find_sites
from tvm_lowrank.importers.onnx_run import runner
from tvm_lowrank.precision import formats_of, kept_operands, stored, with_formats, without_formats

_ROUNDING = 1e-4  # of the outputs
_IMAGES = 4
_MOVING = {"Concat", "MaxPool", "Reshape", "Transpose"}  # operators that runtimes move pairs across


def marks(function: relax.Function) -> list[relax.Var]:
    """The variables of a function whose values `with_pairs` has to find; none without convolutions in int8."""
    names, adds = _operands(function), bias_adds(function)
    convs = [binding.var for binding in bindings(function) if binding.var.name in names]
    return list(dict.fromkeys([*_rounded(function), *convs, *(adds[conv].var for conv in convs if conv in adds)]))


def _operands(function: relax.Function) -> dict[str, Grid]:
    """The grids of what convolutions in int8 read, by their names."""
    return {name: kept.grid for name, kept in kept_operands(function).items() if kept.grid is not None}


def _rounded(function: relax.Function) -> dict[relax.Var, Grid]:
    """The grids of variables that are rounded for all who read them."""
    return {var: kept.grid for var, kept in stored(function).items() if kept.grid is not None}


def with_pairs(model: ModelProto, mod: IRModule, names: Sequence[str]) -> ModelProto:
    """An exported network with its convolutions in int8.

    Parameters
    ----------
    model : the network in float32, the last outputs of which are the values of `marks`; the result lacks these.
    mod : the same as a canonical module with its formats, of which int8 alone is looked at.
    names : of those outputs.

    Raises
    ------
    ValueError
        If a convolution is not found in the exported network.
    """
    function, graph = mod["main"], model.graph
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    value: dict[relax.Var, str] = {}
    for var, name in zip(marks(function), names, strict=True):
        while name in same:  # it has another name in the graph, such as the input's
            name = same[name]
        value[var] = name
    kept = {value[var]: grid for var, grid in _rounded(function).items()}
    convs = {value[conv.var]: conv for conv in _convolutions(mod)}
    ends = {conv.var: value[conv.end] for conv in convs.values() if conv.end is not None}
    parts = _Parts()
    inputs = [own.name for own in graph.input if own.name in kept]
    read = {name: parts.pair(name, f"{name}.kept", kept[name]) for name in inputs}
    for old in graph.node:
        if old.output[0] in ends.values():
            continue  # the addition of a bias, which its convolution has now
        node = NodeProto()
        node.CopyFrom(old)
        node.input[:] = [read.get(name, name) for name in old.input]
        conv = convs.pop(old.output[0], None) if old.op_type == "Conv" else None
        if conv is not None:
            parts.convolution(node, conv)
            node.output[0] = ends.get(conv.var, node.output[0])
        elif old.op_type == "Conv":
            parts.in_float32(node)
        elif old.op_type in _MOVING and parts.rounded & set(node.input):
            parts.rounded.update(node.output)
        outputs = list(node.output)
        node.output[:] = [f"{name}.exact" if name in kept else name for name in outputs]
        parts.nodes.append(node)
        for name in kept.keys() & set(outputs):
            parts.pair(f"{name}.exact", name, kept[name])
    if convs:
        raise ValueError(f"the exported network has no {', '.join(conv.site.id for conv in convs.values())}")
    return parts.together(model, without=set(names))


@dataclass(frozen=True, eq=False)
class _Convolution:
    """A convolution in int8, its variable and that of its sum with the bias if it has one.

    ``grid`` is that of what it reads, or None where this is rounded already.
    """

    site: Site
    var: relax.Var
    end: relax.Var | None
    grid: Grid | None


def _convolutions(mod: IRModule) -> list[_Convolution]:
    function = mod["main"]
    operands, rounded, adds = _operands(function), _rounded(function), bias_adds(function)
    sites = {site.id: site for site in find_sites(mod)}
    return [
        _Convolution(
            sites[own.var.name],
            own.var,
            adds[own.var].var if own.var in adds else None,
            None if own.value.args[0] in rounded else operands[own.var.name],
        )
        for own in bindings(function)
        if own.var.name in operands
    ]


@dataclass
class _Parts:
    """The nodes and constants of a graph that is being written."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: dict[tuple[str, Grid], str] = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)  # values, by name

    def pair(self, value: str, rounded: str, grid: Grid) -> str:
        """Write what rounds a value to a grid; returns the name of the result."""
        scale, zero, whole = (f"{rounded}.{part}" for part in ("scale", "zero", "whole"))
        self.constants |= {scale: np.array(grid.scale, FLOAT32), zero: np.array(grid.zero, "uint8")}
        self.nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [whole], whole))
        self.nodes.append(helper.make_node("DequantizeLinear", [whole, scale, zero], [rounded], rounded))
        self.rounded.add(rounded)
        return rounded

    def convolution(self, node: NodeProto, conv: _Convolution) -> None:
        """Write the constants of a convolution, and let its node read them."""
        name, image = conv.site.id, node.input[0]
        if conv.grid is not None:
            if (image, conv.grid) not in self.pairs:
                self.pairs[image, conv.grid] = self.pair(image, f"{name}.input", conv.grid)
            image = self.pairs[image, conv.grid]
        weight, bias = f"{name}.weight", f"{name}.bias"
        whole, scales = quantised(conv.site.weight)
        parts = {f"{weight}.whole": whole, f"{weight}.scale": scales, f"{weight}.zero": np.zeros(len(scales), "int8")}
        self.constants |= parts
        self.nodes.append(helper.make_node("DequantizeLinear", list(parts), [weight], weight, axis=0))
        node.input[:] = [image, weight]
        if conv.end is not None and conv.site.bias is not None:
            self.constants[bias] = conv.site.bias
            node.input.append(bias)

    def in_float32(self, node: NodeProto) -> None:
        """Keep the weights of a convolution that is not in int8 from being rounded.

        ONNX Runtime makes one of one scale for all channels of any that stands between two pairs, unless something
        else is in between: here the maximum of one value.
        """
        image = node.input[0]
        if image in self.rounded:
            node.input[0] = f"{image}.float32"
            if not any(node.input[0] in own.output for own in self.nodes):
                self.nodes.append(helper.make_node("Max", [image], [node.input[0]], node.input[0]))

    def together(self, model: ModelProto, without: set[str]) -> ModelProto:
        """The model with this graph, but for some of its outputs and what nothing reads."""
        whole = ModelProto()
        whole.CopyFrom(model)
        graph = whole.graph
        outputs = [output for output in graph.output if output.name not in without]
        read = {output.name for output in outputs}
        nodes = []
        for node in reversed(self.nodes):
            if read & set(node.output):
                nodes.append(node)
                read |= set(node.input)
        constants = [own for own in graph.initializer if own.name in read]
        constants += [numpy_helper.from_array(own, name) for name, own in self.constants.items()]
        shapes = [own for own in graph.value_info if own.name in read]
        for part, own in zip(
            (graph.node, graph.output, graph.initializer, graph.value_info),
            (nodes[::-1], outputs, constants, shapes),
            strict=True,
        ):
            del part[:]
            part.extend(own)
        return whole


def check(model: ModelProto, mod: IRModule) -> None:
    """Compare a model with pairs with what `TorchBridge` makes of random images.

    Numbers in the middle between two steps of a grid become the one or the other, and may move others in later layers.
    That changes the outputs by less than the grids themselves do, which move almost every number by up to half a step.
    What half precision changes is allowed as well.

    Raises
    ------
    ValueError
        If the outputs are further apart.
    """
    formats = formats_of(mod["main"])
    half = [site for site, format in formats.items() if not FORMATS[format].whole]
    mods = mod, with_formats(mod, dict.fromkeys(half, FLOAT32)), without_formats(mod)
    bridges = [TorchBridge(own) for own in mods]
    inputs, rng = bridges[0].inputs, np.random.default_rng(0)
    images = [rng.standard_normal((_IMAGES, *shape), dtype=np.float32) for shape in inputs.shapes]
    found = runner(model)({given.name: own for given, own in zip(model.graph.input, images, strict=True)})
    with torch.no_grad():
        x = inputs.images([torch.from_numpy(own) for own in images])
        answers = [[own.double().numpy() for own in bridge.outputs.parted(bridge(x))] for bridge in bridges]
    for got, wanted, whole, exact in zip(found, *answers, strict=True):
        most = _size(wanted - exact) + _size(wanted - whole) + _ROUNDING * _size(wanted)
        if not (off := _size(got - wanted)) <= most:
            raise ValueError(f"its outputs in ONNX Runtime are off by {off:.3g}, of which {most:.3g} may be rounding")


def _size(values: np.ndarray) -> float:
    """The root of the mean square of numbers."""
    return float(np.sqrt(np.mean(np.square(values))))
