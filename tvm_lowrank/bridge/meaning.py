"""What the outputs of a canonical function mean: found from its end, or given; kept in its attribute ``answers``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from tvm import relax
from tvm.ir import IRModule, Tuple

from tvm_lowrank.bridge.answers import (
    EMBEDDING,
    KINDS,
    MULTILABEL,
    REGRESSION,
    SCORES,
    Answers,
    Meaning,
    Mixture,
    Part,
    from_json,
)
from tvm_lowrank.bridge.own import Own
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import bindings, with_attribute
from tvm_lowrank.reference import absolute, is_reference
from tvm_lowrank.tensors import Tensors, values

ATTRIBUTE = "answers"
PICTURE = (1, 3, 4)  # channels of an output that is an image
RESHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")
PART = re.compile(r"(?P<kind>[a-z]+)(:(?P<classes>\d+))?(@(?P<axis>\d+):(?P<first>\d+)-(?P<last>\d+))?")
Values = Mapping[relax.Var, relax.Expr]
Shape = tuple[int, ...]  # of an output, without the batch


def with_answers(mod: IRModule, answers: Meaning, *, name: str = "main") -> IRModule:
    """A copy of the module that says what the outputs of its function mean."""
    return with_attribute(mod, ATTRIBUTE, json.dumps(answers.to_json()), name=name)


def answers_of(function: relax.Function) -> Meaning:
    """What a canonical function's outputs mean: as it says itself, else as its end suggests."""
    said = (function.attrs or {}).get(ATTRIBUTE)
    return guessed(function) if said is None else from_json(json.loads(str(said)))


def guessed(function: relax.Function) -> Meaning:
    """What the end of a function suggests: a last softmax or sigmoid of each output, else the shape of the outputs.

    A concatenation is looked through. What has no such end is taken for class scores, an image or a single logit where
    it is the only output, else for numbers.
    """
    known = {binding.var: binding.value for binding in bindings(function)}
    shapes = Tensors.of(function).shapes
    outputs = list(zip(values(function), shapes, strict=True))
    if len(outputs) > 1:
        return Mixture(
            shapes, tuple(Part(_by_end(known, *own) or Answers(REGRESSION), i) for i, own in enumerate(outputs))
        )
    [(result, shape)] = outputs
    parts = _concatenated(known, result, shape)
    return Mixture(shapes, tuple(parts)) if parts else _by_end(known, result, shape) or _by_shape(shape)


def _by_end(known: Values, result: relax.Expr, shape: Shape) -> Answers | None:
    """What the last operator of an output suggests, if it suggests anything."""
    value, order = _end(known, result)
    name = _name(value)
    if name in ("relax.nn.softmax", "relax.nn.log_softmax"):
        axis = int(value.attrs.axis) % len(value.ty.shape)
        axis = order.index(axis) if order else axis
        if axis > len(shape) or shape[axis - 1] != int(value.ty.shape[int(value.attrs.axis)]):
            return None  # the classes are no axis of the output any more
        return Answers(SCORES, axis, name == "relax.nn.softmax") if shape[axis - 1] > 1 else Answers(MULTILABEL)
    if name == "relax.sigmoid":
        return Answers(MULTILABEL, probabilities=True)
    if name == "relax.divide" and len(shape) == 1 < shape[0] and _is_norm(known, value.args[1]):
        return Answers(EMBEDDING)
    return Answers(MULTILABEL) if math.prod(shape) == 1 else None


def _by_shape(shape: Shape) -> Answers:
    """What the shape of an only output suggests."""
    if len(shape) == 2:
        return Answers(SCORES, 2)
    return Answers(REGRESSION) if len(shape) == 3 and shape[0] in PICTURE else Answers(SCORES)


def _concatenated(known: Values, result: relax.Expr, shape: Shape) -> list[Part]:
    """The parts that an output is put together from, if the end of one of them says what it is."""
    value, order = _end(known, result)
    if order or _name(value) != "relax.concat" or not isinstance(value.args[0], Tuple):
        return []
    whole = [int(extent) for extent in list(value.ty.shape)[1:]]
    axis = int(value.attrs.axis) % (len(whole) + 1)
    if axis == 0 or whole[:axis] != list(shape[:axis]):
        return []  # its axis is no axis of the output any more
    parts, start, told = [], 0, False
    for field in value.args[0].fields:
        own = tuple(int(extent) for extent in list(field.ty.shape)[1:])
        answers = _by_end(known, field, own)
        told |= answers is not None
        parts.append(Part(answers or Answers(REGRESSION), 0, axis, start, own[axis - 1]))
        start += own[axis - 1]
    return parts if told else []


def asked(text: str, function: relax.Function) -> Meaning:
    """What ``--output`` says that the outputs are.

    One text for each output, separated by commas, or one for all; or ``file.py:function`` that tells how far outputs
    are from others (`tvm_lowrank.bridge.own`). It is a kind, of scores with their axis as
    ``scores:2``; or several with the entries of an axis that they are, as ``regression@1:0-3+multilabel@1:4-83``.

    Raises
    ------
    UserError
        If there is no such kind, or the outputs have no such axis or entries.
    """
    outputs = Tensors.of(function)
    if is_reference(text) and text.partition(":")[0] not in KINDS:
        return Own(absolute(text), outputs.shapes)
    texts = text.split(",")
    if len(texts) == 1:
        texts *= len(outputs.shapes)
    if len(texts) != len(outputs.shapes):
        raise UserError(
            f"--output says what {len(texts)} outputs are, but the model has {len(outputs.shapes)}: {outputs}"
        )
    found = guessed(function)
    told = found.parts if isinstance(found, Mixture) else ()
    whole = [found] if isinstance(found, Answers) else [part.answers for part in told if not part.count]
    parts = []
    for number, (own, shape) in enumerate(zip(texts, outputs.shapes, strict=True)):
        for one in own.split("+"):
            part = _asked_part(one, number, shape)
            same = whole[number] if number < len(whole) and not part.count else None
            parts.append(part if same is None else Part(_like(part.answers, same, ":" in one), number))
    if len(parts) == 1 and not parts[0].count:
        return parts[0].answers
    return Mixture(outputs.shapes, tuple(parts))


def _asked_part(text: str, number: int, shape: Shape) -> Part:
    """A part of the output of this number, as it is asked for."""
    match = PART.fullmatch(text.strip())
    if match is None or match["kind"] not in KINDS or (match["classes"] and match["kind"] != SCORES):
        raise UserError(
            f"unknown --output {text!r}; give one of {', '.join(KINDS)}, scores:AXIS, KIND@AXIS:FIRST-LAST of some "
            "entries, with + between several, or file.py:function"
        )
    written = Tensors((shape,))
    axis = start = count = 0
    if match["axis"]:
        axis, start, last = (int(match[name]) for name in ("axis", "first", "last"))
        if not 1 <= axis <= len(shape) or not start <= last < shape[axis - 1]:
            raise UserError(f"--output {text}: outputs {written} have no entries {start} to {last} on axis {axis}")
        count = last + 1 - start
    own = tuple(count if i == axis else extent for i, extent in enumerate(shape, 1))
    default = axis or _by_shape(own).axis  # of the classes
    classes = int(match["classes"] or default)
    if match["kind"] == SCORES and (not 1 <= classes <= len(own) or own[classes - 1] < 2):
        raise UserError(f"--output {text}: outputs {written} have no classes on axis {classes}; give scores:AXIS")
    answers = Answers(match["kind"], classes) if match["kind"] == SCORES else Answers(match["kind"])
    return Part(answers, number, axis or 1, start, count)


def _like(wanted: Answers, found: Answers, exact: bool) -> Answers:
    """What is asked for, with what the output's end says of this kind; with ``exact`` only if the axis is the same."""
    return found if found.kind == wanted.kind and (not exact or found.axis == wanted.axis) else wanted


def _end(known: Values, result: relax.Expr) -> tuple[relax.Expr, Sequence[int]]:
    """The value of an output, but for what only gives it another shape, and in which order that puts its axes."""
    value: relax.Expr = known.get(result, result)
    order: list[int] = []
    while _name(value) in RESHAPES or (_name(value) == "relax.permute_dims" and not order):
        if _name(value) == "relax.permute_dims":
            order = [int(axis) for axis in value.attrs.axes]
        value = known.get(value.args[0], value.args[0])
    return value, order


def _is_norm(known: Values, divisor: relax.Expr) -> bool:
    """Whether what a vector is divided by has one number for each image."""
    value = known.get(divisor, divisor)
    if _name(value) == "relax.broadcast_to":
        divisor = value.args[0]
    shape = list(divisor.ty.shape) if getattr(divisor.ty, "shape", None) is not None else []
    return len(shape) == 2 and int(shape[1]) == 1


def _name(value: object) -> str:
    return str(getattr(value.op, "name", "")) if isinstance(value, relax.Call) else ""
