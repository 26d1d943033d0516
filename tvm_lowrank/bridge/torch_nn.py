"""The operators of neural networks in PyTorch: convolutions, pooling, padding, resizing, normalisation.

Importing this module adds them to `torch_ops.OPERATORS`. Data is NCHW, weights are OIHW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank.bridge.torch_ops import OPERATORS, Compute, Make, ints, need, operator
from tvm_lowrank.methods.chain import Conv


def _nchw(attrs: Any, name: str) -> None:
    layouts = (str(attrs.layout), str(attrs.out_layout or attrs.layout))
    need(all(layout in ("NCW", "NCHW", "NCDHW") for layout in layouts), f"{name} with layout {'/'.join(layouts)}")


@operator("nn.pad")
def _pad(attrs: Any) -> Compute:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "replicate", "edge": "replicate"}
    modes["circular"] = "circular"
    mode, value, width = str(attrs.pad_mode), float(attrs.pad_value), ints(attrs.pad_width)
    need(mode in modes, f"nn.pad with mode {mode!r}")
    # torch counts from the last axis, and its other modes refuse to see the axes that are not padded
    pairs = [width[i : i + 2] for i in range(0, len(width), 2)]
    flat = [v for pair in reversed(pairs) for v in pair]
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    if mode == "constant":
        return lambda x: F.pad(x, flat, "constant", value)
    flat += [0] * ((len(pairs) - 2) * 2 - len(flat))
    return lambda x: F.pad(x, flat, modes[mode])


@operator("nn.pixel_shuffle")
def _pixel_shuffle(attrs: Any) -> Compute:
    factor = int(attrs.upscale_factor)
    return lambda x: F.pixel_shuffle(x, factor)


@operator("image.resize2d")
def _resize2d(attrs: Any) -> Compute:
    method, coordinates = str(attrs.method), str(attrs.coordinate_transformation_mode)
    rounding = str(attrs.rounding_method)
    supported = {
        ("linear", "half_pixel"): ("bilinear", False),
        ("linear", "pytorch_half_pixel"): ("bilinear", False),
        ("linear", "align_corners"): ("bilinear", True),
        ("cubic", "half_pixel"): ("bicubic", False),
        ("cubic", "pytorch_half_pixel"): ("bicubic", False),
        ("cubic", "align_corners"): ("bicubic", True),
        ("nearest_neighbor", "asymmetric"): ("nearest", None),
        ("nearest_neighbor", "half_pixel"): ("nearest-exact", None),
    }
    what = f"resize2d with method {method!r}, coordinates {coordinates!r}, rounding {rounding!r}"
    need((method, coordinates) in supported, what)
    need(method != "cubic" or float(attrs.cubic_alpha) == -0.75, f"resize2d with cubic alpha {attrs.cubic_alpha}")
    need(str(attrs.layout) == "NCHW", f"resize2d with layout {attrs.layout}")
    mode, align = supported[method, coordinates]
    need(mode != "nearest" or rounding == "floor", what)
    return lambda x, size: F.interpolate(x, tuple(size), mode=mode, align_corners=align)


def _split_padding(padding: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """TVM's padding (all befores, all afters) as the symmetric part and what F.pad must add at the ends."""
    rank = len(padding) // 2
    before, after = padding[:rank], padding[rank:]
    common = tuple(min(pair) for pair in zip(before, after, strict=True))
    rest = zip(reversed(before), reversed(after), reversed(common), strict=True)
    return common, tuple(v for b, a, c in rest for v in (b - c, a - c))


def _convolution(compute: Compute, layout: str) -> Make:
    def make(attrs: Any) -> Compute:
        layouts = (str(attrs.data_layout), str(attrs.out_layout or attrs.data_layout), str(attrs.kernel_layout))
        need(layouts == (layout, layout, "OI" + layout[2:]), f"a convolution with layouts {'/'.join(layouts)}")
        common, rest = _split_padding(ints(attrs.padding))
        options = {"stride": ints(attrs.strides), "dilation": ints(attrs.dilation), "groups": int(attrs.groups)}
        if any(rest):
            return lambda x, weight: compute(F.pad(x, rest), weight, padding=common, **options)
        return lambda x, weight: compute(x, weight, padding=common, **options)

    return make


def chain(convs: Sequence[Conv], bias: np.ndarray | None) -> Callable[[Tensor], Tensor]:
    """The convolutions of a chain, and what is added after the last, (N,), as a function of NCHW images."""
    weights = [torch.from_numpy(np.ascontiguousarray(conv.weight)) for conv in convs]
    added = None if bias is None else torch.from_numpy(bias.reshape(1, -1, 1, 1))

    def compute(x: Tensor) -> Tensor:
        for conv, weight in zip(convs, weights, strict=True):
            spec = conv.spec
            common, rest = _split_padding(spec.padding)
            x = F.pad(x, rest) if any(rest) else x
            x = F.conv2d(x, weight, None, spec.strides, common, spec.dilation, spec.groups)
        return x if added is None else x + added

    return compute


OPERATORS["relax.nn.conv1d"] = _convolution(F.conv1d, "NCW")
OPERATORS["relax.nn.conv2d"] = _convolution(F.conv2d, "NCHW")
OPERATORS["relax.nn.conv3d"] = _convolution(F.conv3d, "NCDHW")


@operator("nn.conv2d_transpose")
def _conv2d_transpose(attrs: Any) -> Compute:
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    need(layouts == ("NCHW", "IOHW"), f"a transposed convolution with layouts {'/'.join(layouts)}")
    common, rest = _split_padding(ints(attrs.padding))
    options: dict[str, Any] = {
        "stride": ints(attrs.strides),
        "padding": common,
        "output_padding": ints(attrs.output_padding),
        "dilation": ints(attrs.dilation),
        "groups": int(attrs.groups),
    }
    # padding a transposed convolution cuts its output
    cut = [-r for r in rest]
    return lambda x, weight: F.pad(F.conv_transpose2d(x, weight, None, **options), cut)


def _ceil_extra(
    size: tuple[int, ...], pool: tuple[int, ...], strides: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """What to pad at the ends of a padded input so that floor division gives what ceil division would."""
    windows = ((p - 1) * d + 1 for p, d in zip(pool, dilation, strict=True))
    return tuple(-(n - w) % s for n, w, s in zip(size, windows, strides, strict=True))


def _padded(x: Tensor, rest: tuple[int, ...], attrs: dict[str, Any], value: float) -> Tensor:
    if any(rest):
        x = F.pad(x, rest, value=value)
    if attrs["ceil"]:
        size = tuple(n + 2 * c for n, c in zip(x.shape[2:], attrs["common"], strict=True))
        extra = _ceil_extra(size, attrs["pool"], attrs["strides"], attrs["dilation"])
        if any(extra):
            x = F.pad(x, tuple(v for e in reversed(extra) for v in (0, e)), value=value)
    return x


def _pool_attrs(attrs: Any, name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    _nchw(attrs, name)
    common, rest = _split_padding(ints(attrs.padding))
    pool = ints(attrs.pool_size)
    if any(2 * c > p for c, p in zip(common, pool, strict=True)):  # more than torch's pooling pads itself
        before, after = ints(attrs.padding)[: len(pool)], ints(attrs.padding)[len(pool) :]
        rest = tuple(v for pair in zip(reversed(before), reversed(after), strict=True) for v in pair)
        common = (0,) * len(pool)
    return {
        "pool": pool,
        "strides": ints(attrs.strides),
        "dilation": ints(attrs.dilation),
        "common": common,
        "ceil": bool(attrs.ceil_mode),
    }, rest


def _max_pool(compute: Compute) -> Make:
    def make(attrs: Any) -> Compute:
        a, rest = _pool_attrs(attrs, "max pooling")
        pool, strides, common, dilation = a["pool"], a["strides"], a["common"], a["dilation"]
        return lambda x: compute(_padded(x, rest, a, -torch.inf), pool, strides, common, dilation)

    return make


OPERATORS["relax.nn.max_pool1d"] = _max_pool(F.max_pool1d)
OPERATORS["relax.nn.max_pool2d"] = _max_pool(F.max_pool2d)
OPERATORS["relax.nn.max_pool3d"] = _max_pool(F.max_pool3d)


def _avg_pool(pooled: Compute) -> Make:
    def make(attrs: Any) -> Compute:
        a, rest = _pool_attrs(attrs, "average pooling")
        need(all(d == 1 for d in a["dilation"]), "average pooling with dilation")
        include_pad = bool(attrs.count_include_pad)
        pool, strides, common = a["pool"], a["strides"], a["common"]

        def average(x: Tensor) -> Tensor:
            return pooled(x, pool, strides, common, count_include_pad=True)

        def compute(x: Tensor) -> Tensor:
            padded = _padded(x, rest, a, 0.0)
            if padded is x:
                return pooled(x, pool, strides, common, count_include_pad=include_pad)
            inside = torch.ones_like(x[:1, :1])
            if include_pad:  # the declared padding counts, what rounding up adds does not
                inside = F.pad(inside, tuple(c for c in reversed(common) for _ in range(2)), value=1.0)
                inside = _padded(F.pad(inside, rest, value=1.0), (), {**a, "common": (0,) * len(common)}, 0.0)
                return average(padded) / pooled(inside, pool, strides)
            return average(padded) / average(_padded(inside, rest, a, 0.0))

        return compute

    return make


OPERATORS["relax.nn.avg_pool1d"] = _avg_pool(F.avg_pool1d)
OPERATORS["relax.nn.avg_pool2d"] = _avg_pool(F.avg_pool2d)
OPERATORS["relax.nn.avg_pool3d"] = _avg_pool(F.avg_pool3d)


def _adaptive(compute: Compute, name: str) -> Make:
    def make(attrs: Any) -> Compute:
        _nchw(attrs, name)
        size = None if attrs.output_size is None else ints(attrs.output_size)
        return lambda x: compute(x, size or tuple(x.shape[2:]))

    return make


OPERATORS["relax.nn.adaptive_avg_pool1d"] = _adaptive(F.adaptive_avg_pool1d, "adaptive pooling")
OPERATORS["relax.nn.adaptive_avg_pool2d"] = _adaptive(F.adaptive_avg_pool2d, "adaptive pooling")


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


@operator("nn.batch_norm")
def _batch_norm(attrs: Any) -> Compute:
    need(not attrs.training, "batch-norm in training mode")
    axis, epsilon = int(attrs.axis), float(attrs.epsilon)
    center, scale = bool(attrs.center), bool(attrs.scale)

    def compute(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = (x - _along(mean, x, axis)) * _along(torch.rsqrt(var + epsilon), x, axis)
        y = y * _along(gamma, x, axis) if scale else y
        return (y + _along(beta, x, axis) if center else y), mean, var

    return compute


def _normalise(x: Tensor, axes: tuple[int, ...], epsilon: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    var = torch.var(x, axes, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(var + epsilon)


@operator("nn.layer_norm")
def _layer_norm(attrs: Any) -> Compute:
    axes, epsilon, center, scale = ints(attrs.axes), float(attrs.epsilon), bool(attrs.center), bool(attrs.scale)

    def compute(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        shape = [x.shape[d] if d in {a % x.dim() for a in axes} else 1 for d in range(x.dim())]
        y = _normalise(x, axes, epsilon)
        y = y * gamma.reshape(shape) if scale else y
        return y + beta.reshape(shape) if center else y

    return compute


@operator("nn.instance_norm")
def _instance_norm(attrs: Any) -> Compute:
    axes, epsilon, axis = ints(attrs.axes), float(attrs.epsilon), int(attrs.channel_axis)
    center, scale = bool(attrs.center), bool(attrs.scale)

    def compute(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = _normalise(x, axes, epsilon)
        y = y * _along(gamma, x, axis) if scale else y
        return y + _along(beta, x, axis) if center else y

    return compute


@operator("nn.group_norm")
def _group_norm(attrs: Any) -> Compute:
    groups, epsilon = int(attrs.num_groups), float(attrs.epsilon)
    need(int(attrs.channel_axis) == 1, "group-norm over another axis than 1")
    center, scale = bool(attrs.center), bool(attrs.scale)
    return lambda x, gamma, beta: F.group_norm(x, groups, gamma if scale else None, beta if center else None, epsilon)
