"""Accuracy: which metric is meant, whether it takes what the network and the data give, and its rows of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tvm_lowrank import console
from tvm_lowrank.data import detection
from tvm_lowrank.data.builtin import SIMPLE
from tvm_lowrank.data.images import Images
from tvm_lowrank.data.measure import (
    FEW,
    INTERVAL,
    POINTS,
    UNKNOWN,
    Metric,
    Rows,
    Statistic,
    Unit,
    paired_drop,
    unit_called,
)
from tvm_lowrank.data.parts import Outputs, Targets, count, each, objects, take
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import absolute, is_reference, load_object, summary

__all__ = ["INTERVAL", "Metric", "evaluate", "load_metric", "paired_drop", "tried"]

BUILT_IN = {**SIMPLE, "voc-map": detection.voc, "coco-map": detection.coco, "oks-map": detection.oks}
TRIED, TRIED_AGAIN = 2, 64  # images; more where two say nothing to a function of the whole split


def load_metric(spec: str = "top1") -> Metric:
    """The metric of a name in `BUILT_IN`, or the user's function ``file.py:function``.

    ``NAME:file.py:function`` is a metric of what the function makes of the outputs: of (m, …), or a tuple of such
    arrays, an array (m, …), or for average precisions a list of m mappings.

    The user's metric gets (outputs, targets) of some images, as the network and the data give them. It returns a score
    for each, (m,), or one number for all: then it is a metric of the whole split, once it was `tried`. Numbers are from
    0 to 1 and shown in percent, unless the function has an attribute ``unit``, such as "dB". Higher is better.

    Raises
    ------
    UserError
        If there is no such metric, or a package is missing that it needs; from ``scores``, if outputs and targets do
        not fit it, or the user's function fails or returns something else.
    """
    name, _, after = spec.partition(":")
    if name in BUILT_IN:
        return _processed(BUILT_IN[name](), after)
    if not is_reference(spec):
        raise UserError(f"unknown metric {spec!r}; use {', '.join(BUILT_IN)} or file.py:function")
    function = load_object(spec)
    if not callable(function):
        raise UserError(f"metric {spec} is not a function; it must take (outputs, targets)")
    return _own(function, spec)


def tried(metric: Metric, outputs: Callable[[int], Outputs], targets: Targets) -> Metric:
    """The metric, after it was given the first images' outputs and targets: now it is known what a function returns.

    Parameters
    ----------
    outputs : of so many first images.

    Raises
    ------
    UserError
        If it fails, or gives something else than finite numbers.
    """
    first = min(TRIED, count(targets))
    try:
        return _tried(metric, outputs(first), take(targets, slice(first)))
    except UserError:
        more = min(TRIED_AGAIN, count(targets))
        if metric.function is None or more == first:
            raise
        return _tried(metric, outputs(more), take(targets, slice(more)))


def evaluate(
    model: Callable[[Any], Outputs],
    images: Images,
    targets: Targets,
    metric: Metric,
    *,
    description: str = "accuracy",
    chunk: int | None = 64,
) -> Rows:
    """The metric's row of each image, (n, …); ``model`` maps float32 (m, C, H, W) to outputs (m, …).

    It is given so many images at once; with None all of them, to be read as it can take them.
    """
    if chunk is None:
        return metric.scores(model(images), targets)
    rows = []
    with console.progress(description, len(images)) as advance:
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            rows.append(metric.scores(model(images[part]), take(targets, part)))
            advance(len(rows[-1]))
    return np.concatenate(rows)


def _tried(metric: Metric, outputs: Outputs, targets: Targets) -> Metric:
    if metric.function is not None and metric.function(outputs, targets).ndim == 0:
        metric = _of_all(metric, metric.function, listed=isinstance(targets, list))
    rows = metric.scores(outputs, targets)
    if len(rows) != count(targets):
        raise UserError(f"metric {metric.name} gave {len(rows)} rows for {count(targets)} images; one for each")
    metric.check(metric.value(rows), f"the dense network on the first {len(rows)} images")
    return metric


# post-processing


def _processed(metric: Metric, after: str) -> Metric:
    """A metric of what a function makes of the outputs."""
    if not after:
        return metric
    if not is_reference(after):
        raise UserError(f"metric {metric.name}:{after} names no function; write {metric.name}:file.py:function")
    function = load_object(after)
    if not callable(function):
        raise UserError(f"{after} is not a function; it must take outputs")

    def scores(outputs: Outputs, targets: Targets) -> Rows:
        return metric.scores(_called(function, outputs, after), targets)

    return replace(metric, name=f"{metric.name}:{absolute(after)}", scores=scores)


def _called(function: Callable[[Outputs], Any], outputs: Outputs, spec: str) -> Any:
    """What a user's function makes of outputs: tensors as arrays, a list as it is."""
    try:
        made = function(outputs)
        if isinstance(made, tuple):
            return tuple(_as_array(own) for own in made)
        found = made if isinstance(made, list) else _as_array(made)
    except Exception as error:
        raise UserError(f"{spec} failed: {summary(error)}; it must take outputs") from error
    if isinstance(found, np.ndarray) and (not found.ndim or len(found) != count(outputs)):
        raise UserError(f"{spec} returned shape {found.shape} for {count(outputs)} images; return something for each")
    return found


def _as_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if callable(getattr(value, "detach", None)) else value)


# the user's metric


def _own(function: Callable[..., object], spec: str) -> Metric:
    unit = unit_called(str(getattr(function, "unit", "")))

    def call(outputs: Outputs, targets: Targets) -> np.ndarray:
        try:
            return np.asarray(function(outputs, targets), dtype="float64")
        except Exception as error:
            raise UserError(f"metric {spec} failed: {summary(error)}; it must take (outputs, targets)") from error

    def scores(outputs: Outputs, targets: Targets) -> Rows:
        result, n = call(outputs, targets), count(targets)
        if result.ndim == 0:
            each_alone = (slice(i, i + 1) for i in range(n))
            result = np.array([call(take(outputs, own), take(targets, own)) for own in each_alone])
        if result.shape != (n,):
            raise UserError(f"metric {spec} returned shape {result.shape} for {n} images; return one score each")
        _check(result, unit, spec)
        return result

    gradual = 1.0 if unit == POINTS else 0.0
    return Metric(absolute(spec), scores, unit=unit, image=gradual, cost=UNKNOWN, function=call)


def _check(values: np.ndarray, unit: Unit, spec: str) -> None:
    """Raise UserError if a number is out of range; what is no number is for `Metric.drop` to judge."""
    known = values[np.isfinite(values)]
    if unit == POINTS and not ((known >= 0) & (known <= 1)).all():
        unlike = "scores must lie from 0 to 1, or the function have a unit"
        raise UserError(f"metric {spec} returned {known.min()} to {known.max()}; {unlike}")


def _of_all(metric: Metric, function: Callable[[Outputs, Targets], np.ndarray], *, listed: bool) -> Metric:
    """A user's metric that returns one number for all images; ``listed`` says that targets are no array."""

    def rows(outputs: Outputs, targets: Targets) -> Rows:
        return objects(list(zip(each(outputs), each(targets), strict=True)))

    def whole(rows: Rows) -> Statistic:
        outputs, targets = (list(own) for own in zip(*rows, strict=True))
        several = isinstance(outputs[0], tuple)
        stacked = tuple(np.stack(own) for own in zip(*outputs, strict=True)) if several else np.stack(outputs)
        known = targets if listed else np.stack(targets)

        def value(picked: np.ndarray) -> float:
            result = function(take(stacked, picked), take(known, picked))
            if result.ndim:
                raise UserError(f"metric {metric.name} returned shape {result.shape}; return one number, as before")
            _check(result, metric.unit, metric.name)
            return float(result)

        return value

    return replace(metric, scores=rows, whole=whole, resamples=FEW, function=None)
