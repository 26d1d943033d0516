"""Numbers as users write them: on the command line, in a shell script."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tvm_lowrank.errors import UserError

Shape = tuple[int, ...]


def input_shape(text: str) -> Shape | tuple[Shape, ...]:
    """``"1,3,224,224"`` (or ``"1x3x224x224"``) as a tuple; of several inputs, ``"1,3,64,64+1,10"``, a tuple of them.

    Raises
    ------
    UserError
        If the text is not four positive integers, or two or more for each of several inputs.
    """
    try:
        shapes = tuple(
            tuple(int(part) for part in own.lower().strip("()[] ").replace("x", ",").split(","))
            for own in text.split("+")
        )
    except ValueError as error:
        raise UserError(f"input shape {text!r} is not a list of integers; give N,C,H,W such as 1,3,224,224") from error
    checked = checked_shapes(shapes if len(shapes) > 1 else shapes[0])
    return checked if len(checked) > 1 else checked[0]


def checked_shapes(shape: Shape | tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The shape (N, C, H, W) of an input, or the shapes (N, …) of several; UserError if it is none."""
    several = bool(shape) and not any(isinstance(d, int) for d in shape)
    shapes: tuple[Any, ...] = tuple(shape) if several else (shape,)
    for own in shapes:
        good = isinstance(own, tuple | list) and all(isinstance(d, int) and d > 0 for d in own)
        if not good or (len(own) < 2 if several else len(own) != 4):
            wanted = "N and more positive integers" if several else "four positive integers"
            raise UserError(f"input shape {own} is not {wanted}; give N,C,H,W such as 1,3,224,224")
    return tuple(tuple(own) for own in shapes)


@dataclass(frozen=True)
class Budget:
    """What a metric may lose: ``unit`` is "%" (points), another such as "dB", or "", that of the metric."""

    value: float
    unit: str = ""

    def within(self, unit: str, metric: str) -> float:
        """The value in the metric's unit, "points" or another; UserError if it is in another one."""
        own = "%" if unit == "points" else unit
        if self.unit not in ("", own):
            raise UserError(f"--budget {self.value:g}{self.unit}, but {metric} counts in {unit}; write e.g. 0.5{own}")
        if own == "%" and self.value > 100:
            raise UserError(f"--budget {self.value:g} is not a number of points from 0 to 100; write e.g. 1% or 0.5%")
        return self.value


def budget(text: str) -> Budget:
    """What may be lost: ``1%`` (points), ``0.5 dB``, or ``1`` in the metric's own unit.

    Raises
    ------
    UserError
        If the text is not such a number, or more than 100 %.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[^\W\d_]*)", text.strip(), re.ASCII)
    found = Budget(float(match[1]), match[2]) if match else None
    if found is None or (found.unit == "%" and found.value > 100):
        raise UserError(
            f"budget {text!r} is not a number of points from 0 to 100 or of a metric's unit; write e.g. 1% or 0.5dB"
        )
    return found


def milliseconds(text: str) -> float:
    """A latency in ms: ``5ms``, ``800us``, ``0.005s`` or ``5`` (ms as well).

    Raises
    ------
    UserError
        If the text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|µs|ms|s|)", text.strip(), re.ASCII)
    if not match or float(match[1]) == 0:
        raise UserError(f"--max-latency {text!r} is not a time above 0; e.g. 5ms, 800us or 0.005s")
    value = float(match[1])
    return {"us": value / 1e3, "µs": value / 1e3, "s": value * 1e3}.get(match[2], value)


def seconds(text: str) -> float:
    """A time limit in seconds: ``600``, ``600s``, ``10m`` or ``2h``; UserError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match:
        raise UserError(f"--time-limit {text!r} is not a time; e.g. 600, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def channels(text: str) -> tuple[float, ...]:
    """A number for each channel, ``0.485,0.456,0.406``; UserError if it is no such list."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--mean or --std {text!r} is not a list of numbers; e.g. 0.485,0.456,0.406") from error


def names(text: str) -> tuple[str, ...]:
    """A list of names, ``spatial,btd``."""
    return tuple(name.strip() for name in text.split(","))
