"""Number formats: what the operands of a convolution are rounded to.

Products are added up in float32, in some formats after a few of them were added up in the format itself. The names are
those of numpy, PyTorch and TVM.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

FLOAT32 = "float32"


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes
    ----------
    type
        numpy's.
    roundoff
        The largest relative error of rounding to the nearest, where nothing is subnormal.
    largest
        The largest finite number.
    summed
        How many products are added up in the format itself before float32 takes their sum; 1 is none.
    """

    name: str
    type: np.dtype
    roundoff: float
    largest: float
    summed: int = 1

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
    for format in (Format.of(FLOAT32), Format.of("bfloat16"), Format.of("float16", summed=256))
}
"""By name."""
