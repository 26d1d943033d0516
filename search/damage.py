"""Damage: how much of the dense network's answer a candidate is predicted to lose.

The unit is the Kullback-Leibler divergence, in nats an image, from the dense network's class probabilities to the
changed network's, averaged over calibration images: it needs no labels, is far less noisy than counting wrong answers,
and for small changes adds up over sites. Each (site, method) is probed at a few ranks by really evaluating the network
with that one change; between probes, damage follows the expected output error of the factors, which is known for every
rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tvm_lowrank.decompose import Factors, Rank

# relative output errors near which a (site, method) is probed: nearly exact, useful, and about too far
PROBED_ERRORS = (0.01, 0.06, 0.25)
SLOPES = (0.5, 2.0)  # of log damage over log error, when extrapolating


def divergence(dense: np.ndarray, changed: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats of the softmax of (n, classes) logits."""
    p = torch.log_softmax(torch.from_numpy(dense).double(), dim=1)
    q = torch.log_softmax(torch.from_numpy(changed).double(), dim=1)
    return max(0.0, float((p.exp() * (p - q)).sum(dim=1).mean()))


def probe_ranks(factors: Factors, ranks: Sequence[Rank], power: float) -> list[Rank]:
    """The ranks, of those offered, whose errors relative to the output's `power` are nearest to `PROBED_ERRORS`."""
    relative = np.maximum(np.array([factors.error(rank) for rank in ranks]) / max(power, 1e-30), 1e-9)
    nearest = {int(np.argmin(np.abs(np.log(relative / error)))) for error in PROBED_ERRORS}
    return [ranks[i] for i in sorted(nearest)]


@dataclass(frozen=True)
class DamageCurve:
    """Damage of one (site, method) as a function of the factors' expected output error, through its probes."""

    errors: tuple[float, ...]
    damages: tuple[float, ...]

    @classmethod
    def through(cls, probes: dict[float, float]) -> DamageCurve:
        """A curve through {error: damage} probes, made monotone."""
        errors = sorted(probes)
        damages = np.maximum.accumulate([max(probes[error], 1e-9) for error in errors])
        return cls(tuple(max(e, 1e-30) for e in errors), tuple(float(d) for d in damages))

    def __call__(self, error: float) -> float:
        """Predicted damage: linear in the logarithms, with the outer slopes kept within `SLOPES` beyond the probes."""
        if error <= 0:
            return 0.0
        x, y, at = np.log(self.errors), np.log(self.damages), np.log(error)
        if len(x) == 1:
            return float(np.exp(y[0] + (at - x[0])))
        slopes = np.clip(np.diff(y) / np.maximum(np.diff(x), 1e-9), *SLOPES)
        if at < x[0]:
            return float(np.exp(y[0] + slopes[0] * (at - x[0])))
        if at > x[-1]:
            return float(np.exp(y[-1] + slopes[-1] * (at - x[-1])))
        return float(np.exp(np.interp(at, x, y)))
