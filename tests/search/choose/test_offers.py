"""What a report says of the forms that lost: the price of a nat, and the best of each method at that price."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.choose.allocate import Option, allocate
from tvm_lowrank.searching.choose.offers import offers, price_of
from tvm_lowrank.searching.choose.search import Search, plan_of

SITES, METHODS, RANKS = 6, ("channel", "spatial", "cp3"), (8, 16, 24, 32)


def tables(seed: int) -> dict[str, list[Option]]:
    """Forms of some sites: the faster, the more damage, up to chance."""
    draw = np.random.default_rng(seed)
    found = {}
    for site in range(SITES):
        own = [Option(Choice(), 1.0, 0.0)]
        for method in METHODS:
            size = draw.uniform(0.5, 1.5)
            for rank in RANKS:
                damage = draw.uniform(0.5, 1) * 0.02 * size * np.exp(-rank / 10)
                own.append(Option(Choice(method, rank), 0.02 * rank / size, float(damage)))
        found[f"site{site}"] = own
    return found


def fake(options: dict[str, list[Option]]) -> Search:
    """What `offers` asks of a search; only `channel` was measured."""
    damage = {site: {option.choice: option.damage for option in own} for site, own in options.items()}
    times = SimpleNamespace(measured=lambda site, choice: 1.0 if choice.method in ("channel", "dense") else None)
    return cast(Search, SimpleNamespace(options=lambda: options, damage=damage, times=times))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.002, 0.01, 0.05])
def test_at_the_price_the_best_of_each_site_is_nearly_the_allocation(seed: int, limit: float) -> None:
    options = tables(seed)
    price = price_of(options, limit)
    best = [min(own, key=lambda option: option.ms + price * option.damage) for own in options.values()]
    chosen = allocate(options, limit).values()
    assert sum(option.damage for option in best) <= limit
    # the relaxed problem bounds the exact one from below
    bound = sum(option.ms + price * option.damage for option in best) - price * limit
    assert bound <= sum(option.ms for option in chosen) + 1e-9 <= sum(option.ms for option in best) + 2e-9


def test_each_method_makes_one_offer_and_the_chosen_rank_is_shown() -> None:
    options = tables(0)
    plan = plan_of(allocate(options, 0.01))
    found = offers(fake(options), plan)
    assert set(found) == set(options)
    for site, own in found.items():
        assert sorted(offer["method"] for offer in own) == sorted([*METHODS, "dense"])
        assert [offer["cost"] for offer in own] == sorted(offer["cost"] for offer in own)
        chosen = plan.get(site, Choice())
        assert any((offer["method"], offer["rank"]) == (chosen.method, chosen.rank) for offer in own)
        assert {offer["method"]: offer["measured"] for offer in own} == {
            method: method in ("channel", "dense") for method in (*METHODS, "dense")
        }


def test_a_search_that_was_stopped_early_has_none() -> None:
    assert offers(fake({}), Plan()) == {}


def test_a_dense_plan_has_offers_too() -> None:
    own: Any = offers(fake(tables(1)), Plan())["site0"]
    assert len(own) == len(METHODS) + 1
