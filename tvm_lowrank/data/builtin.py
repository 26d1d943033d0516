"""The metrics that come with the tool, but for those of detections (`tvm_lowrank.data.detection`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from tvm_lowrank.data.form import by
from tvm_lowrank.data.measure import UNKNOWN, Cost, Metric, Rows, ScoreFunction, Statistic, Unit, of_sums
from tvm_lowrank.data.parts import Outputs, Targets, arrays, count, objects
from tvm_lowrank.errors import UserError

DECIBEL = Unit("dB", "dB", 1.0)
MOST_DECIBEL = 100.0  # of a picture that is exactly right
MASKS = 255  # classes of masks that a function of the user's makes; 255 is no class as a rule


def library(name: str, metric: str) -> Any:
    """A module of a package that only some metrics need; UserError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"--metric {metric} needs {package}; pip install 'tvm_lowrank[metrics]'") from error


def one(outputs: Outputs, metric: str) -> np.ndarray:
    """The only output of a network; UserError if there are several."""
    if isinstance(outputs, tuple):
        raise UserError(
            f"{metric} takes one output, the network has {len(outputs)}; choose one by {metric}:file.py:function"
        )
    return outputs


def numbers(targets: Targets, metric: str) -> np.ndarray:
    """Targets that are an array of numbers; UserError if they are not."""
    if isinstance(targets, list) or targets.dtype.kind not in "biuf":
        kind = "lists" if isinstance(targets, list) else str(targets.dtype)
        raise UserError(f"{metric} takes targets that are numbers of one shape, not {kind}; correct the data")
    return targets


def _unlike(metric: str, what: str, outputs: np.ndarray, targets: np.ndarray) -> UserError:
    return UserError(
        f"{metric} takes {what}, not outputs {by(outputs.shape)} and targets {by(targets.shape)}; make them so by "
        f"--metric {metric}:file.py:function, or use another metric"
    )


# class labels


def top(k: int) -> ScoreFunction:
    """Whether the label is among the k highest of class scores (n, classes)."""

    def scores(outputs: Outputs, targets: Targets) -> Rows:
        logits, labels = one(outputs, f"top{k}"), numbers(targets, f"top{k}")
        if logits.ndim != 2:
            raise UserError(f"top{k} needs outputs of shape (n, classes), not {logits.shape}; use a metric of your own")
        n, classes = logits.shape
        if labels.shape != (n,) or labels.dtype.kind not in "iu":
            raise UserError(
                f"top{k} needs one integer label per image, not targets of shape {by(labels.shape)} ({labels.dtype}); "
                "use another metric"
            )
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


def above(even: float) -> ScoreFunction:
    """Whether one number an image is above ``even`` where the label is 1."""

    def scores(outputs: Outputs, targets: Targets) -> Rows:
        values, labels = one(outputs, "binary"), numbers(targets, "binary")
        if values.size != len(values):
            raise UserError(f"this metric needs one number an image, not outputs {values.shape}; use another --metric")
        if labels.size != len(values):
            raise _unlike("binary", "a label for each image", values, labels)
        flat = values.reshape(len(values))
        return (((flat > even) == (labels.reshape(len(values)) == 1)) & ~np.isnan(flat)).astype("float64")

    return scores


def f1_counts(even: float) -> ScoreFunction:
    """Of independent labels (n, k): hits, false alarms and misses of each, (n, 3 k)."""

    def rows(outputs: Outputs, targets: Targets) -> Rows:
        values, labels = one(outputs, "f1"), numbers(targets, "f1")
        if values.ndim != 2 or labels.shape != values.shape:
            raise _unlike("f1", "a number for each label, and 0 or 1 for each", values, labels)
        if not ((labels == 0) | (labels == 1)).all():
            raise UserError(f"f1 takes targets that are 0 or 1, not {labels.min()} to {labels.max()}; correct the data")
        said, true = values > even, labels == 1
        return np.concatenate([said & true, said & ~true, ~said & true], axis=1).astype("float64")

    return rows


def mean_f1(sums: np.ndarray) -> float:
    """The mean over the labels that occur, or are said to."""
    hits, alarms, misses = sums.reshape(3, -1)
    return _mean_ratio(2 * hits, 2 * hits + alarms + misses)


def _mean_ratio(parts: np.ndarray, wholes: np.ndarray) -> float:
    some = wholes > 0
    return float((parts[some] / wholes[some]).mean()) if some.any() else 0.0


# masks


def overlaps_of(metric: str, even: float) -> ScoreFunction:
    """Of masks: pixels of each class in both, and in either alone added up, (n, 2 classes).

    Outputs are scores (n, classes, H, W), one number a pixel (n, H, W) or (n, 1, H, W), above ``even`` where the mask
    is 1, or integers (n, H, W). Targets are integers (n, H, W); pixels of other classes than there are do not count.
    """

    def rows(outputs: Outputs, targets: Targets) -> Rows:
        values, masks = one(outputs, metric), numbers(targets, metric)
        if masks.ndim == 4 and masks.shape[1] == 1:
            masks = masks[:, 0]
        said, classes = _masks(values, even)
        if said.shape != masks.shape or masks.ndim != 3:
            raise _unlike(metric, "a class for each pixel", values, masks)
        if masks.dtype.kind == "f":
            raise UserError(f"{metric} takes masks of integers, not {masks.dtype}; correct the data")
        found = np.zeros((len(said), 2 * classes))
        for row, own, mask in zip(found, said, masks.astype("int64"), strict=True):
            valid = (mask >= 0) & (mask < classes)
            own, mask = own[valid], mask[valid]
            both, one_of = np.bincount(own[own == mask], minlength=classes), np.bincount(own, minlength=classes)
            row[:classes], row[classes:] = both, one_of + np.bincount(mask, minlength=classes)
        return found

    return rows


def _masks(values: np.ndarray, even: float) -> tuple[np.ndarray, int]:
    """Classes (n, H, W), and how many there are."""
    if values.dtype.kind in "biu":
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if not 0 <= low <= high < MASKS:
            raise UserError(f"masks hold classes {low} to {high}; give 0 to {MASKS - 1}")
        return values.astype("int64"), MASKS
    if values.ndim == 4 and values.shape[1] > 1:
        return values.argmax(axis=1), values.shape[1]
    flat = values[:, 0] if values.ndim == 4 else values
    return (flat > even).astype("int64"), 2


def mean_iou(sums: np.ndarray) -> float:
    """Intersection over union, the mean over the classes that occur."""
    both, added = sums.reshape(2, -1)
    return _mean_ratio(both, added - both)


def mean_dice(sums: np.ndarray) -> float:
    """Twice the intersection over both areas, the mean over the classes that occur, but for 0, the background."""
    both, added = sums.reshape(2, -1)[:, 1:]
    return _mean_ratio(2 * both, added)


# pictures


def _pictures(metric: str, outputs: Outputs, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Both on the scale 0 to 1, (n, C, H, W); targets may be uint8."""
    values, wanted = one(outputs, metric), numbers(targets, metric)
    if wanted.dtype == np.uint8:
        wanted = wanted / np.float32(255)
    if values.shape != wanted.shape or values.ndim != 4:
        raise _unlike(metric, "pictures (n, C, H, W)", values, wanted)
    return values.astype("float64"), wanted.astype("float64")


def psnr(outputs: Outputs, targets: Targets) -> Rows:
    """Peak signal-to-noise ratio of each picture in dB, of a peak of 1."""
    values, wanted = _pictures("psnr", outputs, targets)
    error = np.square(values - wanted).mean(axis=(1, 2, 3))
    return np.nan_to_num(-10 * np.log10(np.maximum(error, 10 ** (-MOST_DECIBEL / 10))), nan=0.0, neginf=0.0)


def ssim(outputs: Outputs, targets: Targets) -> Rows:
    """Structural similarity of each picture (Wang et al. 2004), by torchmetrics."""
    import torch

    values, wanted = (torch.from_numpy(own) for own in _pictures("ssim", outputs, targets))
    compare = library("torchmetrics.functional.image", "ssim").structural_similarity_index_measure
    found = compare(values, wanted, data_range=1.0, reduction="none")
    return np.nan_to_num(found.reshape(len(values)).numpy())


# embeddings


def embedded(outputs: Outputs, targets: Targets) -> Rows:
    """Vectors of length 1, each with the number of whom it shows: (n, d + 1)."""
    values, people = one(outputs, "verification"), numbers(targets, "verification")
    if values.ndim != 2 or people.shape != (len(values),):
        raise _unlike("verification", "a vector for each image, and the number of whom it shows", values, people)
    values = np.nan_to_num(values.astype("float64"), posinf=0.0, neginf=0.0)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.concatenate([values / np.maximum(lengths, 1e-30), people[:, None]], axis=1)


def verified(rows: Rows) -> Statistic:
    """Of pairs of images that follow each other, the share told right by the best threshold of their similarity."""
    even, odd = rows[: len(rows) // 2 * 2].reshape(-1, 2, rows.shape[1]).swapaxes(0, 1)
    likeness, same = (even[:, :-1] * odd[:, :-1]).sum(axis=1), even[:, -1] == odd[:, -1]

    def share(picked: np.ndarray) -> float:
        pairs = picked[::2][: len(picked) // 2] // 2
        order = np.argsort(-likeness[pairs], kind="stable")
        alike, values = same[pairs][order], likeness[pairs][order]
        right = np.concatenate([[0], np.cumsum(np.where(alike, 1, -1))]) + (~alike).sum()
        between = np.concatenate([[True], values[1:] != values[:-1], [True]])  # no threshold parts equal ones
        return float(right[between].max() / len(pairs))

    return share


# compared with the dense network


def decided(axis: int | None, even: float = 0.0) -> ScoreFunction:
    """The decisions of each image: a class for each position along the other axes, or a yes or no for each number."""

    def decisions(values: np.ndarray) -> np.ndarray:
        if axis is None:
            return (values > even).reshape(len(values), -1).astype("int32")
        if values.ndim <= axis or values.shape[axis] < 2:
            raise UserError(f"agreement needs outputs with classes on axis {axis}, not {by(values.shape)}; use another")
        best = np.where(np.isnan(values).any(axis=axis), -1, values.argmax(axis=axis))
        return best.reshape(len(values), -1).astype("int32")

    return lambda outputs, _: np.concatenate([decisions(own) for own in arrays(outputs)], axis=1)


def agreeing(dense: Rows, rows: Rows) -> Rows:
    """The share of equal decisions of each image, (n,)."""
    return (dense == rows).mean(axis=1)


def as_they_are(outputs: Outputs, _: Targets) -> Rows:
    """The outputs of each image."""
    if not isinstance(outputs, tuple):
        return outputs.reshape(len(outputs), -1)
    return objects([[own[number].ravel() for own in outputs] for number in range(count(outputs))])


def errors_of(dense: Rows, rows: Rows) -> Rows:
    """Sums of squares of each output's differences and of the dense network's own, (n, 2 outputs)."""
    several = dense.dtype == object

    def squares(wanted: Any, got: Any) -> list[float]:
        pairs = list(zip(wanted, got, strict=True)) if several else [(wanted, got)]
        differences = [
            float(np.square(np.nan_to_num(b.astype("float64"), posinf=0.0, neginf=0.0) - a).sum()) for a, b in pairs
        ]
        return [*differences, *(float(np.square(a.astype("float64")).sum()) for a, _ in pairs)]

    return np.array([squares(*pair) for pair in zip(dense, rows, strict=True)])


def relative_error(sums: np.ndarray) -> float:
    """The root of the squares of differences relative to those of the values, the mean over the outputs."""
    differences, own = sums.reshape(2, -1)
    return float(np.sqrt(differences / np.maximum(own, 1e-30)).mean())


# the list of all

YES = "-probability"  # after the name of a metric of yes or no, where the network ends in a sigmoid
GRADUAL: dict[str, Any] = {"image": 0.0, "cost": UNKNOWN}


def _yes_or_no(name: str, of: Callable[[float], Metric]) -> dict[str, Callable[[], Metric]]:
    return {name: lambda: of(0.0), name + YES: lambda: replace(of(0.5), name=name + YES)}


def _checked(name: str, package: str, metric: Metric) -> Metric:
    library(package, name)
    return metric


SIMPLE: dict[str, Callable[[], Metric]] = {
    "top1": lambda: Metric("top1", top(1)),
    "top5": lambda: Metric("top5", top(5)),
    **_yes_or_no("binary", lambda even: Metric("binary", above(even))),
    **_yes_or_no("f1", lambda even: Metric("f1", f1_counts(even), whole=of_sums(mean_f1), cost=UNKNOWN)),
    **_yes_or_no(
        "mean-iou", lambda even: Metric("mean-iou", overlaps_of("mean-iou", even), whole=of_sums(mean_iou), **GRADUAL)
    ),
    **_yes_or_no("dice", lambda even: Metric("dice", overlaps_of("dice", even), whole=of_sums(mean_dice), **GRADUAL)),
    "psnr": lambda: Metric("psnr", psnr, DECIBEL, image=0.0, cost=Cost(100.0, 1.0, 3.0, 0.3)),
    "ssim": lambda: _checked("ssim", "torchmetrics", Metric("ssim", ssim, **GRADUAL)),
    "verification": lambda: Metric("verification", embedded, whole=verified, group=2, cost=UNKNOWN),
    "agreement": lambda: Metric("agreement", decided(1), compare=agreeing, cost=Cost(20.0, 0.5, 1.0, 0.1)),
    "agreement-tokens": lambda: replace(SIMPLE["agreement"](), name="agreement-tokens", scores=decided(2)),
    **_yes_or_no(
        "agreement-labels",
        lambda even: replace(SIMPLE["agreement"](), name="agreement-labels", scores=decided(None, even)),
    ),
    "relative-error": lambda: Metric(
        "relative-error",
        as_they_are,
        whole=of_sums(relative_error),
        compare=errors_of,
        better=-1,
        image=0.0,
        cost=Cost(100.0, 0.5, 1.5, 0.1),
    ),
}
