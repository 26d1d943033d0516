"""What a model takes: the form of its images and labels, and what is said of those that have another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from tvm_lowrank.errors import UserError
from tvm_lowrank.tensors import Shape, Tensors

Stats = Sequence[float] | None


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation, (C, 1, 1) or scalar, float32."""

    mean: np.ndarray | np.float32
    std: np.ndarray | np.float32

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, C) to float32 (n, C, H, W)."""
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype="float32")
        images /= 255
        images -= self.mean
        images /= self.std
        return images


@dataclass(frozen=True)
class Form:
    """Images (C, H, W), how uint8 ones are scaled if that was asked for, and the number of classes if it is known.

    Several ``inputs`` of a network are one array (numbers, 1, 1): `tvm_lowrank.tensors`.
    """

    shape: tuple[int, int, int]
    scale: Scale | None = None
    classes: int | None = None
    inputs: Tensors | None = None

    def __str__(self) -> str:
        return by(self.shape) if self.inputs is None else str(self.inputs)

    @property
    def _last(self) -> tuple[int, int, int]:
        channels, height, width = self.shape
        return (height, width, channels)

    def check(self, shape: Sequence[int], dtype: np.dtype, split: str) -> None:
        """Raise UserError unless arrays of such a shape and type are images that the model takes."""
        pixels = dtype == np.uint8
        expected = [self._last] if pixels else [self.shape, self._last]
        if len(shape) != 4 or tuple(shape[1:]) not in expected:
            layout = "uint8 NHWC" if pixels else "float NCHW"
            raise UserError(
                f"{split} images have shape {by(shape)} ({dtype}); the model takes {layout} n x {by(expected[0])}"
            )
        if not pixels and dtype.kind != "f":
            raise UserError(f"{split} images are {dtype}; give uint8 NHWC or float NCHW")
        if not pixels and self.scale is not None:
            raise UserError(
                f"{split} images are {dtype}, mean and std apply to uint8; normalise them or leave both out"
            )

    def check_input(self, number: int, shape: Sequence[int], dtype: np.dtype, split: str) -> None:
        """Raise UserError unless arrays of such a shape and type are the input of this number, from 0, of several."""
        assert self.inputs is not None
        own = f"{split} images have shape {by(shape)} ({dtype}) as input {number + 1}"
        if len(shape) < 2 or tuple(shape[1:]) != self.inputs.shapes[number]:
            raise UserError(f"{own}; the model takes {self}")
        if dtype.kind != "f":
            raise UserError(f"{own}; several inputs are float32, taken as they are")

    def prepared(self, raw: np.ndarray) -> np.ndarray:
        """Images as float32 (n, C, H, W); numbers that are too large become Inf.

        uint8 are (n, H, W, C); floats (n, C, H, W), or (n, H, W, C) where their shape says so.
        """
        if raw.dtype == np.uint8:
            return (self.scale or Scale(np.float32(0), np.float32(1)))(raw)
        if raw.shape[1:] != self.shape:
            raw = raw.transpose(0, 3, 1, 2)
        with np.errstate(over="ignore"):
            return np.require(raw, np.float32, ("C", "W", "E"))  # torch warns of what is not writable

    def images(self, array: np.ndarray, split: str) -> np.ndarray:
        """`prepared` images, none of them bad; UserError if they are not such or there are none."""
        self.check(array.shape, array.dtype, split)
        check_some(len(array), split)
        images = self.prepared(array)
        check_finite(finite(images), split)
        return images

    def labels(self, array: np.ndarray, split: str, count: int) -> np.ndarray:
        """The labels of so many images, int64 (n,); UserError if they are not such."""
        if array.shape != (count,):
            raise UserError(
                f"{split} has {count} images but labels of shape {by(array.shape)}; give one label per image"
            )
        if array.dtype.kind not in "iu":
            raise UserError(f"{split} labels are {array.dtype}; give integers that count classes from 0")
        low, high = int(array.min()), int(array.max())
        if low < 0 or (self.classes is not None and high >= self.classes):
            limit = "" if self.classes is None else f" to {self.classes - 1}, the model's last output"
            raise UserError(f"{split} labels run from {low} to {high}; give classes from 0{limit}")
        return array.astype("int64")


def check_some(count: int, split: str) -> None:
    """Raise UserError if a split has no images."""
    if not count:
        raise UserError(f"{split} is empty; give at least one image")


def finite(images: np.ndarray) -> np.ndarray:
    """Which images (n, C, H, W) hold neither NaN nor Inf: (n,)."""
    return np.isfinite(images).all(axis=(1, 2, 3))


def check_finite(found: np.ndarray, split: str) -> None:
    """Raise UserError unless all images of a split were found `finite`."""
    bad = np.flatnonzero(~found)
    if bad.size:
        raise UserError(f"{bad.size} {split} images hold NaN or Inf, the first is number {bad[0]}; remove them")


def form_of(shape: Shape | tuple[Shape, ...], mean: Stats, std: Stats, classes: int | None) -> Form:
    """The form of a model's images (C, H, W), or of its inputs, and labels; UserError if mean and std do not fit.

    If neither is given there is no scale: float images need none, and one that was given must not be ignored.
    """
    several = not isinstance(shape[0], int)
    shapes = cast("tuple[Shape, ...]", shape if several else (shape,))
    if len(shapes) > 1:
        if mean is not None or std is not None:
            raise UserError("--mean and --std are for models of one input; normalise the images and leave both out")
        inputs = Tensors(tuple(map(tuple, shapes)))
        return Form((inputs.ends[-1], 1, 1), None, classes, inputs)
    ((channels, height, width),) = shapes
    image = (channels, height, width)
    if mean is None and std is None:
        return Form(image, None, classes)
    arrays = []
    for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        array = np.asarray([default] if values is None else values, dtype="float32").reshape(-1, 1, 1)
        if len(array) not in (1, channels):
            raise UserError(f"--{name} has {len(array)} values, the model {channels} channels; give one per channel")
        if not np.isfinite(array).all() or (name == "std" and (array <= 0).any()):
            raise UserError(f"--{name} {array.ravel().tolist()} is not usable; give finite numbers, std above 0")
        arrays.append(array)
    return Form(image, Scale(*arrays), classes)


def by(shape: Sequence[int]) -> str:
    """A shape as text: 3x32x32."""
    return "x".join(map(str, shape))
