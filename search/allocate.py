"""Allocation: the fastest plan whose predicted damage stays within a bound, as an exact integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tvm_lowrank.plan import Choice


@dataclass(frozen=True)
class Option:
    """What a site may become: a choice with its time (ms) and its predicted damage (nats)."""

    choice: Choice
    ms: float
    damage: float


def efficient(options: Sequence[Option]) -> list[Option]:
    """The options that no other one beats in both time and damage, fastest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.ms, o.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def allocate(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option]:
    """One option for every site: least total ms with total damage at most `limit`; exact.

    Raises
    ------
    ValueError
        If a site has no options or no combination keeps the limit.
    """
    if not options:
        return {}
    frontiers = {site: efficient(candidates) for site, candidates in options.items()}
    for site, frontier in frontiers.items():
        if not frontier:
            raise ValueError(f"site {site!r} has no options")
    flat = [(site, option) for site, frontier in frontiers.items() for option in frontier]
    one_each = np.array([[float(site == other) for other, _ in flat] for site in frontiers])
    # both rows are scaled to order one: the solver's tolerances are absolute
    times = np.array([option.ms for _, option in flat])
    damages = np.array([option.damage for _, option in flat])
    unit = max(limit, 1e-12)
    solved = milp(
        times / max(times.max(), 1e-12),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(damages[None] / unit, -np.inf, limit / unit)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise ValueError(f"no plan keeps the damage within {limit:g}")
    return {site: option for (site, option), taken in zip(flat, solved.x, strict=True) if taken > 0.5}
