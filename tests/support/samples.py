"""Random convolutions: their inputs' statistics, and modules that hold one."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_lowrank.methods import ConvSpec, Moments

LAYOUTS = {"NCHW": ("NCHW", "OIHW"), "NHWC": ("NHWC", "HWIO")}


def module(
    spec: ConvSpec, weight: np.ndarray, bias: np.ndarray | None, size: tuple[int, int], layout: str
) -> tvm.IRModule:
    """relu(conv(x) + bias), with a symbolic batch."""
    data_layout, kernel_layout = LAYOUTS[layout]
    extents = {"N": tvm.tirx.Var("n", "int64"), "C": spec.in_channels, "H": size[0], "W": size[1]}
    x = relax.Var("x", relax.TensorType([extents[axis] for axis in data_layout], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            kernel = relax.const(np.ascontiguousarray(weight.transpose(["OIHW".index(a) for a in kernel_layout])))
            geometry = {"strides": spec.strides, "padding": spec.padding, "dilation": spec.dilation}
            layouts = {"data_layout": data_layout, "kernel_layout": kernel_layout}
            conv = builder.normalize(relax.op.nn.conv2d(x, kernel, groups=spec.groups, **geometry, **layouts))
            y = relax.DataflowVar("layer1.conv", conv.ty)
            builder.emit_normalized(relax.VarBinding(y, conv))
            if bias is not None:
                y = builder.emit(
                    relax.op.add(y, relax.const(bias.reshape([-1 if a == "C" else 1 for a in data_layout])))
                )
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def columns(spec: ConvSpec, rng: np.random.Generator, count: int = 4000) -> np.ndarray:
    """Correlated, skewed input columns: (g, count, D)."""
    depth = int(np.prod(spec.weight_shape[1:]))
    mixing = rng.standard_normal((spec.groups, depth, depth)) * np.linspace(0.05, 1, depth)
    return np.maximum(rng.standard_normal((spec.groups, count, depth)) @ mixing + 0.3, 0)


def moments_of(x: np.ndarray) -> Moments:
    mean = x.mean(axis=1)
    centred = x - mean[:, None]
    return Moments(mean, centred.transpose(0, 2, 1) @ centred / x.shape[1])
