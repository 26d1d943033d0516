"""What damages cost: the rate is learnt, luck of single plans averages out, and the limit of a damage is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_lowrank.searching.drops import POWER, RATE, SPREAD, Counted, Drops, Rate, limit_for


def test_before_anything_was_counted() -> None:
    rate = Rate()
    assert rate.value == pytest.approx(RATE)
    assert rate.expected(Counted(0.01, 7.0, math.inf)) == pytest.approx(RATE * 0.01**POWER)
    assert rate.expected(Counted(0.0, 0.0, 0.0)) == rate.expected(Counted(-1e-9, 0.4, 0.4)) == 0


@pytest.mark.parametrize("drop", [0.05, 1.0, 7.0])
def test_the_damage_of_a_drop_costs_it(drop: float) -> None:
    rate = Rate(12.0)
    rate.learn("a", Counted(0.1, 3.0, 0.4))
    assert rate.expected(Counted(rate.damage(drop), 2.0, math.inf)) == pytest.approx(drop)


def test_expected_drops_are_nearer_to_the_truth_than_counted_ones() -> None:
    rng, damages = np.random.default_rng(0), np.geomspace(0.005, 0.05, 6)
    truth = 55.0 * damages**POWER
    ours, single = [], []
    for _ in range(200):
        rate, counted = Rate(), truth + 0.45 * rng.standard_normal(6)
        plans = [Counted(damage, drop, 0.45) for damage, drop in zip(damages, counted, strict=True)]
        for number, plan in enumerate(plans):
            rate.learn(str(number), plan)
        ours.append([rate.expected(plan) for plan in plans] - truth)
        single.append(counted - truth)
    assert np.std(ours, axis=0)[:3].max() < np.std(single) / 2  # of the plans near a budget of one point
    assert np.abs(np.mean(ours, axis=0)).max() < 0.35  # what was expected at first still pulls


def test_many_plans_outweigh_what_was_expected_at_first() -> None:
    rate = Rate()
    for number in range(50):
        rate.learn(str(number), Counted(0.05, 90 * 0.05**POWER, 0.4))
    assert rate.value == pytest.approx(90, rel=0.02)


def test_a_counted_gain_does_not_make_damage_free() -> None:
    rate = Rate()
    rate.learn("a", Counted(0.01, -2.0, 0.4))
    assert rate.value == pytest.approx(RATE / 3)


def test_a_network_that_is_met_again_teaches_once() -> None:
    rate = Rate()
    rate.learn("a", Counted(0.05, 5.0, 0.4))
    before = rate.value
    rate.learn("a", Counted(0.05, 5.0, 0.4))
    assert rate.value == before


def test_the_better_a_network_was_counted_the_more_its_count_tells() -> None:
    rate, damage = Rate(), (2.0 / RATE) ** (1 / POWER)
    for error, expected in ((1e-9, 3.0), (2.0 * SPREAD, 2.5), (1e9, 2.0)):
        assert rate.expected(Counted(damage, 3.0, error)) == pytest.approx(expected)


def test_limits() -> None:
    known = {0.01: 0.008, 0.04: 0.05}
    assert limit_for(0.008, known, least=1e-6, most=10.0) == pytest.approx(0.01, rel=1e-6)
    assert 0.01 < limit_for(0.02, known, least=1e-6, most=10.0) < 0.04
    assert limit_for(0.004, {0.01: 0.008}, least=1e-6, most=10.0) == pytest.approx(0.005, rel=1e-6)
    assert limit_for(1e-12, known, least=1e-6, most=10.0) == pytest.approx(1e-6)
    assert limit_for(1e6, known, least=1e-6, most=10.0) == pytest.approx(10.0)


def test_fine_tuned_networks_begin_where_the_others_are() -> None:
    drops = Drops()
    drops.of(False).learn("a", Counted(0.05, 90 * 0.05**POWER, 0.4))
    expected = drops.of(False).value
    assert drops.of(True).value == pytest.approx(expected)
    drops.of(True).learn("a", Counted(0.1, 0.5, 0.4))
    assert drops.of(True).value < expected == drops.of(False).value
