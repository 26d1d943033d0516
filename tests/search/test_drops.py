"""What damages cost: the rate is learnt, luck of single plans averages out, and the limit of a damage is found."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_lowrank.searching.drops import POWER, RATE, Drops, Rate, limit_for


def test_before_anything_was_counted() -> None:
    rate = Rate()
    assert rate.value == pytest.approx(RATE)
    assert rate.expected(0.01) == pytest.approx(RATE * 0.01**POWER)
    assert rate.expected(0.0) == rate.expected(-1e-9) == 0


@pytest.mark.parametrize("drop", [0.05, 1.0, 7.0])
def test_the_damage_of_a_drop_costs_it(drop: float) -> None:
    rate = Rate(12.0)
    rate.learn(0.1, 3.0)
    assert rate.expected(rate.damage(drop)) == pytest.approx(drop)


def test_expected_drops_are_nearer_to_the_truth_than_counted_ones() -> None:
    rng, damages = np.random.default_rng(0), np.geomspace(0.005, 0.05, 6)
    truth = 55.0 * damages**POWER
    ours, single = [], []
    for _ in range(200):
        rate, counted = Rate(), truth + 0.45 * rng.standard_normal(6)
        for damage, drop in zip(damages, counted, strict=True):
            rate.learn(damage, drop)
        ours.append([rate.expected(damage) for damage in damages] - truth)
        single.append(counted - truth)
    assert np.std(ours, axis=0)[:3].max() < np.std(single) / 2  # of the plans near a budget of one point
    assert np.abs(np.mean(ours, axis=0)).max() < 0.35  # what was expected at first still pulls


def test_many_plans_outweigh_what_was_expected_at_first() -> None:
    rate = Rate()
    for _ in range(50):
        rate.learn(0.05, 90 * 0.05**POWER)
    assert rate.value == pytest.approx(90, rel=0.02)


def test_a_counted_gain_does_not_make_damage_free() -> None:
    rate = Rate()
    rate.learn(0.01, -2.0)
    assert rate.value == pytest.approx(RATE / 3)


def test_limits() -> None:
    known = {0.01: 0.008, 0.04: 0.05}
    assert limit_for(0.008, known, least=1e-6, most=10.0) == pytest.approx(0.01, rel=1e-6)
    assert 0.01 < limit_for(0.02, known, least=1e-6, most=10.0) < 0.04
    assert limit_for(0.004, {0.01: 0.008}, least=1e-6, most=10.0) == pytest.approx(0.005, rel=1e-6)
    assert limit_for(1e-12, known, least=1e-6, most=10.0) == pytest.approx(1e-6)
    assert limit_for(1e6, known, least=1e-6, most=10.0) == pytest.approx(10.0)


def test_fine_tuned_networks_begin_where_the_others_are() -> None:
    drops = Drops()
    drops.of(False).learn(0.05, 90 * 0.05**POWER)
    expected = drops.of(False).value
    assert drops.of(True).value == pytest.approx(expected)
    drops.of(True).learn(0.1, 0.5)
    assert drops.of(True).value < expected == drops.of(False).value
