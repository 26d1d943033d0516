"""What a damage costs in points: learnt from all plans that were evaluated.

What one plan is likely to lose (`tvm_lowrank.searching.choose.likely`) is uncertain by a fifth of a point with a
thousand images; their damages, measured on the same images, hardly are. So the search judges a plan by its damage and
by what damages have cost so far: each evaluation makes that rate better known, and plans no longer pass or fail by luck
of their own. The luck of the images is common to all plans, so no number of plans outweighs what is expected at first.
More images do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_lowrank.data.measure import ACCURACY, Cost
from tvm_lowrank.searching.damage import DamageCurve

COUNTS = 4  # networks that the expected spread counts as, against those of another metric or task that spread more
SURPRISE = 2.0  # standard errors beyond which it is not luck that a network loses other points than its damage


# of a damage, what is left when a network is recovered: reconstructed, 0.44 to 0.49 with the bundled example and a
# ResNet-20, at limits of 0.01 and 0.03 nats, once 0.33; refitted, 0.50 to 0.73 with these, 0.70 with a ResNet-50
LEFT = {"refitted": 0.65, "reconstructed": 0.45}


@dataclass(frozen=True)
class Counted:
    """What evaluating a network gave: damage in nats, what it is likely to lose, and the standard error of that."""

    damage: float
    drop: float
    error: float


class Rate:
    """What damages, in nats on the selection images, are likely to cost, of networks fitted in any way.

    ``cost`` is what is expected at first: points, or what else the metric counts in, are the rate x nats ** its power.
    """

    def __init__(self, cost: Cost = ACCURACY) -> None:
        self._cost = cost
        self._known: dict[str, Counted] = {}

    def learn(self, network: str, counted: Counted) -> None:
        """Take an evaluated network into account, once."""
        self._known[network] = counted

    @property
    def value(self) -> float:
        """Points at 1 nat, from what was expected before anything was counted and from all counts together.

        All count the same images and err together, so their errors add up as their points do.
        """
        known, first = self._known.values(), self._cost.rate
        points, nats = sum(own.drop for own in known), sum(self._power(own.damage) for own in known)
        error = sum(own.error for own in known) + self._cost.spread * max(first * nats, points)
        farthest = 100.0**self._cost.unsure
        # a metric of another kind may cost any number of its units
        highest = max(first * farthest, 10 * points / max(nats, 1e-12))
        rates = np.geomspace(first / farthest, highest, 2001)
        unlikely = (np.log(rates / first) / self._cost.unsure) ** 2 + ((points - rates * nats) / max(error, 1e-12)) ** 2
        weights = np.exp((unlikely.min() - unlikely) / 2)
        return float(np.exp(np.average(np.log(rates), weights=weights)))

    def expected(self, counted: Counted) -> float:
        """Points that a network loses: those of its damage, and the better its own were counted, these."""
        rate = self.value
        points = rate * self._power(counted.damage)
        spread = (self._spread(rate) * points) ** 2
        return points + spread / max(spread + counted.error**2, 1e-12) * (counted.drop - points)

    def _spread(self, rate: float) -> float:
        """How much of their points networks of the same damage differ in, by those that luck does not explain."""
        surprises = [
            max(0.0, abs(own.drop - rate * self._power(own.damage)) - SURPRISE * own.error)
            / max(rate * self._power(own.damage), 1e-12)
            for own in self._known.values()
        ]
        known = COUNTS * self._cost.spread**2 + sum(surprise**2 for surprise in surprises)
        return math.sqrt(known / (COUNTS + len(surprises)))

    def points(self, damage: float) -> float:
        """What a damage in nats costs."""
        return self.value * self._power(damage)

    def damage(self, drop: float) -> float:
        """Nats at which so many points are lost."""
        return float((max(drop, 0.0) / self.value) ** (1 / self._cost.power))

    def _power(self, damage: float) -> float:
        return float(max(damage, 0.0) ** self._cost.power)


class Recovery:
    """What part of a damage recovery leaves: from what was expected at first, and from all that was recovered."""

    def __init__(self, left: float) -> None:
        self._expected = left
        self._known: dict[str, float] = {}

    def learn(self, network: str, before: float, after: float) -> None:
        """Take a network's damages, in nats, before and after its recovery into account, once."""
        self._known[network] = math.log(max(after, 1e-9) / max(before, 1e-9))

    @property
    def left(self) -> float:
        """The geometric mean; what was expected at first counts as one network of twice the usual spread."""
        prior = 1 / 4
        return math.exp((prior * math.log(self._expected) + sum(self._known.values())) / (prior + len(self._known)))


def limit_for(damage: float, evaluated: dict[float, float], *, least: float, most: float) -> float:
    """The limit of predicted damage whose plan has this damage in the end, by those of other plans {limit: damage}."""
    curve = DamageCurve.through(evaluated)
    low, high = np.log(least), np.log(most)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(float(np.exp(middle))) < damage else (low, middle)
    return float(np.exp(high))
