"""The most accurate network within a latency: `search --max-latency`.

    time dense -> time the fastest plan -> probe damages -> [allocate for a time -> build, measure] -> fit, deliver

A plan's latency does not depend on the values of its weights, so that it is measured before anything is fitted. The
evaluation split is looked at once, when the latency is settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.errors import TimeUp, UserError
from tvm_lowrank.graph import Site
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import placeholders
from tvm_lowrank.searching.choose.forecast import DELIVERY, KERNELS
from tvm_lowrank.searching.choose.search import Search, plan_of
from tvm_lowrank.searching.commands.deliver import (
    accuracy_entry,
    explain,
    float32_scores,
    looked,
    reason,
    write_bundle,
)
from tvm_lowrank.searching.commands.libraries import (
    Delivery,
    Library,
    build_dense,
    build_library,
    compare,
    end_to_end,
)
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.transform import shaped

MOST_ATTEMPTS = 6  # plans that are measured whole; the last one is the fastest
ROUNDS = 10  # of measuring a plan before it is fitted
SLACK = 1e-9  # of a limit, for sums in another order


@dataclass(frozen=True)
class Attempt:
    """A plan with its latency in ms, measured end to end."""

    plan: Plan
    ms: float


@dataclass(frozen=True)
class Task:
    """A search for a network within `limit` ms, and what it is delivered for."""

    search: Search
    oracle: LatencyOracle
    delivery: Delivery
    limit: float


def deliver_within(search: Search, oracle: LatencyOracle, delivery: Delivery, limit: float) -> dict[str, Any]:
    """Write the bundle of the plan of least damage whose measured median is at most `limit` ms; returns its manifest.

    A plan that turns out slower makes the next one aim as much lower. When the dense network is fast enough, it is
    what is delivered.

    Raises
    ------
    UserError
        If the fastest plan is too slow, which is found before anything is fitted, or the time limit comes first.
    """
    task = Task(search, oracle, delivery, limit)
    try:
        return _delivered(task)
    except TimeUp as error:
        raise UserError(
            f"the time limit came before a network within {limit:g} ms was found; go on with --resume and more time"
        ) from error


def _delivered(task: Task) -> dict[str, Any]:
    dense = attempt = _dense(task)
    for number in range(1, MOST_ATTEMPTS + 1):
        if attempt.ms <= task.limit:
            pair, latency, speedup = _built(task, attempt.plan)
            attempt = replace(attempt, ms=latency["compressed"]["median"])
            if attempt.plan and speedup <= 1:
                attempt = replace(dense, ms=latency["dense"]["median"])
                continue
            if attempt.ms <= task.limit:
                return _written(task, attempt.plan, pair, latency, speedup)
        fastest = _fastest(task)
        if attempt.plan == fastest.plan:
            break
        if not task.search.damage:
            task.search.probe()
        what = "the last plan" if attempt.plan else "the dense network"
        console.phase(f"{what} takes {attempt.ms:.3f} ms, the limit is {task.limit:g} ms; looking for a faster one")
        attempt = fastest if number + 1 == MOST_ATTEMPTS else _next(task, attempt, fastest, number)
    raise _too_slow(task, attempt)


def _too_slow(task: Task, fastest: Attempt) -> UserError:
    return UserError(
        f"the fastest network that was found takes {fastest.ms:.4g} ms, more than --max-latency {task.limit:g}ms; "
        "allow more, or give more --methods or --trials"
    )


def _dense(task: Task) -> Attempt:
    ms = task.search.time_dense()
    assert ms is not None
    return Attempt(Plan(), ms)


def _fastest(task: Task) -> Attempt:
    """The fastest plan whatever its damage, measured; raises UserError if it is too slow."""
    search = task.search

    def find() -> str:
        console.phase("looking for the fastest plan, to see whether the latency can be reached")
        harmless = {
            site.id: {
                replace(choice, format=format): 0.0
                for format in search.allowed(site)
                for choice in (Choice(), *search.sensitivity.candidates[site.id])
            }
            for site in search.sites
        }
        return plan_of(search.allocated(0.0, damage=harmless)).to_json()

    fastest = _measured(task, search.journal.once("attempt", "fastest", find))
    if fastest.ms > task.limit:
        raise _too_slow(task, fastest)
    return fastest


def _next(task: Task, above: Attempt, fastest: Attempt, number: int) -> Attempt:
    """The plan of least damage that keeps the limit if its prediction is off by as much as that of the one above."""
    search = task.search

    def find() -> str:
        others = search.times.measure_others(search.or_dense(above.plan))
        goal = (_sites_ms(search, above.plan) + others) * task.limit / above.ms - others
        least = _sites_ms(search, fastest.plan) * (1 + SLACK)
        return plan_of(search.allocated(max(goal, least), within="ms")).to_json()

    return _measured(task, search.journal.once("attempt", str(number), find))


def _sites_ms(search: Search, plan: Plan) -> float:
    """Milliseconds of the sites under a plan, by what is known now: every whole network corrects the predictions."""
    chosen = search.or_dense(plan)
    pairs = [(site.id, chosen.get(site.id, Choice())) for site in search.sites]
    search.times.measure(pairs)  # a resumed search knows them from the cache
    return sum(search.times.estimate(*pair) for pair in pairs)


def _measured(task: Task, text: str) -> Attempt:
    """An attempt with a plan, its library measured beside the dense one, with weights of zero."""
    search, delivery, plan = task.search, task.delivery, Plan.from_json(text)
    search.check_time()

    def measure() -> float:
        with console.timed(search.seconds, DELIVERY):
            build_library(placeholders(shaped(search.mod, plan)), task.oracle, delivery, "model.so")
            latency, _ = end_to_end(delivery.out, delivery.device, rounds=ROUNDS, shape=delivery.input_shape)
        return latency["compressed"]["median"]

    return Attempt(plan, search.journal.once("latency", text, measure))


def _network(search: Search, plan: Plan) -> IRModule:
    """What is delivered for a plan: fitted, or decomposed in the norm of synthetic images."""
    if not plan:
        return search.dense_network
    if search.settings.synthetic:
        return search.sensitivity.network(plan)
    console.phase("fitting the plan")
    return search.network(plan, search.networks.best_fit)


def _built(task: Task, plan: Plan) -> tuple[Sequence[Library], dict[str, Any], float]:
    """Both libraries of a plan, their latency and the speed-up, measured once."""
    search = task.search
    with console.timed(search.seconds, KERNELS):
        chosen = search.or_dense(plan)
        search.times.measure([(site.id, chosen.get(site.id, Choice())) for site in search.sites])
    network = _network(search, plan)
    with console.timed(search.seconds, DELIVERY):
        dense = build_dense(search.mod, search.dense, task.oracle, task.delivery)
        compressed = build_library(network, task.oracle, task.delivery, "model.so")
        measure = partial(compare, search.times, plan, search.dense, task.delivery)
        latency, speedup = search.journal.once("end to end", plan.to_json(), measure)
    return (dense, compressed), latency, speedup


def _written(
    task: Task, plan: Plan, pair: Sequence[Library], latency: dict[str, Any], speedup: float
) -> dict[str, Any]:
    """Look at the evaluation split, and write what a bundle has beside its libraries."""
    search, delivery = task.search, task.delivery
    accuracy, splits = None, None if search.settings.synthetic else search.splits
    if splits is not None:
        with console.timed(search.seconds, DELIVERY):
            before = looked(search, pair[0], delivery, Plan(), description="accuracy, dense library")
            fit, description = search.networks.best_fit, "accuracy, compressed library"
            after = looked(search, pair[1], delivery, plan, fit, description=description)
        looks = len(search.journal.of_kind("look"))
        original = float32_scores(search, before)
        accuracy = accuracy_entry(search.metric, before, after, delivery.device, looks=looks, original=original)

    def why(site: Site, choice: Choice) -> str:
        return reason(search, site, choice) if plan else "left dense: the dense network is within the latency"

    if not plan:
        console.phase(f"the tuned dense network is within {task.limit:g} ms; the bundle is this network")
    manifest = {
        **explain(search, plan, delivery, why),
        "budget": None,
        "max_latency_ms": task.limit,
        "predicted_damage": sum(search.damage[name][choice] for name, choice in plan.items()),
        "accuracy": accuracy,
        "latency_ms": latency,
        "speedup": speedup,
        "seconds": search.seconds,
    }
    return write_bundle(delivery, search.or_dense(plan), pair[0].mod, pair[1].mod, manifest)
