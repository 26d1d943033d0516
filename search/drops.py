"""What a damage costs in points: learnt from all plans that were evaluated.

Counted on a thousand images, the drop of one plan is uncertain by about half a point, which is as much as plans of
twice the damage differ by. Their damages, measured on the same images, hardly are. So the search judges a plan by its
damage and by what damages have cost so far: each evaluation makes that rate better known, and plans no longer pass or
fail by luck of their own.
"""

from __future__ import annotations

import numpy as np

from tvm_lowrank.searching.damage import DamageCurve

# points = rate * nats ** POWER. Ten networks that the bundled one became, of 0.015 to 0.10 nats, lose 1.05 to 4.85
# points of 10,000 test images: with this power their rates are 28.1 to 30.7
POWER = 0.8
RATE = 30.0
WEIGHT = 0.3  # points: how much counted loss weighs as much as RATE does


class Rate:
    """What damages, in nats on the selection images, have cost in counted points.

    ``rate`` is what is expected before anything was counted, in points at 1 nat.
    """

    def __init__(self, rate: float = RATE) -> None:
        self._first = rate
        self._points = WEIGHT
        self._nats = WEIGHT / rate

    def learn(self, damage: float, drop: float) -> None:
        """Take an evaluated plan into account."""
        self._points += drop
        self._nats += damage**POWER

    @property
    def value(self) -> float:
        """Points at 1 nat. Chance may count a gain: it never falls below a third of what was expected at first."""
        return max(self._points / self._nats, self._first / 3)

    def expected(self, damage: float) -> float:
        """Points that a network of this damage, in nats, loses."""
        return self.value * max(damage, 0.0) ** POWER

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
