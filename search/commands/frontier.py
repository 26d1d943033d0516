"""A Pareto set of bundles, from the most accurate to the fastest: `search --frontier`.

    probe damages -> for limits on a grid [allocate -> decompose, recover -> evaluate] -> build, measure, deliver

All libraries are measured in one run, in turns, and the dense one is built once. Which plans are delivered is decided
by their latency and by the selection split; the evaluation split is looked at once for each of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank import console
from tvm_lowrank.bundle.manifest import FILES, MANIFEST
from tvm_lowrank.bundle.report import REPORT
from tvm_lowrank.data.measure import Rows, Unscored
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.files import copy, write_text
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.choose.forecast import DELIVERY, KERNELS
from tvm_lowrank.searching.choose.loop import LEAST_LIMIT, MOST_LIMIT
from tvm_lowrank.searching.choose.search import FIRST_LIMIT, Evaluated, Search
from tvm_lowrank.searching.commands.deliver import accuracy_entry, explain, float32_scores, looked, write_bundle
from tvm_lowrank.searching.commands.libraries import ROUNDS, Delivery, Library, build_library, summary
from tvm_lowrank.searching.latency.oracle import LatencyOracle

FRONTIER = "frontier.json"
SCHEMA = 1
MOST_BUNDLES = 8
STEP = 2.0  # factor between damage limits
REACH = 5.0  # times the budget: plans that are expected to lose more end the grid
GAIN = 0.97  # of the dense sites' time: slower plans end the grid at its other end


@dataclass(frozen=True, eq=False)
class Point:
    """A plan's library, and its latency as an entry of the manifest."""

    evaluated: Evaluated
    library: Library
    file: str
    latency: dict[str, float]

    @property
    def ms(self) -> float:
        """The measured median."""
        return self.latency["median"]


def deliver_frontier(search: Search, oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Write `OUT/1`, `OUT/2`, … (fastest last) and `OUT/frontier.json`; returns what that holds.

    When nothing is faster than the dense network, `OUT/1` is the tuned dense model.
    """
    chosen = explore(search)
    with console.timed(search.seconds, KERNELS):
        search.times.measure_others(search.dense)
    with console.timed(search.seconds, DELIVERY):
        dense, points = _measured(search, chosen, oracle, delivery)
        points, accuracies = _judged(search, dense, points, delivery)
    return _written(search, dense, points, accuracies, delivery)


def explore(search: Search) -> list[Evaluated]:
    """Evaluated plans of which none is beaten in both time and the drop that is expected of it, fastest last.

    At most `MOST_BUNDLES`; when the time limit comes, those of the plans that were evaluated until then.
    """
    found: list[Evaluated] = []
    try:
        search.prepare()
        _climb(search, found)
        _descend(search, found)
        if search.networks.training is not None:
            found = _chosen(search, found)
            for place, e in enumerate(found):
                search.check_time()
                found[place] = search.evaluate(e.placed, "finetuned")
    except TimeUp:
        console.warn("the time limit ends the search early; the plans so far are delivered")
    return _chosen(search, found)


def _chosen(search: Search, found: Sequence[Evaluated]) -> list[Evaluated]:
    near = [e for e in found if e.plan and e.ms < _dense_ms(search) and not _too_far(search, e)]
    front = pareto(near, lambda e: (e.ms, search.expected_drop(e)))
    return thinned(front, lambda e: e.ms, MOST_BUNDLES)


def _climb(search: Search, found: list[Evaluated]) -> None:
    """Evaluate plans from `FIRST_LIMIT` to where nothing changes any more or too much is lost."""
    limit = FIRST_LIMIT
    while limit <= MOST_LIMIT:
        result = _evaluated(search, limit)
        found.append(result)
        if search.is_fastest(result) or _too_far(search, result):
            return
        limit *= STEP


def _too_far(search: Search, result: Evaluated) -> bool:
    return search.expected_drop(result) > REACH * search.settings.budget


def _descend(search: Search, found: list[Evaluated]) -> None:
    """Evaluate plans below `FIRST_LIMIT` until nothing is lost or hardly anything gained."""
    result, limit = found[0], FIRST_LIMIT / STEP
    while result.drop > 0 and result.ms < GAIN * _dense_ms(search) and limit >= LEAST_LIMIT:
        result = _evaluated(search, limit)
        found.append(result)
        limit /= STEP


def _dense_ms(search: Search) -> float:
    """The dense sites' time when it was first asked for: what is measured later corrects predictions."""
    return search.journal.once("dense", "sites", lambda: float(search.dense_ms))


def _evaluated(search: Search, limit: float) -> Evaluated:
    search.check_time()
    result = search.evaluate(search.placed(limit), search.networks.recovery)
    said = f"for {result.unscored}" if result.unscored else f"damage limit {limit:.2g} nats"
    console.tried(search.dense_ms / result.ms, result.drop, said, unit=search.metric.unit.name)
    return result


def pareto(items: Sequence[Any], costs: Callable[[Any], tuple[float, float]]) -> list[Any]:
    """The items that no other one beats or equals in both costs, by the first cost, highest first."""
    kept: list[Any] = []
    for item in sorted(items, key=costs):
        if not kept or costs(item)[1] < costs(kept[-1])[1]:
            kept.append(item)
    return kept[::-1]


def thinned(items: Sequence[Any], size: Callable[[Any], float], most: int) -> list[Any]:
    """At most so many of the items, which are in the order of their sizes, about evenly spaced in its logarithm.

    The first and the last are kept.
    """
    kept = list(items)
    while len(kept) > max(most, 2):
        gaps = [abs(math.log(size(kept[i - 1]) / size(kept[i + 1]))) for i in range(1, len(kept) - 1)]
        del kept[1 + int(np.argmin(gaps))]
    return kept


def _measured(
    search: Search, chosen: Sequence[Evaluated], oracle: LatencyOracle, delivery: Delivery
) -> tuple[Point, list[Point]]:
    """The dense network, and the plans that keep their place once their libraries are measured."""
    networks = {"dense.so": Evaluated(Plan(), 0.0, 0.0, search.dense_ms, 0.0, 0.0, 0.0, 0.0, 0.0, "decomposed")}
    networks.update({f"plan{number}.so": evaluated for number, evaluated in enumerate(chosen, 1)})
    libraries = {}
    for name, evaluated in networks.items():
        console.phase(f"building {name} ({len(chosen)} plans)")
        network = search.network(evaluated.plan, evaluated.fit) if evaluated.plan else search.dense_network
        libraries[name] = build_library(network, oracle, delivery, name)
    latencies = _latencies(search, {name: evaluated.plan for name, evaluated in networks.items()}, delivery)
    dense, *points = (Point(networks[name], libraries[name], name, latencies[name]) for name in networks)
    faster = [point for point in points if point.ms < dense.ms]
    kept = pareto(faster, lambda point: (point.ms, search.expected_drop(point.evaluated)))
    if not kept:
        console.warn("no plan is faster than the tuned dense network; the only bundle is this network")
    return dense, kept or [dense]


def _latencies(search: Search, plans: dict[str, Plan], delivery: Delivery) -> dict[str, dict[str, float]]:
    """Latencies of libraries, measured in turns and once, beside what was predicted for them; ``plans`` by file."""
    predicted = {name: search.times.whole(search.or_dense(plan)) for name, plan in plans.items()}

    def measure() -> dict[str, dict[str, float]]:
        console.phase(f"measuring {len(plans)} libraries end to end, interleaved")
        x = np.random.default_rng(0).standard_normal(delivery.input_shape).astype("float32")
        runs = delivery.device.interleaved({name: delivery.out / name for name in plans}, x, rounds=ROUNDS)
        return {name: {**summary(runs[name]), "predicted": ms} for name, ms in predicted.items()}

    key = json.dumps({name: plan.to_json() for name, plan in plans.items()})
    found = search.journal.once("frontier", key, measure)
    for name, plan in plans.items():
        search.times.learn(search.or_dense(plan), found[name]["median"])
    return found


def _judged(
    search: Search, dense: Point, points: Sequence[Point], delivery: Delivery
) -> tuple[list[Point], list[dict[str, Any]]]:
    """The points with the manifest's ``accuracy`` of each, but for those that have none; each is one look."""

    def look(point: Point, name: str) -> Rows:
        evaluated, description = point.evaluated, f"accuracy, {name}"
        return looked(search, point.library, delivery, evaluated.plan, evaluated.fit, description=description)

    before = look(dense, "dense library")
    original = float32_scores(search, before)
    kept: list[Point] = []
    entries: list[dict[str, Any]] = []

    def entry(after: Rows) -> dict[str, Any]:
        return accuracy_entry(search.metric, before, after, delivery.device, looks=0, original=original)

    for number, point in enumerate(points, 1):
        try:
            entries.append(entry(look(point, f"bundle {number}")))
        except Unscored as missing:
            console.warn(f"{missing}; a plan is left out, on the evaluation split")
        else:
            kept.append(point)
    if not kept:
        kept, entries = [dense], [entry(before)]
    looks = len(search.journal.of_kind("look"))
    return kept, [{**own, "looks": looks} for own in entries]


def _written(
    search: Search, dense: Point, points: Sequence[Point], accuracies: Sequence[dict[str, Any]], delivery: Delivery
) -> dict[str, Any]:
    """Write the bundles and the table of them; the libraries that they are made of go away."""
    device, out = delivery.device, delivery.out
    clear(out)
    how = {"threads": device.threads, "batch": delivery.input_shape[0], "how": device.how}
    bundles = []
    for number, (point, accuracy) in enumerate(zip(points, accuracies, strict=True), 1):
        plan, folder = point.evaluated.plan, out / str(number)
        folder.mkdir(exist_ok=True)
        for name, file in (("dense.so", dense.file), ("model.so", point.file)):
            copy(out / file, folder / name)
        manifest = {
            **explain(search, plan, delivery),
            "budget": None,
            "accuracy": accuracy,
            "latency_ms": {"dense": dense.latency, "compressed": point.latency, **how},
            "speedup": dense.ms / point.ms,
        }
        own = search.or_dense(plan)
        complete = write_bundle(delivery, own, search.dense_network, point.library.mod, manifest, folder)
        bundles.append(_row(str(number), complete, point.evaluated))
    table = {
        "schema": SCHEMA,
        "model": delivery.model,
        "metric": search.metric.name,
        "unit": search.metric.unit.name,
        "images": accuracies[0]["n"],
        "looks": accuracies[0]["looks"],
        "dense": {"ms": dense.ms, "accuracy": accuracies[0]["dense"], "macs": sum(site.macs for site in search.sites)},
        **how,
        "bundles": bundles,
        "seconds": search.seconds,
    }
    write_text(out / FRONTIER, json.dumps(table, indent=2, sort_keys=True) + "\n")
    for path in (out / dense.file, *(out / f"plan{number}.so" for number in range(1, MOST_BUNDLES + 1))):
        path.unlink(missing_ok=True)
    return table


def _row(name: str, manifest: dict[str, Any], evaluated: Evaluated) -> dict[str, Any]:
    """A bundle in `frontier.json`: drops in the metric's unit, MACs of all sites."""
    accuracy = manifest["accuracy"]
    return {
        "bundle": name,
        "ms": manifest["latency_ms"]["compressed"]["median"],
        "speedup": manifest["speedup"],
        "selection_drop": evaluated.drop,
        "drop": accuracy["drop"],
        "ci95": accuracy["ci95"],
        "macs": sum(site["macs"] for site in manifest["sites"]),
    }


def clear(out: Path) -> None:
    """Delete the bundles and the table of an earlier frontier; other files in their folders stay."""
    (out / FRONTIER).unlink(missing_ok=True)
    for number in range(1, MOST_BUNDLES + 1):
        folder = out / str(number)
        for name in (*FILES, MANIFEST, REPORT):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            os.rmdir(folder)
