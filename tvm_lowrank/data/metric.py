"""Accuracy: a score in [0, 1] per image, and how much of it compression cost, with a paired interval.

Accuracy is 100 × the mean score; a drop is in points of it. Nothing here knows of models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from tvm_lowrank import console
from tvm_lowrank.data.images import Images
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import absolute, is_reference, load_object, summary

INTERVAL = 2 * NormalDist().inv_cdf(0.975)  # length of a 95 % interval, in standard errors
BINARY = {"binary": 0.0, "binary-probability": 0.5}  # and above what an output is a yes
ScoreFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """``scores(logits, labels)`` takes float32 (n, classes) and int64 (n,) and returns float64 (n,) in [0, 1]."""

    name: str
    scores: ScoreFunction


def load_metric(spec: str = "top1") -> Metric:
    """The metric called ``top1`` or ``top5``, or the user's function ``file.py:function``.

    ``binary`` is top1 of outputs of one number an image, which is above 0 where the label is 1;
    ``binary-probability`` of those that are above one half.

    The user's function gets numpy arrays (logits, labels) and returns a score in [0, 1] per image; if it returns a
    single number, it is called image by image.

    Raises
    ------
    UserError
        If there is no such metric; from ``scores``, if the user's function fails or returns something else.
    """
    if spec in ("top1", "top5"):
        return Metric(spec, _top(int(spec[3:])))
    if spec in BINARY:
        return Metric(spec, _above(BINARY[spec]))
    if not is_reference(spec):
        raise UserError(f"unknown metric {spec!r}; use top1, top5 or file.py:function")
    function = load_object(spec)
    if not callable(function):
        raise UserError(f"metric {spec} is not a function; it must take (logits, labels)")
    return Metric(absolute(spec), _checked(function, spec))


def accuracy(scores: np.ndarray) -> float:
    """The mean of the scores (n,), in percent."""
    return 100 * float(np.mean(scores))


def paired_drop(
    dense: np.ndarray, compressed: np.ndarray, *, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """How many points the mean score falls from ``dense`` to ``compressed``, and the interval for that drop.

    Both arrays are (n,), scores of the same images in the same order. The interval is Agresti and Min's adjusted Wald
    interval for paired proportions (Statistics in Medicine 24, 2005): half an observation is added to each cell of
    the 2 × 2 table, which keeps it from shrinking to nothing when no image differs. In terms of the differences this
    adds two observations with mean 0 and sum of squares 1, which serves scores that are not binary as well.
    """
    if dense.shape != compressed.shape or dense.ndim != 1 or not dense.size:
        raise ValueError(f"scores of the same images are needed, got {dense.shape} and {compressed.shape}")
    difference = np.asarray(dense, "float64") - np.asarray(compressed, "float64")
    n = difference.size + 2
    centre = difference.sum() / n
    variance = (np.square(difference).sum() + 1) / n - centre**2
    half = NormalDist().inv_cdf((1 + confidence) / 2) * np.sqrt(variance / n)
    drop = float(difference.mean())
    low = min(drop, max(-1.0, centre - half))
    high = max(drop, min(1.0, centre + half))
    return 100 * drop, (100 * float(low), 100 * float(high))


def evaluate(
    model: Callable[[Any], np.ndarray],
    images: Images,
    labels: np.ndarray,
    metric: Metric,
    *,
    description: str = "accuracy",
    chunk: int | None = 64,
) -> np.ndarray:
    """The metric's score of each image, float64 (n,); ``model`` maps float32 (m, C, H, W) to outputs (m, …).

    It is given so many images at once; with None all of them, to be read as it can take them.
    """
    if chunk is None:
        return metric.scores(model(images), labels)
    scores = []
    with console.progress(description, len(images)) as advance:
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            scores.append(metric.scores(model(images[part]), labels[part]))
            advance(len(labels[part]))
    return np.concatenate(scores)


def _top(k: int) -> ScoreFunction:
    def scores(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if logits.ndim != 2:
            raise UserError(f"top{k} needs outputs of shape (n, classes), not {logits.shape}; use a metric of your own")
        n, classes = logits.shape
        if classes <= k:
            raise UserError(f"top{k} is always right with {classes} classes; use a smaller k or a metric of your own")
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(f"labels {labels.min()} to {labels.max()} do not fit {classes} classes; count from 0")
        own = logits[np.arange(n), labels][:, None]
        # ties go to the lower class, as with argmax
        before = (logits > own) | ((logits == own) & (np.arange(classes) < labels[:, None]))
        # comparisons with NaN are false: an image with a NaN in its outputs would otherwise count as right
        right = (before.sum(axis=1) < k) & ~np.isnan(logits).any(axis=1)
        return right.astype("float64")

    return scores


def _above(even: float) -> ScoreFunction:
    def scores(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if outputs.size != len(outputs):
            raise UserError(f"this metric needs one number an image, not outputs {outputs.shape}; use another --metric")
        values = outputs.reshape(len(outputs))
        return (((values > even) == (labels == 1)) & ~np.isnan(values)).astype("float64")

    return scores


def _checked(function: Callable[..., object], spec: str) -> ScoreFunction:
    def call(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(function(logits, labels), dtype="float64")
        except Exception as error:
            raise UserError(f"metric {spec} failed: {summary(error)}; it must take (logits, labels)") from error

    def scores(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        result = call(logits, labels)
        if result.ndim == 0:
            result = np.array([call(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
        if result.shape != (len(labels),):
            raise UserError(
                f"metric {spec} returned shape {result.shape} for {len(labels)} images; return one score each"
            )
        if not ((result >= 0) & (result <= 1)).all():
            raise UserError(f"metric {spec} returned {result.min()} to {result.max()}; scores must lie from 0 to 1")
        return result

    return scores
