"""What a compressed network is likely to lose, by how sure the dense one is of its answers.

Two networks differ in few decisions, and of a thousand images the labels say little about these: the counted drop has a
standard error of half a point. But the dense network tells how likely each of two answers is, once its probabilities
are calibrated by one temperature (Guo et al. 2017). The drop that these likelihoods make expected counts each changed
decision by what it costs on average. Its standard error is two to three times smaller, and it holds for any network and
metric, where the points that a damage in nats costs differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from tvm_lowrank.bridge.answers import SCORES, Answers, Meaning
from tvm_lowrank.data.measure import Rows, Unscored
from tvm_lowrank.data.metric import INTERVAL, Metric
from tvm_lowrank.data.parts import Outputs, Targets
from tvm_lowrank.errors import UserError

DRAWS = 32  # labels of each image
MOST = 3.0  # standard errors, and half an image, by which the likely score may differ from the counted one
# of a drop: what the likelihoods are off by. With 18 plans of three networks that lose 0.2 to 13 points of 1,000
# images, at most 0.09 from what 650 or 10,000 others show
UNSURE = 0.1


@dataclass(frozen=True, eq=False)
class Likely:
    """The labels of images as a dense network sees them: ``labels`` (draws, n)."""

    metric: Metric
    dense: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, metric: Metric, dense: Outputs, labels: Targets, answers: Meaning, *, seed: int = 0) -> Likely | None:
        """By its outputs (n, classes), which mean ``answers``, and the labels (n,) of the same images.

        None if the outputs are no scores of the labels' classes, as with any other outputs and targets, or say nothing
        of how often the network is right.
        """
        if (
            not (isinstance(dense, np.ndarray) and dense.ndim == 2)
            or not (isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu")
            or not isinstance(answers, Answers)
            or answers.kind != SCORES
            or not len(labels)
            or not 0 <= labels.min() <= labels.max() < dense.shape[1]
        ):
            return None
        cumulative = np.cumsum(calibrated(answers.logits(torch.from_numpy(dense))[:, 0].numpy(), labels), axis=1)
        drawn = np.random.default_rng(seed).random((DRAWS, len(labels), 1)) * cumulative[:, -1:]
        found = cls(metric, dense, np.stack([(own >= cumulative).sum(axis=1) for own in drawn]))
        counted, likely = metric.scores(dense, labels), found._scores(dense).mean(axis=0)
        off = counted - likely
        return found if abs(off.mean()) <= MOST * off.std() / math.sqrt(len(off)) + 0.5 / len(off) else None

    def drop(self, changed: np.ndarray) -> tuple[float, float]:
        """Points that a network of these outputs (n, classes) is likely to lose, and their standard error."""
        lost = (self._scores(self.dense) - self._scores(changed)).mean(axis=0)
        count, drop = len(lost), 100 * float(lost.mean())
        half_an_image = 50 / count  # where no decision has changed, some may elsewhere
        return drop, math.hypot(100 * float(lost.std()) / math.sqrt(count), half_an_image, UNSURE * drop)

    def _scores(self, outputs: np.ndarray) -> np.ndarray:
        return np.stack([self.metric.scores(outputs, own) for own in self.labels])


def lost(
    metric: Metric,
    dense: Rows,
    rows: Callable[[], Rows],
    likely: Callable[[], tuple[float, float]] | None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What a compressed network lost, in the metric's unit: ``drop`` and its ``error``, ``likely`` and that one's.

    ``dense`` are the rows of the dense network, ``rows`` makes its own, and ``likely`` is `Likely.drop` of it. Where
    the metric has no number for it everything is lost, and ``unscored`` says why.

    Raises
    ------
    UserError
        If a user's function fails.
    """
    try:
        drop, (low, high) = metric.drop(dense, rows(), seed=seed)
    except Unscored as missing:
        everything, why = metric.everything(dense), str(missing).partition(";")[0]
        return {"drop": everything, "error": 0.0, "likely": everything, "likely_error": 0.0, "unscored": why}
    except UserError as error:
        raise UserError(f"{error}; it failed for a compressed network: correct it and add --resume") from error
    spread = (high - low) / INTERVAL
    expected, unsure = (drop, spread) if likely is None else likely()
    if not math.isfinite(expected):
        expected, unsure = drop, spread
    return {"drop": drop, "error": spread, "likely": expected, "likely_error": unsure}


def calibrated(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class probabilities (n, classes) at the temperature at which the labels (n,) are the most likely."""

    def logarithms(temperature: float) -> np.ndarray:
        scaled = logits.astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))

    def unlikely(logarithm: float) -> float:
        return -float(logarithms(math.exp(logarithm))[np.arange(len(labels)), labels].mean())

    found = minimize_scalar(unlikely, bounds=(math.log(1e-4), math.log(100)), method="bounded")
    return np.exp(logarithms(math.exp(found.x)))
