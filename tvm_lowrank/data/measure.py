"""How good a network is: what a metric keeps of each image, what that amounts to, and what compression cost.

A metric makes *rows* of outputs and targets, one for each image. Most are scores from 0 to 1 whose mean is the
accuracy; others are counts that are added up first, or whatever a function of the whole split needs. A drop comes with
an interval over the images, which both networks have in common. Nothing here knows of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tvm_lowrank.data.parts import Outputs, Targets
from tvm_lowrank.errors import UserError

NORMAL = NormalDist().inv_cdf(0.975)
INTERVAL = 2 * NORMAL  # length of a 95 % interval, in standard errors
RESAMPLES, FEW = 1000, 200  # of the images; few where each takes a pass over what is kept of them
Rows = np.ndarray  # (n, …), of numbers or of any objects
ScoreFunction = Callable[[Outputs, Targets], Rows]
Statistic = Callable[[np.ndarray], float]  # of the images with these numbers, some perhaps several times


class Unscored(UserError):
    """A metric has no number for a network: a search goes on where that is a compressed one."""


@dataclass(frozen=True)
class Unit:
    """What drops are counted in, the sign behind values, and by how much what a function returns is multiplied."""

    name: str
    sign: str
    scale: float


POINTS = Unit("points", "%", 100.0)


def unit_called(name: str) -> Unit:
    """Percent, whose differences are points, or a unit of a metric's own, such as dB."""
    return POINTS if name in ("", "%", POINTS.sign, POINTS.name) else Unit(name, name, 1.0)


@dataclass(frozen=True)
class Cost:
    """What damages are expected to cost before any was counted: ``rate`` x nats ** ``power``, in the metric's unit.

    ``unsure`` is the standard deviation of the rate's logarithm; ``spread`` that of what networks of the same damage
    lose, as a share of it.
    """

    rate: float
    power: float
    unsure: float
    spread: float


# of 8,000 or 10,000 test images, twenty networks that the bundled one became, refitted, reconstructed and fine-tuned,
# of 0.010 to 0.10 nats, lose 0.6 to 4.9 points: rates of 24 to 31. Two ResNet-20s: 26. A ResNet-50 on photographs: 7 to
# 11. With labels that are the dense answers rates are 50 to 100
ACCURACY = Cost(20.0, 0.8, 1.0, 0.07)
# whole-split metrics of a detector and a segmenter: plans of 1.4 and 14 points are off by 5 to 40 % from one rate
UNKNOWN = Cost(20.0, 0.8, 2.0, 0.3)


@dataclass(frozen=True)
class Metric:
    """What a right answer is.

    Attributes
    ----------
    name
        As `load_metric` takes it, valid from any folder.
    scores
        Of the outputs and targets of some images, a row for each.
    unit
        Of its values.
    whole
        Makes of the rows of a split a function of the numbers of images; None is the mean.
    compare
        Makes rows of those of the dense network and of one that is compared with it: such a metric needs no targets.
    better
        -1 where less is better.
    image
        What the value changes by when one of n images comes out wrong, times n; 0 where values change gradually.
    group
        Images that belong together, such as pairs.
    resamples
        How often the images are drawn again for an interval that has no formula.
    cost
        What damages are expected to cost.
    function
        The user's, as it is, whose kind is not known before it was `tried`.
    """

    name: str
    scores: ScoreFunction
    unit: Unit = POINTS
    whole: Callable[[Rows], Statistic] | None = None
    compare: Callable[[Rows, Rows], Rows] | None = None
    better: int = 1
    image: float = 1.0
    group: int = 1
    resamples: int = RESAMPLES
    cost: Cost = ACCURACY
    function: Callable[[Outputs, Targets], np.ndarray] | None = None

    @property
    def labelled(self) -> bool:
        """Whether it needs targets."""
        return self.compare is None

    @property
    def counted(self) -> bool:
        """Whether it is the mean of scores from 0 to 1, one an image."""
        return self.whole is None and self.image > 0

    @property
    def half_an_image(self) -> float:
        """What the value changes by when an image is half right, times n."""
        return self.unit.scale * self.image / 2

    def value(self, rows: Rows, dense: Rows | None = None) -> float:
        """What the rows of a split amount to, in the metric's unit; ``dense`` are those that they are compared with."""
        own = self._compared(rows if dense is None else dense, rows)
        return self.unit.scale * self._statistic(own)(np.arange(len(own)))

    def everything(self, dense: Rows) -> float:
        """The drop of a network that has no value: down to 0 from what the dense one has, or 100 % of differences."""
        return abs(self.value(dense, dense)) if self.better > 0 else self.unit.scale

    def drop(self, dense: Rows, rows: Rows, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """How much worse rows are than the dense network's of the same images, and the 95 % interval for that.

        Of scores from 0 to 1 it is `paired_drop`; else the percentiles of drops on images that are drawn with
        replacement, the same for both networks (Efron and Tibshirani 1993), and where values jump, wider by what an
        image of n may change, so that it does not shrink to nothing when no image differs.

        Raises
        ------
        UserError
            If the dense network's value is no number, or there are too few images.
        Unscored
            If only that of the other network is none.
        """
        before, after = self._compared(dense, dense), self._compared(dense, rows)
        first, second = self._statistic(before), self._statistic(after)
        groups = len(after) // self.group
        if not groups:
            raise UserError(f"{self.name} needs at least {self.group} images, not {len(after)}; give more")
        every = np.arange(groups * self.group)
        self.check(first(every), "the dense network")
        if not math.isfinite(value := second(every)):
            raise Unscored(f"metric {self.name} of the compressed network is {value}; correct it or compress less")
        if self.counted:
            return paired_drop(before, after)

        def lost(picked: np.ndarray) -> float:
            numbers = (self.group * picked[:, None] + np.arange(self.group)).ravel()
            return self.unit.scale * self.better * (first(numbers) - second(numbers))

        drop, random = lost(np.arange(groups)), np.random.default_rng(seed)
        drawn = [_or_nan(lost, random.integers(0, groups, groups)) for _ in range(self.resamples)]
        low, high = np.nanquantile([drop, *drawn], (0.025, 0.975)).tolist()
        more = NORMAL * self.unit.scale * self.image / len(after)
        return drop, (drop - math.hypot(max(0.0, drop - low), more), drop + math.hypot(max(0.0, high - drop), more))

    def check(self, value: float, what: str) -> None:
        """Raise UserError if a value is no number."""
        if not math.isfinite(value):
            raise UserError(f"metric {self.name} of {what} is {value}; correct it or its targets")

    def _compared(self, dense: Rows, rows: Rows) -> Rows:
        return rows if self.compare is None else self.compare(dense, rows)

    def _statistic(self, rows: Rows) -> Statistic:
        return mean(rows) if self.whole is None else self.whole(rows)


def _or_nan(value: Statistic, picked: np.ndarray) -> float:
    """A value, or NaN where a function fails on the images that happened to be drawn or gives no number."""
    try:
        found = value(picked)
    except UserError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def mean(rows: Rows) -> Statistic:
    """The mean of the scores (n,)."""
    return lambda picked: float(rows[picked].mean())


def of_sums(function: Callable[[np.ndarray], float]) -> Callable[[Rows], Statistic]:
    """A function of what counts (n, k) add up to: (k,)."""
    return lambda rows: lambda picked: function(np.bincount(picked, minlength=len(rows)) @ rows)


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
