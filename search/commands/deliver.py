"""From a plan to a bundle: its libraries, a look at the evaluation split, and what is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import answered
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import write_manifest
from tvm_lowrank.bundle.portable import write_portable
from tvm_lowrank.bundle.report import write_report
from tvm_lowrank.data.images import part
from tvm_lowrank.data.measure import Rows, Unscored
from tvm_lowrank.data.metric import Metric, evaluate
from tvm_lowrank.data.parts import take
from tvm_lowrank.data.splits import Splits, fingerprint
from tvm_lowrank.files import copy, write_text
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.candidates import site_macs, skipped
from tvm_lowrank.searching.choose.forecast import DELIVERY, KERNELS
from tvm_lowrank.searching.choose.loop import milder
from tvm_lowrank.searching.choose.offers import offers
from tvm_lowrank.searching.choose.search import Evaluated, Search
from tvm_lowrank.searching.commands.levels import build_levels
from tvm_lowrank.searching.commands.libraries import ORIGINAL, Delivery, Library, build_dense, build_library, compare
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.searching.measure.device import Device

MOST_KEPT = 2**18  # numbers of a look in the journal


def deliver(search: Search, kept: Sequence[Evaluated], oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Write the bundle of the fastest plan that keeps the budget on the evaluation split; returns its manifest.

    The compiled library is what is evaluated. When a plan fails, the next milder one is looked at; the manifest says
    how many looks there were. When none passes, the bundle is the tuned dense model.
    """
    with console.timed(search.seconds, KERNELS):
        search.times.measure_others(search.dense)
    with console.timed(search.seconds, DELIVERY):
        plan, network, manifest = _libraries(search, kept, oracle, delivery)
    more = {**manifest, "seconds": search.seconds}
    return write_bundle(delivery, search.or_dense(plan), search.dense_network, network, more)


def deliver_plan(
    plan: Plan,
    network: IRModule,
    mod: IRModule,
    times: SiteTimes,
    oracle: LatencyOracle,
    delivery: Delivery,
    *,
    splits: Splits | None,
    metric: Metric,
    reason: Callable[[Site, Choice], str],
    seconds: dict[str, float],
    dense_plan: Plan,
    **more: Any,
) -> dict[str, Any]:
    """Write the bundle of a plan that is not up for discussion; returns its manifest.

    ``network`` is what the dense canonical module ``mod`` becomes under it, or itself if the plan is empty. Without
    data its accuracy is not measured. ``dense_plan`` has the formats of the dense library; ``more`` are further entries
    of the manifest.
    """
    out, sites, chosen = delivery.out, find_sites(mod), plan or dense_plan
    with console.timed(seconds, KERNELS):
        times.measure([(site.id, own.get(site.id, Choice())) for own in (chosen, dense_plan) for site in sites])
        times.measure_others(chosen)
    with console.timed(seconds, DELIVERY):
        dense = build_dense(mod, dense_plan, oracle, delivery)
        if network is mod:
            copy(out / "dense.so", out / "model.so")
            network = dense.mod
        else:
            compressed = build_library(network, oracle, delivery, "model.so")
        measured = None
        if splits is not None:
            judge = partial(judged, splits=splits, metric=metric, device=delivery.device)
            before = after = judge(dense, description="accuracy, dense library")
            if network is not dense.mod:
                after = judge(compressed, description="accuracy, compressed library")
            measured = accuracy_entry(metric, before, after, delivery.device, looks=1)
        latency, speedup = compare(times, plan, dense_plan, delivery)
    described = describe(chosen, sites, times, delivery, splits, reason=reason, dense=dense_plan)
    more = {"budget": None, "accuracy": measured, "latency_ms": latency, "speedup": speedup, "seconds": seconds, **more}
    return write_bundle(delivery, chosen, dense.mod, network, {**described, **more})


def describe(
    plan: Plan,
    sites: Sequence[Site],
    times: SiteTimes,
    delivery: Delivery,
    splits: Splits | None,
    *,
    reason: Callable[[Site, Choice], str],
    dense: Plan,
    offers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """What a plan's manifest says of the model, the data and the sites; their kernels have been measured.

    ``dense`` has the formats of the dense library; ``offers`` of each site are those of
    `tvm_lowrank.searching.choose.offers`.
    """
    choices = [(site, plan.get(site.id, Choice())) for site in sites]
    evaluation = None if splits is None else {"evaluation_sha256": fingerprint(splits)}
    return {
        "model": delivery.model,
        "target": dict(delivery.target),
        "input_shape": list(delivery.input_shape),
        **delivery.several,
        "data": None if evaluation is None else {**(delivery.data or {}), **evaluation},
        "sites": [
            site_entry(
                site,
                choice,
                dense.get(site.id, Choice()),
                times,
                reason=reason(site, choice),
                offers=(offers or {}).get(site.id, ()),
            )
            for site, choice in choices
        ],
    }


def explain(
    search: Search, plan: Plan, delivery: Delivery, why: Callable[[Site, Choice], str] | None = None
) -> dict[str, Any]:
    """`describe` a plan that a search found, with what it considered and tried; ``why`` replaces its `reason`."""
    described = describe(
        search.or_dense(plan),
        search.sites,
        search.times,
        delivery,
        None if search.settings.synthetic else search.splits,
        reason=why or partial(reason, search),
        dense=search.dense,
        offers=offers(search, plan),
    )
    return {**described, "plans": search.tried()}


def write_bundle(
    delivery: Delivery,
    plan: Plan,
    dense: IRModule,
    network: IRModule,
    manifest: Mapping[str, Any],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Write what a bundle has beside its libraries for the first target; returns the completed manifest.

    ``dense`` and ``network`` are the canonical modules that ``dense.so`` and ``model.so`` were built from; ``folder``
    is another one than that of the delivery.
    """
    out = folder or delivery.out
    (out / ORIGINAL).unlink(missing_ok=True)
    write_text(out / "plan.json", plan.to_json())
    write_portable(network, out)
    levels = build_levels(out, dense, network, delivery, manifest["latency_ms"])
    complete = write_manifest(out, {**manifest, **({"levels": levels} if levels else {})})
    write_report(out)
    return complete


def _libraries(
    search: Search, kept: Sequence[Evaluated], oracle: LatencyOracle, delivery: Delivery
) -> tuple[Plan, IRModule, dict[str, Any]]:
    """Build and judge plans until one passes: it, its network, and its manifest without the seconds."""
    out, budget, unit = delivery.out, search.settings.budget, search.metric.unit.name
    dense = build_dense(search.mod, search.dense, oracle, delivery)
    dense_scores = looked(search, dense, delivery, Plan(), description="accuracy, dense library")
    original = float32_scores(search, dense_scores)

    chosen, network, scores = Plan(), dense.mod, dense_scores
    candidate = kept[0] if kept else None
    while candidate is not None:
        console.phase(f"building the plan with {candidate.drop:+.2f} {unit} of drop on the selection split")
        library = build_library(search.network(candidate.plan, candidate.fit), oracle, delivery, "model.so")
        try:
            scores = looked(
                search, library, delivery, candidate.plan, candidate.fit, description="accuracy, compressed library"
            )
            drop, interval = search.metric.drop(original, scores)
        except Unscored as missing:
            found = f"{str(missing).partition(';')[0]} on the evaluation split"
        else:
            if (interval[1] if search.settings.confident else drop) <= budget:
                chosen, network = candidate.plan, library.mod
                break
            found = f"{drop:+.2f} {unit} of drop on the evaluation split ({interval[0]:+.2f} to {interval[1]:+.2f})"
        console.warn(f"{found}; trying a milder plan")
        candidate = milder(search, candidate, kept)

    if not chosen:
        copy(out / "dense.so", out / "model.so")
    measure = partial(compare, search.times, chosen, search.dense, delivery)
    latency, speedup = search.journal.once("end to end", chosen.to_json(), measure)
    if chosen and speedup <= 1:
        console.warn(f"the compressed library is not faster ({speedup:.2f}x); the bundle is the tuned dense model")
        copy(out / "dense.so", out / "model.so")
        chosen, network, speedup, latency["compressed"] = Plan(), dense.mod, 1.0, latency["dense"]
    if not chosen:
        scores = dense_scores
    described = explain(search, chosen, delivery)
    looks = len(search.journal.of_kind("look"))
    entry = accuracy_entry(search.metric, dense_scores, scores, delivery.device, looks=looks, original=original)
    manifest = {**described, "budget": budget, "accuracy": entry, "latency_ms": latency, "speedup": speedup}
    return chosen, network, manifest


def judged(library: Library, splits: Splits, metric: Metric, device: Device, *, description: str) -> Rows:
    """The metric's rows of a library on the evaluation split, (n, …).

    What is too much for an emulated device is computed by PyTorch, with which the library was found to agree.
    """
    images, targets = splits.evaluation
    here = slice(device.limit)
    seen, own = part(images, here), take(targets, here)
    rows = evaluate(library.model, seen, own, metric, description=description, chunk=device.chunk)
    if len(rows) == len(images):
        return rows
    rest = slice(device.limit, None)
    reference, own = partial(answered, TorchBridge(library.mod)), take(targets, rest)
    others = evaluate(reference, part(images, rest), own, metric, description=f"{description}, in PyTorch")
    return np.concatenate([rows, others])


def looked(
    search: Search, library: Library, delivery: Delivery, plan: Plan, fit: str = "", *, description: str
) -> Rows:
    """`judged` once for a plan and its fit, and kept in the journal: a look at the evaluation split, but for dense."""
    judge = partial(judged, library, search.splits, search.metric, delivery.device, description=description)
    kind, key = ("look", f"{plan.to_json()} {fit}") if plan else ("scores", "dense")
    return _once(search, kind, key, judge)


def float32_scores(search: Search, dense_scores: Rows) -> Rows:
    """The metric's rows of the network as it was given, (n, …), if the dense library is in other formats."""
    if not search.dense.formats:
        return dense_scores
    images, targets = search.splits.evaluation

    def judge() -> Rows:
        model = partial(answered, TorchBridge(search.mod))
        return evaluate(model, images, targets, search.metric, description="accuracy, float32, in PyTorch")

    return _once(search, "scores", "float32", judge)


def _once(search: Search, kind: str, key: str, judge: Callable[[], Rows]) -> Rows:
    """Rows that the journal keeps; if they are too many or no numbers it keeps that they were made.

    Then a search that is resumed makes them again, the same ones, which is no other look.
    """
    made: list[Rows] = []

    def make() -> list[Any]:
        made.append(judge())
        return made[0].tolist() if made[0].dtype != object and made[0].size <= MOST_KEPT else []

    kept = search.journal.once(kind, key, make)
    return made[0] if made else (np.array(kept) if kept else judge())


def accuracy_entry(
    metric: Metric,
    dense: Rows,
    compressed: Rows,
    device: Device,
    *,
    looks: int,
    original: Rows | None = None,
) -> dict[str, Any]:
    """The manifest's ``accuracy``, from the rows (n, …) of both libraries.

    ``original`` are those of the network in float32, if the dense library is not.
    """
    drop, interval = metric.drop(dense, compressed)
    more = {}
    if original is not None and original is not dense:
        own, own_interval = metric.drop(original, compressed)
        more["float32"] = {"dense": metric.value(original), "drop": own, "ci95": list(own_interval)}
    return {
        **more,
        "metric": metric.name,
        "unit": metric.unit.name,
        "n": len(dense),
        "dense": metric.value(dense),
        "compressed": metric.value(compressed, dense),
        "drop": drop,
        "ci95": list(interval),
        "looks": looks,
        "on_device": min(len(dense), device.limit or len(dense)),
    }


def site_entry(
    site: Site, choice: Choice, dense: Choice, times: SiteTimes, *, reason: str, offers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One of the manifest's ``sites``."""
    return {
        "id": site.id,
        "method": choice.method,
        "rank": choice.rank,
        "format": choice.format,
        "ms": times.measured(site.id, choice),
        "dense_ms": times.measured(site.id, dense),
        "dense_format": dense.format,
        "macs": site_macs(site, choice),
        "dense_macs": site.macs,
        "reason": reason,
        "offers": list(offers),
    }


def reason(search: Search, site: Site, choice: Choice) -> str:
    """Why a site became what it is, in one sentence."""
    return "; ".join(filter(None, [_reason(search, site, choice), search.allowed.reason(site)]))


def _reason(search: Search, site: Site, choice: Choice) -> str:
    name, damages = site.id, search.damage.get(site.id)
    if damages is None:
        return "left dense: the time limit came before it was examined"
    chains = [c for c in damages if c.rank is not None]
    if not chains:
        why = "first layer or depthwise" if skipped(site) else "no method costs fewer MACs"
        return f"left dense: {why}"
    dense = search.times.estimate(name, search.dense.get(name, Choice()))
    if choice.rank is not None:
        saved = dense - search.times.estimate(name, choice)
        return f"saves {saved:.3f} ms for a predicted {damages[choice]:.4f} nats"
    measured = [(ms, c) for c in chains if (ms := search.times.measured(name, c)) is not None]
    if not measured:
        return "left dense: no chain is worth its damage, by what is predicted"
    ms, best = min(measured, key=lambda pair: pair[0])
    if ms >= dense:
        return f"left dense: no measured chain is faster ({best} takes {ms - dense:+.3f} ms)"
    return f"left dense: {best} would save {dense - ms:.3f} ms and cost a predicted {damages[best]:.4f} nats"
