"""The allocator against brute force."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

import tvm_lowrank.searching.choose.allocate
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.choose.allocate import Option, allocate, efficient

amount = st.floats(0.001, 10)
tables = st.lists(st.lists(st.tuples(amount, amount), min_size=1, max_size=5), min_size=1, max_size=4)


def as_options(table: list[list[tuple[float, float]]]) -> dict[str, list[Option]]:
    return {
        f"conv{i}": [Option(Choice("spatial", rank), *pair) for rank, pair in enumerate(row, 1)]
        for i, row in enumerate(table)
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tables, st.floats(0.01, 1))
def test_is_as_fast_as_the_best_of_all_plans(table: list[list[tuple[float, float]]], fraction: float) -> None:
    options = as_options(table)
    limit = fraction * sum(max(damage for _, damage in row) for row in table)
    assume(not limit < sum(min(damage for _, damage in row) for row in table) <= limit * (1 + 1e-6))  # by rounding
    feasible = [plan for plan in product(*options.values()) if sum(o.damage for o in plan) <= limit]
    if not feasible:
        with pytest.raises(ValueError, match="no plan keeps"):
            allocate(options, limit)
        return
    chosen = allocate(options, limit)
    assert set(chosen) == set(options)
    assert sum(o.damage for o in chosen.values()) <= limit * (1 + 1e-6)
    best = min(sum(o.ms for o in plan) for plan in feasible)
    assert sum(o.ms for o in chosen.values()) <= best * (1 + 1e-6)


damages = st.floats(-9, 2).map(lambda exponent: 10.0**exponent)
wide_tables = st.lists(st.lists(st.tuples(amount, damages), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(wide_tables, st.floats(0.01, 1))
def test_within_a_time_does_as_little_damage_as_the_best_of_all_plans(
    table: list[list[tuple[float, float]]], fraction: float
) -> None:
    """Damages span eleven decades, as they do where low ranks are among the candidates."""
    options = as_options(table)
    limit = fraction * sum(max(ms for ms, _ in row) for row in table)
    assume(not limit < sum(min(ms for ms, _ in row) for row in table) <= limit * (1 + 1e-6))  # by rounding
    feasible = [plan for plan in product(*options.values()) if sum(o.ms for o in plan) <= limit]
    if not feasible:
        with pytest.raises(ValueError, match="no plan keeps"):
            allocate(options, limit, within="ms")
        return
    chosen = allocate(options, limit, within="ms")
    assert set(chosen) == set(options)
    assert sum(o.ms for o in chosen.values()) <= limit * (1 + 1e-6)
    best = min(sum(o.damage for o in plan) for plan in feasible)
    assert sum(o.damage for o in chosen.values()) <= best * (1 + 1e-5)


def test_without_any_allowed_damage_everything_stays_dense() -> None:
    dense = Option(Choice(), 2.0, 0.0)
    options = {"a": [dense, Option(Choice("channel", 8), 1.0, 1e-6)], "b": [dense]}
    assert {site: o.choice for site, o in allocate(options, 0.0).items()} == {"a": Choice(), "b": Choice()}


def test_efficient_drops_what_is_beaten_in_both() -> None:
    good, slow, bad = (Option(Choice("channel", r), ms, d) for r, ms, d in ((1, 1, 3), (2, 2, 1), (3, 2.5, 2)))
    assert efficient([bad, slow, good]) == [good, slow]


def test_no_sites_no_plan() -> None:
    assert allocate({}, 1.0) == {}


def test_the_solver_is_silent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def talkative(*args: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"debugging")  # like HiGHS, into the buffer of the C library
        return milp(*args, **options)

    monkeypatch.setattr(tvm_lowrank.searching.choose.allocate, "milp", talkative)
    print("before")
    allocate(as_options([[(1.0, 2.0), (3.0, 0.5)]]), 1.0)
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
