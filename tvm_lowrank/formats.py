"""Number formats: what the operands of a convolution are rounded to.

Products are added up in float32 in all of them; what a processor does instead of that is said by
`tvm_lowrank.codegen.units`. The names are those of numpy, PyTorch and TVM.
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
    """

    name: str
    type: np.dtype
    roundoff: float
    largest: float

    @classmethod
    def of(cls, name: str) -> Format:
        """The format of this name, with numpy's or ml_dtypes' figures."""
        type = np.dtype(name)
        figures = ml_dtypes.finfo(type)
        return cls(name, type, float(figures.eps) / 2, float(figures.max))

    @property
    def bytes(self) -> int:
        """Of a number."""
        return self.type.itemsize

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """The nearest numbers of this format (ties to even), as float32; what is too large becomes infinite."""
        with np.errstate(over="ignore"):
            return values.astype(self.type).astype("float32")


FORMATS = {name: Format.of(name) for name in (FLOAT32, "bfloat16", "float16")}
"""By name."""
