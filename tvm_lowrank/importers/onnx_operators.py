"""ONNX operators to Relax: TVM's importer, with operators of our own where it has none, or emits kernels, or errs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper
from tvm import relax, tirx
from tvm.ir import GenericConst, IRModule
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from tvm_lowrank.importers.onnx_graph import Skeleton, opset_of
from tvm_lowrank.importers.onnx_run import run_node
from tvm_lowrank.importers.resize import resized

Attrs = dict[str, Any]
Convert = Callable[[relax.BlockBuilder, Any, Attrs], relax.Expr | None]  # None: TVM's importer does it
Prepare = Callable[[Any, Attrs], None]


class Importer(ONNXGraphImporter):
    """TVM's importer with Relax operators where it emits kernels, and convolutions bound in the graph's order."""

    def __init__(self, source: Skeleton, shapes: Mapping[str, Sequence[Any]]) -> None:
        super().__init__({name: list(shape) for name, shape in shapes.items()}, "float32")
        self._source = source

    def imported(self) -> IRModule:
        """The model as TVM's importer translates it."""
        graph = self._source.model.graph
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        self._nodes.update({name: relax.const(w) for name, w in self._source.weights.items() if name in read})
        return self.from_onnx(graph, opset_of(self._source.model))

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Attrs, opset: int) -> relax.Expr:
        if op_name in _CONVERTERS:
            own = _CONVERTERS[op_name](self.bb, inputs, {**attrs, "opset": opset})
            if own is not None:
                return self.bb.normalize(own)
        if op_name in _PREPARED:
            _PREPARED[op_name](inputs, attrs)
        value = super()._convert_operator(op_name, inputs, attrs, opset)
        # left unbound, a convolution would be bound where it is first used, which is not the order of the nodes
        return self.bb.emit(value) if op_name == "Conv" else value


def _spatial(expr: relax.Expr) -> list[int]:
    """The sizes of all axes after batch and channels."""
    sizes = list(expr.ty.shape)[2:]
    if not all(isinstance(n, tirx.IntImm) for n in sizes):
        raise ValueError("an image whose size is not known")
    return [int(n) for n in sizes]


def _constant(inputs: Any, index: int, what: str) -> np.ndarray | None:
    """A constant input; None if it is not given or empty."""
    value = inputs[index] if len(inputs) > index else None
    if value is None:
        return None
    if isinstance(value, relax.ShapeExpr) and all(isinstance(n, tirx.IntImm) for n in value.values[2:]):
        return np.array([int(n) if isinstance(n, tirx.IntImm) else 1 for n in value.values])
    if not isinstance(value, GenericConst):
        raise ValueError(f"{what} that is computed at run time")
    array = value.value.numpy()
    return array if array.size else None


def _scalar(inputs: Any, index: int, default: float) -> float:
    array = _constant(inputs, index, "a bound")
    return default if array is None or np.isnan(array).any() else float(array.reshape(()))


def _clip(_builder: relax.BlockBuilder, inputs: Any, attrs: Attrs) -> relax.Expr:
    low = _scalar(inputs, 1, float(attrs.get("min", -np.inf)))
    return relax.op.clip(inputs[0], low, _scalar(inputs, 2, float(attrs.get("max", np.inf))))


def _pad(_builder: relax.BlockBuilder, inputs: Any, attrs: Attrs) -> relax.Expr:
    pads = attrs.get("pads") or attrs.get("paddings")
    if pads is None:
        given = _constant(inputs, 1, "a padding")
        pads = [] if given is None else [int(p) for p in given]
    rank = len(inputs[0].ty.shape)
    given = _constant(inputs, 3, "a list of axes")
    axes: Sequence[int] = range(rank) if given is None else [int(a) % rank for a in given]
    before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    width = [0] * (2 * rank)
    for axis, first, last in zip(axes, before, after, strict=True):
        width[2 * axis : 2 * axis + 2] = [first, last]
    if min(width) < 0:
        raise ValueError("negative pads")
    mode = attrs.get("mode", b"constant").decode()
    value = _scalar(inputs, 2, float(attrs.get("value", 0.0)))
    return relax.op.nn.pad(inputs[0], width, {"edge": "replicate", "wrap": "circular"}.get(mode, mode), value)


def _tile(_builder: relax.BlockBuilder, inputs: Any, _attrs: Attrs) -> relax.Expr:
    repeats = _constant(inputs, 1, "a number of repeats")
    return inputs[0] if repeats is None else relax.op.tile(inputs[0], [int(r) for r in repeats])


def _gather(_builder: relax.BlockBuilder, inputs: Any, attrs: Attrs) -> relax.Expr | None:
    """At constant places, which TVM's importer would count at run time."""
    data, places = inputs
    if not isinstance(data, relax.Var) or not isinstance(places, GenericConst):
        return None
    axis, shape = int(attrs.get("axis", 0)), list(data.ty.shape)
    if not isinstance(shape[axis], tirx.IntImm):
        return None
    places = relax.const(places.value.numpy().astype("int64") % int(shape[axis]))
    return relax.op.take(data, places, axis % len(shape), mode="clip")


def _resize(builder: relax.BlockBuilder, inputs: Any, attrs: Attrs) -> relax.Expr:
    """By scales or to sizes; before opset 11 without a region, so that the scales are the second input."""
    rank, late = len(inputs[0].ty.shape), attrs["opset"] >= 11
    if rank != 4 or attrs.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise ValueError("a Resize of other than images, or one that keeps the aspect ratio")
    axes = [int(a) % rank for a in attrs.get("axes", range(rank))]
    given = {"scales": _constant(inputs, 2 if late else 1, "a scale"), "sizes": _constant(inputs, 3, "a size")}
    if given["scales"] is not None and any(s != 1 for a, s in zip(axes, given["scales"], strict=True) if a < 2):
        raise ValueError("a Resize of the batch or of the channels")
    roi = _constant(inputs, 1, "a region") if late else None
    matrices = []
    for axis, size in zip((2, 3), _spatial(inputs[0]), strict=True):
        if axis not in axes:
            matrices.append(np.eye(size))
            continue
        at = axes.index(axis)
        how = {name: values[at] for name, values in given.items() if values is not None}
        region = (0.0, 1.0) if roi is None else (roi[at], roi[at + len(axes)])
        matrices.append(_matrix(attrs, size, how, region))
    return resized(builder, inputs[0], *matrices)


def _matrix(attrs: Attrs, size: int, how: dict[str, Any], region: tuple[float, float]) -> np.ndarray:
    """What one axis is resized by, (new size, size): the operator's own work on the identity as an image."""
    own = {key: value for key, value in attrs.items() if key not in ("axes", "opset", "tvm_custom")}
    if own.get("coordinate_transformation_mode") == b"tf_crop_and_resize" and own.get("extrapolation_value"):
        raise ValueError("a Resize that extrapolates by another value than 0")
    values = {
        "x": np.eye(size, dtype=np.float32)[None, None],
        "roi": np.array([0, 0, 0, region[0], 1, 1, 1, region[1]], np.float32),
    }
    if "sizes" in how:
        values["sizes"] = np.array([1, 1, size, how["sizes"]], np.int64)
        inputs = ["x", "roi", "", "sizes"]
    else:
        values["scales"] = np.array([1, 1, 1, how["scales"]], np.float32)
        inputs = ["x", "roi", "scales"] if attrs["opset"] >= 11 else ["x", "scales"]
    (image,) = run_node(helper.make_node("Resize", inputs, ["y"], **own), values, attrs["opset"])
    return image[0, 0].T


def _conv_padding(inputs: Any, attrs: Attrs) -> None:
    """Pads instead of ``auto_pad``, so that the convolution keeps them instead of a kernel in front."""
    auto = attrs.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        size, kernel = _spatial(inputs[0]), _spatial(inputs[1])
        attrs["pads"] = _same_pads(auto, size, kernel, attrs)
        attrs["auto_pad"] = b"NOTSET"
    elif auto == b"VALID":
        attrs["pads"] = [0] * (2 * len(_spatial(inputs[1])))
        attrs["auto_pad"] = b"NOTSET"


def _pool_padding(inputs: Any, attrs: Attrs) -> None:
    auto = attrs.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        attrs["pads"] = _same_pads(auto, _spatial(inputs[0]), attrs["kernel_shape"], attrs)
        attrs["auto_pad"] = b"NOTSET"
    if attrs.get("ceil_mode") and _only_padding(_spatial(inputs[0]), attrs):
        attrs["ceil_mode"] = 0


def _only_padding(size: Sequence[int], attrs: Attrs) -> bool:
    """Whether each window that rounding up would add, if any, starts in the padding: there is none such in ONNX."""
    kernel, rank = attrs["kernel_shape"], len(size)
    strides, dilations = attrs.get("strides", [1] * rank), attrs.get("dilations", [1] * rank)
    pads = attrs.get("pads", [0] * (2 * rank))
    for n, k, s, d, before, after in zip(size, kernel, strides, dilations, pads[:rank], pads[rank:], strict=True):
        room = n + before + after - (k - 1) * d - 1
        if room % s and -(-room // s) * s < n + before:
            return False
    return True


def _same_pads(auto: bytes, size: Sequence[int], kernel: Sequence[int], attrs: Attrs) -> list[int]:
    """The pads (befores, afters) that keep ceil(size / stride) outputs."""
    strides = attrs.get("strides", [1] * len(size))
    dilations = attrs.get("dilations", [1] * len(size))
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    return _shared(total, auto == b"SAME_UPPER")


def _shared(total: Sequence[int], more_after: bool) -> list[int]:
    """Pads (befores, afters) of which each pair has this sum."""
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return small + large if more_after else large + small


def _transpose_padding(inputs: Any, attrs: Attrs) -> None:
    """The pads of a transposed convolution whose output's size is given, or that of its input times its strides."""
    size, kernel = _spatial(inputs[0]), _spatial(inputs[1])
    auto = attrs.get("auto_pad", b"NOTSET")
    strides = list(attrs.get("strides", [1] * len(size)))
    dilations = list(attrs.get("dilations", [1] * len(size)))
    wanted = attrs.pop("output_shape", None)
    if wanted is None and auto in (b"SAME_UPPER", b"SAME_LOWER"):
        wanted = [n * s for n, s in zip(size, strides, strict=True)]
    if wanted is None:
        return
    extra = list(attrs.get("output_padding", [0] * len(size)))
    total = [
        s * (n - 1) + e + (k - 1) * d + 1 - w
        for n, k, s, d, e, w in zip(size, kernel, strides, dilations, extra, list(wanted)[-len(size) :], strict=True)
    ]
    attrs["output_padding"] = [e + max(-t, 0) for e, t in zip(extra, total, strict=True)]
    attrs["pads"] = _shared([max(t, 0) for t in total], auto == b"SAME_UPPER")
    attrs["auto_pad"] = b"NOTSET"


def _real_exponent(inputs: Any, _attrs: Attrs) -> None:
    if isinstance(inputs[1], GenericConst):
        inputs[1] = relax.const(inputs[1].value.numpy().astype(str(inputs[0].ty.dtype)))


_CONVERTERS: dict[str, Convert] = {
    "Clip": _clip,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Tile": _tile,
}
# whose attributes are worked out before TVM's importer has them
_PREPARED: dict[str, Prepare] = {
    "AveragePool": _pool_padding,
    "Conv": _conv_padding,
    "ConvTranspose": _transpose_padding,
    "MaxPool": _pool_padding,
    "Pow": _real_exponent,
}
