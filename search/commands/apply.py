"""`tvm_lowrank decompose`: apply an explicit plan to a model, with or without data, and build it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.ranges import largest_operands
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS
from tvm_lowrank.options import BundleOptions
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import grids_of, with_formats
from tvm_lowrank.searching.choose.allowed import Allowed
from tvm_lowrank.searching.choose.networks import Networks
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.commands.deliver import deliver_plan
from tvm_lowrank.searching.commands.inputs import Inputs, load, opened, precisions, synthetic_images
from tvm_lowrank.searching.commands.libraries import Delivery


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
    for format in set(plan.formats.values()):
        precisions(format, inputs.profile, *inputs.others)

    seconds: dict[str, float] = {}
    with console.timed(seconds, "decomposing"):
        network = _network(inputs, plan, seed=seed, folder=asked.folder)
    with opened(inputs) as (device, oracle, times):
        formats = sorted(set(plan.formats.values())) or ([FLOAT32] if plan else inputs.formats)
        allowed = Allowed(formats, _largest(inputs, formats, seed), grids_of(inputs.mod["main"]))
        dense = times.fastest_dense(allowed)
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
            dense_plan=dense,
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


def _largest(inputs: Inputs, formats: Sequence[str], seed: int) -> dict[str, float]:
    """The largest operand of each site, where there is a format that may be too short for it."""
    if not any(FORMATS[format].short for format in formats):
        return {}
    images = synthetic_images(inputs.mod, seed) if inputs.splits is None else inputs.splits.calibration
    with console.progress("largest activations", len(images)) as advance:
        return largest_operands(TorchBridge(inputs.mod), inputs.sites, images, advance=advance)


def _network(inputs: Inputs, plan: Plan, *, seed: int, folder: Path) -> IRModule:
    """What a search would deliver for a plan; ``folder`` is where what is known of its sites may wait."""
    mod, splits = inputs.mod, inputs.splits
    chosen = plan.decomposed
    if not chosen:
        return with_formats(mod, plan.formats)
    if splits is None:
        console.phase("no --data: synthetic images give the norm; the accuracy is not measured")
    images = synthetic_images(mod, seed) if splits is None else splits.calibration
    known = Sensitivity(mod, images, examined=chosen, synthetic=splits is None, seed=seed, folder=folder)
    if splits is None:
        return known.network(plan)
    networks = Networks(known, splits.selection[0])
    return networks(plan, networks.recovery)
