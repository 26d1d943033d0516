"""`tvm_lowrank decompose`: apply an explicit plan to a model, with or without data, and build it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.bundle import evaluate, find_compiler, prepare_out, write_manifest, write_text
from tvm_lowrank.data import Splits, fingerprint, overlaps
from tvm_lowrank.decompose import METHODS, Chain, decompose
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.metric import load_metric
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.search.deliver import accuracy_entry, build_library, end_to_end, site_entry
from tvm_lowrank.search.oracle import LatencyOracle
from tvm_lowrank.search.refit import dense_outputs, refit
from tvm_lowrank.search.run import Request, cache_folder, load_data_of, load_model
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.transform import replace_sites


def apply_plan(request: Request, plan_path: Path) -> dict[str, Any]:
    """Build the bundle of an explicit plan; returns its manifest.

    With data the chains are fitted to the calibration images and the accuracy of the libraries is measured; without,
    they are the weights-only forms, and the manifest's ``accuracy`` and ``data`` are null.

    Raises
    ------
    UserError
        If the plan names a site that the model does not have or a rank that is not possible there, the other input is
        bad, or the output cannot be written.
    """
    find_compiler()
    profile = load_profile(request.target)
    plan = Plan.read(plan_path)
    out = prepare_out(request.out, force=request.force)
    mod = load_model(request)
    sites = find_sites(mod)
    check_plan(plan, sites, plan_path)
    splits = None if request.data is None and request.model is not None else load_data_of(request, mod)
    metric = load_metric(request.metric)
    for message in overlaps(splits) if splits is not None else []:
        console.warn(message)

    seconds: dict[str, float] = {}
    with console.timed(seconds, "decomposing"):
        chains = _chains(mod, sites, plan, splits, seed=request.seed)
    changed = replace_sites(mod, chains)
    options = {"cache_dir": request.cache or cache_folder(), "trials": request.trials, "threads": request.threads}
    with LatencyOracle(profile, **options) as oracle:  # type: ignore[arg-type]
        times = SiteTimes(mod, sites, oracle, batch=request.batch)
        with console.timed(seconds, "tuning kernels"):
            times.measure([(site.id, plan.get(site.id, Choice())) for site in sites])
            times.measure_others()
        shape = (request.batch, *(int(d) for d in list(mod["main"].params[0].ty.shape)[1:]))
        dense = build_library(mod, oracle, out / "dense.so", shape)
        compressed = build_library(changed, oracle, out / "model.so", shape)
    write_text(out / "plan.json", plan.to_json())
    measured = None
    if splits is not None:
        images, labels = splits.evaluation
        before = evaluate(dense, images, labels, metric, description="accuracy, dense library")
        after = evaluate(compressed, images, labels, metric, description="accuracy, compressed library")
        measured = accuracy_entry(metric, before, after, looks=1)
    latency, speedup = end_to_end(out, threads=request.threads, shape=shape)
    return write_manifest(
        out,
        {
            "model": request.model or "example",
            "target": {"name": profile.name, **profile.target, "num-cores": request.threads},
            "budget": None,
            "input_shape": list(shape),
            "data": None if splits is None else _data(request, splits),
            "accuracy": measured,
            "latency_ms": latency,
            "speedup": speedup,
            "sites": [site_entry(s, plan.get(s.id, Choice()), times, reason="as the plan says") for s in sites],
            "seconds": seconds,
        },
    )


def check_plan(plan: Mapping[str, Choice], sites: list[Site], path: Path) -> None:
    """Raise UserError, naming the entry, unless every choice of a plan is possible."""
    known = {site.id: site for site in sites}
    for name, choice in plan.items():
        if name not in known:
            raise UserError(f"{path}: the model has no site {name!r}; it has {', '.join(known)}")
        if choice.rank is None:
            continue
        if choice.method not in METHODS:
            raise UserError(f"{path}: unknown method {choice.method!r} of {name}; known are {', '.join(METHODS)}")
        try:
            METHODS[choice.method].check(known[name].spec, choice.rank)
            METHODS[choice.method].chain_specs(known[name].spec, choice.rank)
        except ValueError as error:
            raise UserError(f"{path}: site {name!r}: {error}; change the plan") from error


def _chains(mod: IRModule, sites: list[Site], plan: Plan, splits: Splits | None, *, seed: int) -> dict[str, Chain]:
    chosen = [site for site in sites if plan.get(site.id, Choice()).rank is not None]
    if splits is None:
        console.phase("no --data: weights-only decompositions; their accuracy is not measured")
        return {
            site.id: decompose(site.weight, site.spec, method=plan[site.id].method, rank=plan[site.id].rank)  # type: ignore[arg-type]
            for site in console.track(chosen, "decomposing")
        }
    images = splits.calibration
    targets = dense_outputs(TorchBridge(mod), chosen, images, seed=seed)
    with console.progress("decomposing and refitting", len(sites)) as advance:
        return refit(mod, sites, plan, images, targets, seed=seed, advance=advance)


def _data(request: Request, splits: Splits) -> dict[str, Any]:
    stats = {"mean": request.mean, "std": request.std}
    return {"source": splits.name, **stats, "evaluation_sha256": fingerprint(splits.evaluation)}
