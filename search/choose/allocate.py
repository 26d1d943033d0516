"""Allocation, as an exact integer program: the fastest plan within a damage, or the least damage within a time."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tvm_lowrank.plan import Choice

CLOSE = 0.1  # the dearest option against the least total, below which the solver is asked again without dear ones


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


def allocate(
    options: Mapping[str, Sequence[Option]], limit: float, *, within: Literal["damage", "ms"] = "damage"
) -> dict[str, Option]:
    """One option for every site, exact: least total ms with total damage at most `limit`.

    With ``within="ms"`` the two are swapped: least total damage with total ms at most `limit`.

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
    least = "ms" if within == "damage" else "damage"
    total = np.inf
    while True:
        # an option that costs more than a whole solution is in no better one
        flat = [(site, option) for site, option in flat if getattr(option, least) <= total]
        costs = np.array([getattr(option, least) for _, option in flat])
        taken = _solve(list(frontiers), flat, costs, np.array([getattr(option, within) for _, option in flat]), limit)
        # the solver's tolerances are absolute: with costs far above their least total it would not be exact
        if costs @ taken >= CLOSE * costs.max():
            break
        total = float(costs @ taken)
    return {site: option for (site, option), chosen in zip(flat, taken, strict=True) if chosen}


def _solve(
    sites: Sequence[str], flat: Sequence[tuple[str, Option]], costs: np.ndarray, used: np.ndarray, limit: float
) -> np.ndarray:
    """Which of the (site, option) to take, bool (n,): one for each site, least total cost, total use in the limit."""
    one_each = np.array([[float(site == other) for other, _ in flat] for site in sites])
    # both rows are scaled to order one, for the tolerances
    unit = max(limit, 1e-12)
    with _silent():
        solved = milp(
            costs / max(costs.max(), 1e-12),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(used[None] / unit, -np.inf, limit / unit)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if solved.x is None:
        raise ValueError(f"no plan keeps the limit of {limit:g}")
    return solved.x > 0.5


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines of debugging that HiGHS writes to the standard output, whatever its options (scipy 1.17)."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # they may still be in the C library's buffer
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
