"""What each method had to offer at every site, so that a report can say what lost, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.choose.allocate import Option
from tvm_lowrank.searching.choose.search import FIRST_LIMIT, Search

PRICES = np.geomspace(1e-3, 1e7, 201)  # ms for a nat


def offers(search: Search, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The best form that each method offers at each site, the cheapest first: the manifest's ``offers``.

    An offer is ``{method, rank, format, ms, nats, measured, cost}``, where the cost is ``ms`` plus the price of its
    predicted damage ``nats``. The price is what a nat is worth, in ms, in a plan of this damage. Where the plan chose a
    method, that offer is the chosen rank. ``measured`` is False for predicted milliseconds, which are optimistic.
    """
    options = search.options()
    limit = sum(search.damage[site][choice] for site, choice in plan.items()) or FIRST_LIMIT
    price = price_of(options, limit)
    return {site: _of_site(search, site, own, plan.get(site, Choice()), price) for site, own in options.items()}


def price_of(options: Mapping[str, Sequence[Option]], limit: float) -> float:
    """Milliseconds that a nat costs where the total damage is about `limit`: the multiplier of the allocation."""
    if not options:
        return 0.0
    tables = [np.array([(option.ms, option.damage) for option in own]) for own in options.values()]

    def damage(price: float) -> float:
        return sum(float(own[np.argmin(own @ (1, price)), 1]) for own in tables)

    return float(next((price for price in PRICES if damage(price) <= limit), PRICES[-1]))


def _of_site(
    search: Search, site: str, options: Sequence[Option], chosen: Choice, price: float
) -> list[dict[str, Any]]:
    best: dict[str, Option] = {}
    for option in sorted(options, key=lambda o: o.ms + price * o.damage):
        if option.choice == chosen:
            best[chosen.method] = option
        else:
            best.setdefault(option.choice.method, option)
    found = [
        {
            "method": option.choice.method,
            "rank": option.choice.rank,
            "format": option.choice.format,
            "ms": option.ms,
            "nats": option.damage,
            "measured": search.times.measured(site, option.choice) is not None,
            "cost": option.ms + price * option.damage,
        }
        for option in best.values()
    ]
    return sorted(found, key=lambda offer: offer["cost"])
