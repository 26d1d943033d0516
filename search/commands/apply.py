"""`tvm_lowrank decompose`: apply an explicit plan to a model, with or without data, and build it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import collect_fisher, collect_moments
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.synthetic import shrunk
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS, decompose
from tvm_lowrank.options import BundleOptions
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.commands.deliver import Delivery, deliver_plan
from tvm_lowrank.searching.commands.inputs import Inputs, load, opened, synthetic_images
from tvm_lowrank.searching.fit.reconstruct import affordable, reconstruct_if_better
from tvm_lowrank.searching.fit.refit import refit
from tvm_lowrank.searching.fit.samples import sampled
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.transform import replace_sites


def apply_plan(asked: BundleOptions, given: Mapping[str, Choice] | Path | str, *, seed: int = 0) -> dict[str, Any]:
    """Build the bundle of an explicit plan; returns its manifest.

    With data the chains are fitted to the calibration images and the accuracy of the libraries is measured; without,
    they are decomposed in the norm of synthetic images, and the manifest's ``accuracy`` and ``data`` are null. An
    empty plan builds the dense network.

    Raises
    ------
    UserError
        If the plan names a site that the model does not have or a rank that is not possible there, the other input is
        bad, or the output cannot be written.
    """
    plan = Plan.of(given)
    inputs = load(asked)
    check_plan(plan, inputs.sites, str(given) if isinstance(given, str | Path) else "plan")

    seconds: dict[str, float] = {}
    with console.timed(seconds, "decomposing"):
        network = _network(inputs, plan, seed=seed, folder=asked.folder)
    with opened(inputs) as (device, oracle, times):
        return deliver_plan(
            plan,
            network,
            inputs.mod,
            times,
            oracle,
            Delivery.of(inputs, device),
            splits=inputs.splits,
            metric=inputs.metric,
            reason=lambda site, choice: "as the plan says",
            seconds=seconds,
        )


def check_plan(plan: Mapping[str, Choice], sites: list[Site], name: str) -> None:
    """Raise UserError, naming the entry, unless every choice of a plan is possible."""
    known = {site.id: site for site in sites}
    for id, choice in plan.items():
        if id not in known:
            raise UserError(f"{name}: the model has no site {id!r}; it has {', '.join(known)}")
        if choice.rank is None:
            continue
        if choice.method not in METHODS:
            raise UserError(f"{name}: unknown method {choice.method!r} of {id}; known are {', '.join(METHODS)}")
        try:
            METHODS[choice.method].check(known[id].spec, choice.rank)
            METHODS[choice.method].chain_specs(known[id].spec, choice.rank)
        except ValueError as error:
            raise UserError(f"{name}: site {id!r}: {error}; change the plan") from error


def _network(inputs: Inputs, plan: Plan, *, seed: int, folder: Path) -> IRModule:
    """What a dense module becomes under a plan; ``folder`` is where what is known of its sites may wait."""
    mod, sites, splits = inputs.mod, inputs.sites, inputs.splits
    chosen = [site for site in sites if plan.get(site.id, Choice()).rank is not None]
    if not chosen:
        return mod
    bridge = TorchBridge(mod)
    if splits is None:
        console.phase("no --data: synthetic images give the norm; the accuracy is not measured")
        images = synthetic_images(mod, seed)
        moments = {name: shrunk(found) for name, found in collect_moments(bridge, chosen, images, seed=seed).items()}
        fisher = collect_fisher(bridge, chosen, images, seed=seed)
        chains = {
            site.id: decompose(
                site.weight,
                site.spec,
                method=plan[site.id].method,
                rank=plan[site.id].rank,  # type: ignore[arg-type]
                moments=moments[site.id],
                fisher=fisher[site.id],
            )
            for site in console.track(chosen, "decomposing")
        }
        return replace_sites(mod, chains)
    seen = sampled(splits.calibration, sites)
    targets = dense_outputs(bridge, chosen, seen, seed=seed, folder=folder)
    fisher = collect_fisher(bridge, chosen, seen, seed=seed)
    with console.progress("decomposing and refitting", len(sites)) as advance:
        chains = refit(mod, sites, plan, seen, targets, fisher=fisher, seed=seed, folder=folder, advance=advance)
    network = replace_sites(mod, chains)
    if not affordable(mod, len(splits.calibration)):
        return network
    return reconstruct_if_better(mod, network, splits.calibration, splits.selection[0], seed=seed)
