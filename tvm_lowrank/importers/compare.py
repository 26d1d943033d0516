"""Is an import what its source is? Both are given the same random images, and their outputs must be the same.

How close two implementations of a network come is not known beforehand: it depends on the network. So the source is
also given images that are moved by a little more than rounding, and what that changes is allowed. Outputs that hardly
depend on the images, such as a saturated sigmoid's, say nothing (`telling`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tvm.ir import IRModule

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.tensors import Tensors

Run = Callable[[np.ndarray], Sequence[np.ndarray]]

_SHARE = 1e-3  # of what the images change
_MOVED = 1e-5  # relative, of each pixel
_ALLOWED = 10.0  # times what these moves change
_ROUNDING = 2e-6  # of the largest number
_MOVES = 3


@dataclass(frozen=True)
class Answered:
    """Two images, (2, C, H, W) float32; a source's outputs for them, and for the first moved a little, several times.

    ``coarseness`` is that of the source's number format: the root, roughly, of its rounding in units of float32's.
    ``sizes`` has for each output the size of the numbers that it was rounded at, where that is known: 1 of a sigmoid,
    however small what it gives may be.
    """

    images: np.ndarray
    outputs: Sequence[np.ndarray]
    moved: Sequence[np.ndarray]
    coarseness: float = 1.0
    sizes: Sequence[float] = ()

    def excess(self, run: Run) -> float:
        """How far an import is from the source at worst, with one image and with both: above 1 it differs."""
        worst = 0.0
        for count in (1, 2):
            sizes = self.sizes or [0.0] * len(self.outputs)
            pairs = zip(self.outputs, run(self.images[:count]), self.moved, sizes, strict=True)
            worst = max(worst, *(excess(y, got, moved, self.coarseness, size) for y, got, moved, size in pairs))
        return worst


def answered(run: Run, inputs: Tensors, coarseness: float = 1.0, sizes: Sequence[float] = ()) -> Answered:
    """What a source makes of random images for its inputs, of the first kind of which it makes finite numbers.

    It is given what a canonical function takes. ``sizes`` are those of `Answered`.
    """
    for scale, shift in ((1.0, 0.0), (0.25, 0.5), (0.01, 0.0)):
        rng = np.random.default_rng(0)
        images = inputs.images([_random(shape, rng) for shape in inputs.shapes])
        images = (images * scale + shift).astype(np.float32)
        steps = rng.uniform(-1, 1, (_MOVES, *images.shape[1:])) * _MOVED * coarseness
        outputs = run(images)
        if all(np.isfinite(y).all() for y in outputs if y.dtype.kind == "f"):
            break
    return Answered(images, outputs, run((images[:1] * (1 + steps)).astype(np.float32)), coarseness, sizes)


def _random(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    images = rng.standard_normal((2, *shape))
    # every image has its own brightness: noise alone is the same to what averages over it
    return images + rng.standard_normal((2, shape[0], *[1] * (len(shape) - 1)))


def bridged(mod: IRModule) -> Run:
    """An imported module as a function of arrays."""
    bridge = TorchBridge(mod)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [own.numpy() for own in bridge.outputs.parted(bridge(torch.from_numpy(images)))]

    return run


def excess(
    expected: np.ndarray, got: np.ndarray, moved: np.ndarray, coarseness: float = 1.0, size: float = 0.0
) -> float:
    """How far apart two outputs are, in units of what is allowed: above 1 they differ; Inf if in shape.

    ``expected`` are (2, ...), ``got`` those of the first image or of both; ``moved`` are the source's outputs for the
    images that were moved. Each channel, and each position along the last axis, is judged by its own size: boxes must
    not hide scores. ``size`` is that of the numbers that they were rounded at, if these were larger.
    """
    count = len(got) if got.ndim else 0
    if not count or expected[:count].shape != got.shape:
        return np.inf
    if expected.dtype.kind != "f":  # classes, masks: those that are almost as likely as others may change
        return float(np.mean(expected[:count] != got)) / 0.01
    if (np.isfinite(got) != np.isfinite(expected[:count])).any():
        return np.inf
    expected, got, moved = (_finite(values) for values in (expected, got, moved))
    worst = 0.0
    for axis in {1, expected.ndim - 1} if expected.size else ():
        rounded = np.maximum(_largest(expected, axis), size)
        allowed = _SHARE * coarseness * _spread(expected, axis) + _ROUNDING * coarseness**2 * rounded
        allowed += _ALLOWED * _largest(moved - expected[:1], axis)
        worst = max(worst, float(np.max(_largest(got - expected[:count], axis) / np.maximum(allowed, 1e-30))))
    return worst


def telling(output: np.ndarray, size: float = 0.0) -> bool:
    """Whether most channels of an output (2, ...) depend on the images by much more than rounding, at a ``size``."""
    if output.dtype.kind != "f" or not np.isfinite(output).any():
        return False
    values = _finite(output)
    return bool(np.median(_spread(values, 1) > 1e-5 * np.maximum(_largest(values, 1), max(size, 1e-30))))


def _finite(values: np.ndarray) -> np.ndarray:
    """Numbers (n, C, ...), those that are not finite as 0."""
    return np.where(np.isfinite(values), values, 0).astype(np.float64).reshape(len(values), *(values.shape[1:] or (1,)))


def _largest(values: np.ndarray, axis: int) -> np.ndarray:
    """The largest size of a number at each position along an axis."""
    return np.abs(values).max(axis=tuple(a for a in range(values.ndim) if a != axis))


def _spread(values: np.ndarray, axis: int) -> np.ndarray:
    """How far the numbers at each position along an axis are from their mean, at most."""
    others = tuple(a for a in range(values.ndim) if a != axis)
    return _largest(values - values.mean(axis=others, keepdims=True), axis)
