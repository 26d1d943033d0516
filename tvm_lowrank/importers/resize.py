"""Resizing: what a file's `Resize` or torch's `interpolate` does to an image, as operators that do the same.

Each axis of an image is resized by a matrix, (new size, size), however coordinates are transformed and rounded. The
matrix is not derived from attributes: it is what the operator's own runtime makes of the identity.
"""

from __future__ import annotations

import numpy as np
import torch
from tvm import relax

from tvm_lowrank.bridge.torch_nn import OPERATORS

_RESIZE = "relax.image.resize2d"
# method, coordinates, rounding: kernels of TVM that PyTorch, and so the bridge, computes the same way
_KERNELS = (
    ("nearest_neighbor", "asymmetric", "floor"),
    ("linear", "half_pixel", "round"),
    ("linear", "align_corners", "round"),
    ("cubic", "half_pixel", "round"),
    ("cubic", "align_corners", "round"),
)
_CLOSE = 1e-4


def resized(builder: relax.BlockBuilder, image: relax.Expr, rows: np.ndarray, columns: np.ndarray) -> relax.Expr:
    """The image (N, C, H, W) resized by the matrices of its rows, (new H, H), and of its columns, (new W, W)."""
    for kernel in () if _still(rows) and _still(columns) else _KERNELS:
        call = _kernel(image, (len(rows), len(columns)), kernel)
        compute = OPERATORS[_RESIZE](call.attrs)
        if _is(compute, rows, len(columns), transposed=True) and _is(compute, columns, len(rows), transposed=False):
            return builder.emit(call)
    return _along(builder, _along(builder, image, rows, 2), columns, 3)


def _kernel(image: relax.Expr, size: tuple[int, int], kernel: tuple[str, str, str]) -> relax.Call:
    method, coordinates, rounding = kernel
    return relax.op.image.resize2d(
        image,
        relax.ShapeExpr(size),
        layout="NCHW",
        method=method,
        coordinate_transformation_mode=coordinates,
        rounding_method=rounding,
        cubic_alpha=-0.75,
    )


def _is(compute: object, matrix: np.ndarray, other: int, *, transposed: bool) -> bool:
    """Whether a kernel resizes one axis by the matrix, the other axis being of size 1 and then `other`."""
    new, size = matrix.shape
    eye = torch.eye(size)[None, :, :, None] if transposed else torch.eye(size)[None, :, None, :]
    got = compute(eye, (new, 1) if transposed else (1, new))  # type: ignore[operator]
    return bool(np.allclose(got.reshape(size, new).numpy().T, matrix, atol=_CLOSE))


def _still(matrix: np.ndarray) -> bool:
    return len(matrix) == matrix.shape[1] and np.allclose(matrix, np.eye(len(matrix)), atol=_CLOSE)


def _along(builder: relax.BlockBuilder, image: relax.Expr, matrix: np.ndarray, axis: int) -> relax.Expr:
    """The image with the matrix applied to axis 2 or 3."""
    if _still(matrix):
        return image
    picked = matrix.argmax(1)
    if np.allclose(matrix, np.eye(matrix.shape[1])[picked], atol=_CLOSE):
        return builder.emit(relax.op.take(image, relax.const(picked.astype("int64")), axis=axis, mode="clip"))
    weights = matrix.astype("float32")
    if axis == 2:
        return builder.emit(relax.op.matmul(relax.const(weights), image))
    return builder.emit(relax.op.matmul(image, relax.const(np.ascontiguousarray(weights.T))))
