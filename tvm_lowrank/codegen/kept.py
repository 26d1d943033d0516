"""How numbers of a format are kept where a compiled network computes: as their bits, or as whole numbers of a grid."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401, numpy's names of its formats
import numpy as np
from tvm import tirx

from tvm_lowrank.formats import FLOAT32

BITS = {"bfloat16": "uint16"}  # formats of which the code generator has no vectors: their bits are kept
BYTES = {"uint8": (0, 255), "int8": (-128, 127)}  # types of whole numbers, and what they reach
SUMS = "int32"  # of products of bytes
ROUNDING = 1.5 * 2**23  # float32 numbers near it are whole


def kept(format: str) -> str:
    """The type in which numbers of a format are kept."""
    return BITS.get(format, format)


def format_kept(type: str) -> str:
    """The format of numbers that are kept in a type."""
    return next((format for format, bits in BITS.items() if bits == type), type)


def widened(value: Any, format: str) -> Any:
    """A number that is kept in a format, as one of those that are added up."""
    if format in BYTES:
        return value.astype(SUMS)
    if format not in BITS:
        return value.astype(FLOAT32)
    return tirx.reinterpret(FLOAT32, tirx.shift_left(value.astype("uint32"), tirx.const(16, "uint32")))


def narrowed(value: Any, format: str) -> Any:
    """A float32 number as it is kept in a format: the nearest, ties to even."""
    if format not in BITS:
        return value.astype(format)
    bits = tirx.reinterpret("uint32", value)
    half, one, sixteen = (tirx.const(n, "uint32") for n in (0x7FFF, 1, 16))
    odd = tirx.bitwise_and(tirx.shift_right(bits, sixteen), one)
    nearest = tirx.shift_right(bits + half + odd, sixteen)
    # adding to a NaN could make it a number
    quiet = tirx.const(0x7FC0, "uint32")
    return tirx.Select(tirx.EQ(value, value), nearest, quiet).astype("uint16")


def as_kept(array: np.ndarray, type: str) -> np.ndarray:
    """An array of numbers as operands that are kept in a type."""
    return array.astype(format_kept(type)).view(type)


def lowest_byte(value: Any, byte: str) -> Any:
    """The whole number that was added to `ROUNDING`, as a byte."""
    return tirx.reinterpret("int32", value).astype(byte)
