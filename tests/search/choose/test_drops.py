"""What damages cost: the rate is learnt, luck of single plans averages out, and the limit of a damage is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_lowrank.data.measure import ACCURACY
from tvm_lowrank.searching.choose.drops import Counted, Rate, Recovery, limit_for


def test_before_anything_was_counted() -> None:
    rate = Rate()
    assert rate.value == pytest.approx(ACCURACY.rate)
    assert rate.expected(Counted(0.01, 7.0, math.inf)) == pytest.approx(ACCURACY.rate * 0.01**ACCURACY.power)
    assert rate.expected(Counted(0.0, 0.0, 0.0)) == rate.expected(Counted(-1e-9, 0.4, 0.4)) == 0


@pytest.mark.parametrize("drop", [0.05, 1.0, 7.0])
def test_the_damage_of_a_drop_costs_it(drop: float) -> None:
    rate = Rate()
    rate.learn("a", Counted(0.1, 3.0, 0.4))
    assert rate.expected(Counted(rate.damage(drop), 2.0, math.inf)) == pytest.approx(drop)


@pytest.mark.parametrize(("common", "part"), [(0.0, 0.7), (0.18, 0.9)])
def test_expected_drops_are_nearer_to_the_truth_than_likely_ones(common: float, part: float) -> None:
    """Rates are those of several models; `common` is the luck of the images, the same for all plans."""
    rng, damages = np.random.default_rng(0), np.geomspace(0.005, 0.05, 6)
    ours, single = [], []
    for _ in range(400):
        truth = ACCURACY.rate * math.exp(ACCURACY.unsure * rng.standard_normal()) * damages**ACCURACY.power
        counted = truth + common * rng.standard_normal() + math.sqrt(0.2**2 - common**2) * rng.standard_normal(6)
        rate, plans = Rate(), [Counted(damage, drop, 0.2) for damage, drop in zip(damages, counted, strict=True)]
        for number, plan in enumerate(plans):
            rate.learn(str(number), plan)
        ours.append([rate.expected(plan) for plan in plans] - truth)
        single.append(counted - truth)
    assert np.std(ours, axis=0)[:3].max() < part * np.std(single)  # of the plans near a budget of one point
    assert np.abs(np.mean(ours, axis=0))[:3].max() < 0.15


def test_the_rate_is_the_likeliest_one() -> None:
    """Of one precise and one vague count, and of what is expected at first."""
    rate = Rate()
    rate.learn("a", Counted(0.05, 90 * 0.05**ACCURACY.power, 0.01))
    assert rate.value == pytest.approx(90, rel=0.05)
    vague = Rate()
    vague.learn("a", Counted(0.05, 90 * 0.05**ACCURACY.power, 100.0))
    assert vague.value == pytest.approx(ACCURACY.rate, rel=0.01)


def test_many_counts_of_the_same_images_do_not_make_them_more() -> None:
    one, many = Rate(), Rate()
    for number in range(50):
        own = Counted(0.05, 90 * 0.05**ACCURACY.power, 0.4)
        many.learn(str(number), own)
        one.learn("same", own)
    assert many.value == pytest.approx(one.value)
    assert ACCURACY.rate < one.value < 90


def test_a_counted_gain_does_not_make_damage_free() -> None:
    rate = Rate()
    rate.learn("a", Counted(0.01, -2.0, 0.4))
    assert ACCURACY.rate / 5 < rate.value < ACCURACY.rate


def test_a_network_that_is_met_again_teaches_once() -> None:
    rate = Rate()
    rate.learn("a", Counted(0.05, 5.0, 0.4))
    before = rate.value
    rate.learn("a", Counted(0.05, 5.0, 0.4))
    assert rate.value == before


def test_the_better_a_network_was_counted_the_more_its_count_tells() -> None:
    rate, damage = Rate(), (2.0 / ACCURACY.rate) ** (1 / ACCURACY.power)
    for error, expected in ((1e-9, 3.0), (2.0 * ACCURACY.spread, 2.5), (1e9, 2.0)):
        assert rate.expected(Counted(damage, 3.0, error)) == pytest.approx(expected)


@pytest.mark.parametrize("rate_of_metric", [0.3, 40.0, 12_000.0])
def test_a_metric_of_another_kind_costs_other_units(rate_of_metric: float) -> None:
    """A signal-to-noise ratio in dB, or points of what is counted in thousands of units a nat."""
    rate, damage = Rate(), 1e-3
    drop = rate_of_metric * damage**ACCURACY.power
    rate.learn("a", Counted(damage, drop, 0.05 * drop))
    assert rate.expected(Counted(damage, drop, 0.05 * drop)) == pytest.approx(drop, rel=0.5 if drop < 0.01 else 0.1)


def test_where_damages_do_not_tell_counts_do() -> None:
    """Networks of one damage lose 1 and 3 points, which luck does not explain: then each loses what it was counted."""
    rate = Rate()
    counts = [Counted(0.02, points, 0.1) for points in (1.0, 3.0, 1.2, 2.8)]
    for number, own in enumerate(counts):
        rate.learn(str(number), own)
    for own in counts:
        assert rate.expected(own) == pytest.approx(own.drop, abs=0.2)


def test_limits() -> None:
    known = {0.01: 0.008, 0.04: 0.05}
    assert limit_for(0.008, known, least=1e-6, most=10.0) == pytest.approx(0.01, rel=1e-6)
    assert 0.01 < limit_for(0.02, known, least=1e-6, most=10.0) < 0.04
    assert limit_for(0.004, {0.01: 0.008}, least=1e-6, most=10.0) == pytest.approx(0.005, rel=1e-6)
    assert limit_for(1e-12, known, least=1e-6, most=10.0) == pytest.approx(1e-6)
    assert limit_for(1e6, known, least=1e-6, most=10.0) == pytest.approx(10.0)


def test_recovery_is_learnt_from_each_network_once() -> None:
    recovery = Recovery(0.5)
    assert recovery.left == pytest.approx(0.5)
    for _ in range(2):
        recovery.learn("a", 0.04, 0.01)
    assert recovery.left == pytest.approx(math.exp((math.log(0.5) / 4 + math.log(0.25)) / 1.25))
    for number in range(50):
        recovery.learn(str(number), 0.02, 0.016)
    assert recovery.left == pytest.approx(0.8, rel=0.05)
    recovery.learn("a", 0.0, 0.0)  # nothing was lost
    assert recovery.left > 0
