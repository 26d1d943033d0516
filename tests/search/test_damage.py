"""Damage curves pass through their probes, rise with the error, and stay sane outside the probes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.damage import PROBED_SHARES, SOLVED, DamageCurve, divergence, interpolated, probes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.floats(1e-4, 1e3), st.floats(0, 5), min_size=1, max_size=5), st.lists(st.floats(1e-6, 1e5)))
def test_monotone_and_bounded_by_the_probes(probes: dict[float, float], at: list[float]) -> None:
    curve = DamageCurve.through(probes)
    errors = sorted([*at, *probes])
    damages = [curve(error) for error in errors]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(damages))
    assert curve(0.0) == 0.0
    assert curve(max(probes)) == pytest.approx(
        max(*probes.values(), 1e-9) if len(probes) > 1 else max(*probes.values(), 1e-9, 0)
    )


def test_interpolates_powers_exactly() -> None:
    curve = DamageCurve.through({e: 3 * e**1.3 for e in (0.01, 0.1, 1.0)})
    for error in (0.001, 0.03, 0.5, 7.0):
        assert curve(error) == pytest.approx(3 * error**1.3)


def test_sites_without_probes_are_corrected_as_others_were() -> None:
    curve = DamageCurve.mean([{0.1: 0.2, 0.01: 0.08}, {0.5: 0.25}])
    assert [curve(value) for value in (0.001, 0.3)] == pytest.approx([0.002, 0.6])  # 2, 8 and 1/2 times: 2 on average
    assert DamageCurve.mean([])(0.3) == pytest.approx(0.3)


def test_divergence_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 10))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    assert divergence(Answers(), a, b) == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)))
    assert divergence(Answers(), a, a + 3) == pytest.approx(0, abs=1e-12)


def test_probes_span_the_likely_damages_with_all_methods() -> None:
    predicted = {Choice(method, r): 1e-2 / r**2 for method in ("spatial", "channel", "svd") for r in range(1, 60)}
    chosen = probes(predicted, share=1e-3)
    assert len(chosen) == len(PROBED_SHARES) and {c.method for c in chosen} == {"spatial", "channel", "svd"}
    for choice, goal in zip(chosen, PROBED_SHARES, strict=True):
        assert goal * 1e-3 / 2 < predicted[choice] < goal * 1e-3 * 2
    assert probes({}, share=1e-3) == []
    assert probes({Choice("svd", 4): 0.0}, share=1e-3) == [Choice("svd", 4)]


def test_errors_of_few_solves_tell_the_others() -> None:
    costs = {Choice("cp3", rank): 100.0 * rank for rank in (16, 24, 32, 48, 64, 96, 128, 192, 256)}
    solved = []

    def error(choice: Choice) -> float:
        solved.append(choice)
        assert isinstance(choice.rank, int)
        return 3e4 * float(np.exp(-0.4 * choice.rank**0.5))

    found = interpolated(costs, error)
    assert len(solved) <= SOLVED < len(costs)
    assert max(choice.rank for choice in solved) == 192  # the solve of the largest rank would take longest
    assert found == {choice: pytest.approx(3e4 * np.exp(-0.4 * choice.rank**0.5)) for choice in costs}
    assert interpolated({Choice("cp3", 8): 5.0}, lambda choice: 2.0) == {Choice("cp3", 8): pytest.approx(2.0)}


def test_interpolated_errors_never_rise_with_the_rank() -> None:
    costs = {Choice("cp3", rank): float(rank) for rank in range(1, 20)}
    noisy = dict(zip(costs, np.random.default_rng(0).random(len(costs)), strict=True))
    errors = list(interpolated(costs, noisy.__getitem__).values())
    assert all(b <= a for a, b in itertools.pairwise(errors))
