"""What a damage costs in points: learnt from all plans that were evaluated.

Counted on a thousand images, the drop of one plan is uncertain by about half a point, which is as much as plans of
twice the damage differ by. Their damages, measured on the same images, hardly are. So the search judges a plan by its
damage and by what damages have cost so far: each evaluation makes that rate better known, and plans no longer pass or
fail by luck of their own. With many more images, their own count tells more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_lowrank.searching.damage import DamageCurve

# points = rate * nats ** POWER. Ten networks that the bundled one became, of 0.015 to 0.10 nats, lose 1.05 to 4.85
# points of 10,000 test images: with this power their rates are 28.1 to 30.7
POWER = 0.8
RATE = 30.0
SPREAD = 0.05  # of the points of a damage: standard deviation of what networks of this damage lose
WEIGHT = 0.3  # points: how much counted loss weighs as much as RATE does


@dataclass(frozen=True)
class Counted:
    """What evaluating a network gave: damage in nats, lost points, and their standard error."""

    damage: float
    drop: float
    error: float


class Rate:
    """What damages, in nats on the selection images, have cost in counted points.

    ``rate`` is what is expected before anything was counted, in points at 1 nat.
    """

    def __init__(self, rate: float = RATE) -> None:
        self._first = rate
        self._known: dict[str, Counted] = {}

    def learn(self, network: str, counted: Counted) -> None:
        """Take an evaluated network into account, once."""
        self._known[network] = counted

    @property
    def value(self) -> float:
        """Points at 1 nat. Chance may count a gain: it never falls below a third of what was expected at first."""
        points = WEIGHT + sum(known.drop for known in self._known.values())
        nats = WEIGHT / self._first + sum(known.damage**POWER for known in self._known.values())
        return max(points / nats, self._first / 3)

    def expected(self, counted: Counted) -> float:
        """Points that a network loses: those of its damage, and the better its own were counted, these."""
        points = self.value * max(counted.damage, 0.0) ** POWER
        spread = (SPREAD * points) ** 2
        return points + spread / max(spread + counted.error**2, 1e-12) * (counted.drop - points)

    def damage(self, drop: float) -> float:
        """Nats at which so many points are lost."""
        return float((max(drop, 0.0) / self.value) ** (1 / POWER))


class Drops:
    """The rate of networks that were not fine-tuned, and that of those that were, which begins at the other."""

    def __init__(self) -> None:
        self._rates = {False: Rate()}

    def of(self, finetuned: bool) -> Rate:
        """The rate of one kind, for asking and for teaching."""
        if finetuned not in self._rates:
            self._rates[finetuned] = Rate(self._rates[False].value)
        return self._rates[finetuned]


def limit_for(damage: float, evaluated: dict[float, float], *, least: float, most: float) -> float:
    """The limit of predicted damage whose plan has this damage in the end, by those of other plans {limit: damage}."""
    curve = DamageCurve.through(evaluated)
    low, high = np.log(least), np.log(most)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(float(np.exp(middle))) < damage else (low, middle)
    return float(np.exp(high))
