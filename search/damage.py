"""Damage: how much of the dense network's answer a candidate is predicted to lose.

The unit is the Kullback-Leibler divergence, in nats an image, from the dense network's answers (class probabilities, or
what its outputs mean else: `tvm_lowrank.bridge.answers`) to the changed network's, averaged over calibration images: it
needs no labels, is far less noisy than counting wrong answers, and for small changes adds up over sites. The Fisher
information of a site's outputs predicts it to second order for every method and rank (see
`tvm_lowrank.methods.common.fisher`). What larger changes really cost grows faster, alike for all methods: each site is
probed by really evaluating the network with that one change, a few times, and a curve through the probes corrects the
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from tvm_lowrank.bridge.answers import Meaning
from tvm_lowrank.plan import Choice

# predicted damages at which a site is probed, as shares of what it may take in a likely plan
PROBED_SHARES = (0.1, 0.5, 2.0, 8.0)
SLOPES = (0.7, 2.0)  # of log damage over log prediction, when extrapolating
SOLVED = 3  # ranks of a site that are solved where each takes a solve; the errors of the others follow from them
MANY = 6  # from which on the largest rank, whose solve takes longest, is not among them


def divergence(answers: Meaning, dense: np.ndarray, changed: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats an image of outputs (n, …), by what they mean.

    Where the changed ones are no numbers, nothing is known of the image: all answers are as likely.
    """
    finite = np.isfinite(changed).reshape(len(changed), -1).all(axis=1)
    changed = np.where(finite.reshape(-1, *[1] * (changed.ndim - 1)), changed, answers.unknown)
    nats = answers.divergences(torch.from_numpy(dense).double(), torch.from_numpy(changed).double())
    return max(0.0, float(nats.mean()))


def to_solve(costs: Mapping[Choice, float]) -> list[Choice]:
    """Which choices of one method tell the errors of all, in ascending order of their costs; see `interpolated`."""
    ordered = sorted(costs, key=lambda choice: costs[choice])
    x = np.sqrt([costs[choice] for choice in ordered])
    goals = np.linspace(x[0], x[-2 if len(x) >= MANY else -1], SOLVED)
    return [ordered[i] for i in sorted({int(np.argmin(np.abs(x - goal))) for goal in goals})]


def interpolated(costs: Mapping[Choice, float], error: Callable[[Choice], float]) -> dict[Choice, float]:
    """The errors of the choices of one method, by those of `to_solve`; ``costs`` are MACs, or grow like them.

    The logarithm of the error is nearly straight over the square root of the cost, so a monotone cubic goes through it:
    with CP and Tucker at the sites of the bundled example it is off by 0.03 and 0.04 on average.
    """
    solved = to_solve(costs)
    errors = np.log([max(error(choice), 1e-30) for choice in solved])
    errors = np.minimum.accumulate(errors)  # a solve may end higher than that of a lower rank, whose chain it contains
    ordered = sorted(costs, key=lambda choice: costs[choice])
    if len(solved) > 1:
        curve = PchipInterpolator(np.sqrt([costs[choice] for choice in solved]), errors)
        errors = np.minimum.accumulate(curve(np.sqrt([costs[choice] for choice in ordered])))
    return dict(zip(ordered, np.exp(errors).tolist(), strict=True))


def probes(predicted: Mapping[Choice, float], share: float) -> list[Choice]:
    """With which candidates to probe a site: predicted near `PROBED_SHARES` of `share` nats, methods in turns."""
    chosen: list[Choice] = []
    for goal in PROBED_SHARES:

        def distance(choice: Choice, goal: float = goal) -> tuple[int, float]:
            away = abs(math.log(max(predicted[choice], 1e-12) / (goal * share)))
            # twice as far is the price of a method that was probed already
            return round(away / math.log(2)) + sum(c.method == choice.method for c in chosen), away

        nearest = min(predicted, key=distance, default=None)
        if nearest is not None and nearest not in chosen:
            chosen.append(nearest)
    return chosen


@dataclass(frozen=True)
class DamageCurve:
    """Damage of a site as a function of its second-order prediction, through the probes."""

    predicted: tuple[float, ...]
    damages: tuple[float, ...]

    @classmethod
    def through(cls, probes: dict[float, float]) -> DamageCurve:
        """A curve through {prediction: damage} probes, made monotone."""
        predicted = sorted(probes)
        damages = np.maximum.accumulate([max(probes[value], 1e-9) for value in predicted])
        return cls(tuple(max(value, 1e-30) for value in predicted), tuple(float(d) for d in damages))

    @classmethod
    def mean(cls, probes: Iterable[Mapping[float, float]]) -> DamageCurve:
        """For a site without probes: the prediction times the geometric mean of what others' probes were of theirs."""
        factors = [max(damage, 1e-9) / max(value, 1e-30) for own in probes for value, damage in own.items()]
        return cls((1.0,), (math.exp(np.mean(np.log(factors))) if factors else 1.0,))

    def __call__(self, predicted: float) -> float:
        """The corrected prediction: linear in the logarithms, its outer slopes within `SLOPES` beyond the probes."""
        if predicted <= 0:
            return 0.0
        x, y, at = np.log(self.predicted), np.log(self.damages), np.log(predicted)
        if len(x) == 1:
            return float(np.exp(y[0] + (at - x[0])))
        slopes = np.clip(np.diff(y) / np.maximum(np.diff(x), 1e-9), *SLOPES)
        if at < x[0]:
            return float(np.exp(y[0] + slopes[0] * (at - x[0])))
        if at > x[-1]:
            return float(np.exp(y[-1] + slopes[-1] * (at - x[-1])))
        return float(np.exp(np.interp(at, x, y)))
