"""Number formats: what the operands of a convolution are rounded to.

Products are added up in float32, in some formats after a few of them were added up in the format itself, and those of
integers in int32. The names are those of numpy, PyTorch and TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

FLOAT32 = "float32"


@dataclass(frozen=True)
class Format:
    """A floating-point format, or integers with a scale.

    Attributes
    ----------
    type
        numpy's.
    roundoff
        The largest relative error of rounding to the nearest, where nothing is subnormal; of integers relative to the
        largest number of a tensor.
    largest
        The largest finite number; integers have scales for any.
    summed
        How many products are added up in the format itself before float32 takes their sum; 1 is none.
    whole
        Whether numbers are whole multiples of a scale: of one for each output channel of a weight (`quantised`), and of
        one for what a convolution reads (`Grid`).
    """

    name: str
    type: np.dtype
    roundoff: float
    largest: float
    summed: int = 1
    whole: bool = False

    @classmethod
    def of(cls, name: str, *, summed: int = 1) -> Format:
        """The format of this name, with numpy's or ml_dtypes' figures."""
        type = np.dtype(name)
        figures = ml_dtypes.finfo(type)
        return cls(name, type, float(figures.eps) / 2, float(figures.max), summed)

    @property
    def short(self) -> bool:
        """Whether it has fewer exponents than float32, so that numbers may be too large for it."""
        return self.largest < 2.0**127

    @property
    def bytes(self) -> int:
        """Of a number."""
        return self.type.itemsize

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """The nearest numbers of this format (ties to even), as float32; what is too large becomes infinite."""
        with np.errstate(over="ignore"):
            return values.astype(self.type).astype("float32")


FORMATS = {
    format.name: format
    # no processor adds up products of float16 in float32 faster than those of float32
    for format in (
        Format.of(FLOAT32),
        Format.of("bfloat16"),
        Format.of("float16", summed=256),
        Format("int8", np.dtype("int8"), 0.5 / 127, float(np.finfo(np.float32).max), whole=True),
    )
}
"""By name."""

LEVELS = 255  # the largest of the whole numbers of a `Grid`
LARGEST = 127  # absolute whole number of a weight


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor of int8 holds: ``scale`` times (q - ``zero``), where q is from 0 to 255.

    Between the factors of a chain, where any scale of a channel is free, those of channel c are also multiplied by
    ``channels[c]``; elsewhere this is empty. The scale is a float32 number, and zero is one of the q, so that 0 is held
    exactly; an even one, so that rounding to even is the same with it and without.
    """

    scale: float
    zero: int
    channels: tuple[float, ...] = ()

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The finest grid that reaches about from ``low`` to ``high``, and has 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32(max((high - low) / LEVELS, float(np.finfo(np.float32).tiny)))
        return cls(float(scale), 2 * int(np.clip(round(-low / float(scale) / 2), 0, LEVELS // 2)))

    @cached_property
    def scales(self) -> np.ndarray:
        """The scale of each channel, or one for all: float32 (1, C, 1, 1)."""
        relative = np.asarray(self.channels or (1.0,), "float32").reshape(1, -1, 1, 1)
        return relative * np.float32(self.scale)

    @cached_property
    def inverses(self) -> np.ndarray:
        """By what numbers are multiplied in float32 before they are rounded: float32 (1, C, 1, 1)."""
        return np.float32(1) / self.scales

    def by_input(self, shape: Sequence[int]) -> np.ndarray:
        """The scales of what the numbers of a weight of this shape (OIHW) multiply: float32 (O or 1, I or 1, 1, 1)."""
        if not self.channels:
            return self.scales
        outside, inside = shape[:2]
        groups = len(self.channels) // inside
        each = np.repeat(self.scales.reshape(groups, 1, inside), outside // groups, axis=1)
        return each.reshape(outside, inside, 1, 1)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """The nearest numbers of the grid (ties to even), as float32; values (N, C, H, W) where channels differ."""
        inverses, scales = (self.inverses, self.scales) if self.channels else (self.inverses.item(), self.scales.item())
        steps = np.rint(values.astype("float32") * np.float32(inverses))
        return np.clip(steps, -self.zero, LEVELS - self.zero) * np.float32(scales)

    def __str__(self) -> str:
        return " ".join(map(repr, (self.scale, self.zero, *self.channels)))

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The inverse of `str`."""
        scale, zero, *channels = text.split()
        return cls(float(scale), int(zero), tuple(map(float, channels)))


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (OIHW, float32) as whole numbers from -127 to 127 (int8), and the scale of each output channel (float32).

    The largest of a channel is 127.
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1, initial=0.0).astype("float32")
    scale = np.where(largest > 0, largest, np.float32(LARGEST)) / np.float32(LARGEST)
    whole = np.rint(weight.astype("float32") / scale.reshape(-1, 1, 1, 1))
    return whole.astype("int8"), scale
