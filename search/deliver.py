"""From a plan to a bundle: build both libraries, look at the evaluation split, measure end to end, write it down."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bundle import CompiledModel, evaluate, export_library, read_manifest, write_manifest, write_text
from tvm_lowrank.data import fingerprint
from tvm_lowrank.graph import Site
from tvm_lowrank.lower import build, lower
from tvm_lowrank.metric import Metric, accuracy, paired_drop
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.search.bench import measure_interleaved
from tvm_lowrank.search.candidates import site_macs, skipped
from tvm_lowrank.search.loop import BACK_OFF, Evaluated, Search
from tvm_lowrank.search.oracle import LatencyOracle
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.transform import replace_sites

ROUNDS = 30


@dataclass(frozen=True)
class Delivery:
    """What the bundle is made for, besides what the search knows."""

    out: Path
    model: str
    input_shape: tuple[int, int, int, int]
    target: Mapping[str, Any]
    data: Mapping[str, Any]  # source, mean, std
    threads: int


def deliver(search: Search, kept: Sequence[Evaluated], oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Write the bundle of the fastest plan that keeps the budget on the evaluation split; returns its manifest.

    The compiled library is what is evaluated. When a plan fails, the next milder one is looked at; the manifest says
    how many looks there were. When none passes, the bundle is the tuned dense model.
    """
    with console.timed(search.seconds, "tuning kernels"):
        search.times.measure_others()
    with console.timed(search.seconds, "building, verifying and measuring"):
        manifest = _libraries(search, kept, oracle, delivery)
    return write_manifest(delivery.out, {**manifest, "seconds": search.seconds})


def _libraries(search: Search, kept: Sequence[Evaluated], oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Build and judge plans until one passes; the manifest without what `write_manifest` adds."""
    out, budget = delivery.out, search.settings.budget
    dense = build_library(search.mod, oracle, out / "dense.so", delivery.input_shape)
    images, labels = search.splits.evaluation
    dense_scores = evaluate(dense, images, labels, search.metric, description="accuracy, dense library")

    chosen, scores = Plan(), dense_scores
    candidate = kept[0] if kept else None
    while candidate is not None:
        console.phase(f"building the plan with {candidate.drop:+.2f} points of drop on the selection split")
        changed = replace_sites(search.mod, search.chains(candidate.plan))
        library = build_library(changed, oracle, out / "model.so", delivery.input_shape)
        scores = evaluate(library, images, labels, search.metric, description="accuracy, compressed library")
        drop, _ = paired_drop(dense_scores, scores)
        search.journal.once("look", candidate.plan.to_json(), partial(float, drop))
        if drop <= budget:
            chosen = candidate.plan
            break
        console.warn(f"{drop:+.2f} points of drop on the evaluation split; trying a milder plan")
        failed = candidate
        milder = [other for other in kept if other.damage <= BACK_OFF * failed.damage]
        candidate = milder[0] if milder else search.milder(failed)

    if not chosen:
        shutil.copyfile(out / "dense.so", out / "model.so")
    latency, speedup = end_to_end(out, threads=delivery.threads, shape=delivery.input_shape)
    if chosen and speedup <= 1:
        console.warn(f"the compressed library is not faster ({speedup:.2f}x); the bundle is the tuned dense model")
        shutil.copyfile(out / "dense.so", out / "model.so")
        chosen, speedup, latency["compressed"] = Plan(), 1.0, latency["dense"]
    if not chosen:
        scores = dense_scores
    write_text(out / "plan.json", chosen.to_json())
    return {
        "model": delivery.model,
        "target": dict(delivery.target),
        "budget": budget,
        "input_shape": list(delivery.input_shape),
        "data": {**delivery.data, "evaluation_sha256": fingerprint(search.splits.evaluation)},
        "accuracy": accuracy_entry(search.metric, dense_scores, scores, looks=len(search.journal.of_kind("look"))),
        "latency_ms": latency,
        "speedup": speedup,
        "sites": [
            site_entry(site, choice, search.times, reason=_reason(search, site, choice))
            for site in search.sites
            for choice in [chosen.get(site.id, Choice())]
        ],
    }


def build_library(mod: IRModule, oracle: LatencyOracle, path: Path, shape: tuple[int, ...]) -> CompiledModel:
    """Compile a canonical module for inputs of one shape (N, C, H, W), with the schedules that the oracle knows."""
    target = oracle.profile.tvm_target(oracle.threads)
    lowered = lower(mod, batch=shape[0], target=target)
    export_library(build(lowered, oracle.database, target, threads=oracle.threads), path)
    return CompiledModel(path, (shape[0], shape[1], shape[2], shape[3]))


def end_to_end(
    directory: Path, *, rounds: int = ROUNDS, threads: int | None = None, shape: Sequence[int] | None = None
) -> tuple[dict[str, Any], float]:
    """Latency of a bundle's two libraries, interleaved in one run: (the manifest's ``latency_ms``, speed-up).

    ``threads`` and ``shape`` (N, C, H, W) are the manifest's unless given.
    """
    if threads is None or shape is None:
        manifest = read_manifest(directory)
        threads = threads or int(manifest["latency_ms"]["threads"])
        shape = shape or manifest["input_shape"]
    console.phase("measuring both libraries end to end, interleaved")
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    libraries = {"dense": directory / "dense.so", "compressed": directory / "model.so"}
    runs = measure_interleaved(libraries, x, rounds=rounds, threads=threads)
    latency: dict[str, Any] = {name: _summary(ms) for name, ms in runs.items()}
    speedup = latency["dense"]["median"] / latency["compressed"]["median"]
    return {**latency, "threads": threads, "batch": shape[0], "how": "measured"}, speedup


def _summary(ms: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(ms, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def accuracy_entry(metric: Metric, dense: np.ndarray, compressed: np.ndarray, *, looks: int) -> dict[str, Any]:
    """The manifest's ``accuracy``, from the scores (n,) of both libraries."""
    drop, interval = paired_drop(dense, compressed)
    return {
        "metric": metric.name,
        "n": len(dense),
        "dense": accuracy(dense),
        "compressed": accuracy(compressed),
        "drop": drop,
        "ci95": list(interval),
        "looks": looks,
    }


def site_entry(site: Site, choice: Choice, times: SiteTimes, *, reason: str) -> dict[str, Any]:
    """One of the manifest's ``sites``."""
    return {
        "id": site.id,
        "method": choice.method,
        "rank": choice.rank,
        "ms": times.measured(site.id, choice),
        "dense_ms": times.measured(site.id, Choice()),
        "macs": site_macs(site, choice),
        "dense_macs": site.macs,
        "reason": reason,
    }


def _reason(search: Search, site: Site, choice: Choice) -> str:
    """Why a site became what it is, in one sentence."""
    name, damages = site.id, search.damage.get(site.id)
    if damages is None:
        return "left dense: the time limit came before it was examined"
    if not damages:
        return "left dense: first layer or depthwise" if skipped(site) else "left dense: no method costs fewer MACs"
    dense = search.times.estimate(name, Choice())
    if choice.rank is not None:
        saved = dense - search.times.estimate(name, choice)
        return f"saves {saved:.3f} ms for a predicted {damages[choice]:.4f} nats"
    measured = [(ms, c) for c in damages if (ms := search.times.measured(name, c)) is not None]
    ms, best = min(measured, key=lambda pair: pair[0])
    if ms >= dense:
        return f"left dense: no measured chain is faster ({best} takes {ms - dense:+.3f} ms)"
    return f"left dense: {best} would save {dense - ms:.3f} ms and cost a predicted {damages[best]:.4f} nats"
