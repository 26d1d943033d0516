"""Torch operators to Relax: which are kept whole for TVM's frontend, and what it lacks or gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from tvm_lowrank.importers.resize import resized

# slow to trace, or decomposed into what hides what they were; an instance norm into what knows one batch only
_WHOLE = ["elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "relu6", "silu"]
_WHOLE += ["instance_norm", "pad", "upsample_bicubic2d", "upsample_bilinear2d"]


def decompositions() -> Any:
    """The default decompositions but those of operators that TVM's frontend takes whole."""
    table = torch.export.default_decompositions()
    for name in _WHOLE:
        for packet in (getattr(torch.ops.aten, variant, None) for variant in (name, f"{name}_")):
            for overload in () if packet is None else packet.overloads():
                table.pop(getattr(packet, overload), None)
    return table


def _nearest(node: fx.Node, importer: Any) -> relax.Var:
    """TVM's frontend takes half-pixel coordinates for torch's `nearest`, which floors asymmetric ones."""
    height, width = (int(d) for d in node.meta["val"].shape[2:])
    return importer.block_builder.emit(
        relax.op.image.resize2d(
            importer.env[node.args[0]],
            (height, width),
            layout="NCHW",
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        )
    )


def _extreme(reduce: Callable[..., relax.Expr]) -> Callable[[fx.Node, Any], relax.Var]:
    def convert(node: fx.Node, importer: Any) -> relax.Var:
        args = importer.retrieve_args(node)
        axes = list(args[1]) if len(args) > 1 else []
        return importer.block_builder.emit(reduce(args[0], axes or None, len(args) > 2 and bool(args[2])))

    return convert


def _adaptive_max(node: fx.Node, importer: Any) -> relax.Expr:
    x, size = importer.retrieve_args(node)[:2]
    if list(size) != [1, 1]:
        raise ValueError(f"adaptive_max_pool2d to {list(size)}")
    builder = importer.block_builder
    values = builder.emit(relax.op.max(x, [2, 3], True))
    return builder.emit(relax.Tuple([values, builder.emit(relax.op.zeros_like(values))]))


def _instance_norm(node: fx.Node, importer: Any) -> relax.Expr:
    """TVM's frontend forgets the statistics that were collected in training."""
    image, gamma, beta, mean, var, of_image, _, epsilon = importer.retrieve_args(node)[:8]
    channels = int(node.meta["val"].shape[1])
    gamma = relax.const(np.ones(channels, np.float32)) if gamma is None else gamma
    beta = relax.const(np.zeros(channels, np.float32)) if beta is None else beta
    if of_image:
        axes = list(range(2, node.meta["val"].dim()))
        return importer.block_builder.emit(relax.op.nn.instance_norm(image, gamma, beta, 1, axes, float(epsilon)))
    normalised = relax.op.nn.batch_norm(image, gamma, beta, mean, var, 1, float(epsilon), training=False)
    return importer.block_builder.emit(relax.TupleGetItem(importer.block_builder.emit(normalised), 0))


def _interpolated(node: fx.Node, importer: Any) -> relax.Expr:
    """TVM's frontend takes the ratio of the sizes for the scale, which torch does only where none was given."""
    image, size, aligned, scales = (*node.args, *[None] * 2)[:4]
    height, width = (int(d) for d in node.meta["val"].shape[2:])
    rows, columns = (int(d) for d in image.meta["val"].shape[2:])  # type: ignore[union-attr]

    def matrix(old: int, new: int, axis: int) -> np.ndarray:
        wanted = [1, 1]
        wanted[axis] = new
        scale = None if scales is None else [1.0 if i != axis else scales[i] for i in range(2)]  # type: ignore[index]
        eye = torch.eye(old)[:, None, :, None] if axis == 0 else torch.eye(old)[:, None, None, :]
        call = node.target(eye, wanted if size is not None else None, aligned, scale)  # type: ignore[operator]
        return call.reshape(old, new).numpy().T

    return resized(importer.block_builder, importer.env[image], matrix(rows, height, 0), matrix(columns, width, 1))


# what TVM's frontend lacks or gets wrong
CONVERTERS = {
    "instance_norm.default": _instance_norm,
    "upsample_bilinear2d.vec": _interpolated,
    "upsample_bicubic2d.vec": _interpolated,
    "upsample_nearest2d.vec": _nearest,
    "amax.default": _extreme(relax.op.max),
    "adaptive_max_pool2d.default": _adaptive_max,
    "amin.default": _extreme(relax.op.min),
}
