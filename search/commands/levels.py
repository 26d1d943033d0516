"""A bundle for several targets of one architecture: the libraries of the others, built from the plan of the first."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.lower import build, kernels, lower
from tvm_lowrank.codegen.processor import missing
from tvm_lowrank.files import copy
from tvm_lowrank.searching.commands.libraries import Delivery, build_library, end_to_end
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.tiles import first_schedules
from tvm_lowrank.searching.measure.device import open_device
from tvm_lowrank.targets.profile import Profile
from tvm_lowrank.targets.toolchain import cache_folder


def build_levels(
    folder: Path, dense: IRModule, network: IRModule, delivery: Delivery, latency: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Add the libraries of further targets to a bundle; returns the manifest's ``levels``, none if there are no others.

    What this machine can run is tuned, checked and measured here; of the rest the schedules are those that fill the
    vectors, and nothing was run.

    Parameters
    ----------
    dense, network
        The canonical modules that the bundle's ``dense.so`` and ``model.so`` were built from.
    latency
        The manifest's ``latency_ms`` of these.

    Raises
    ------
    MeasurementError
        If a library does not compute what PyTorch does.
    """
    if not delivery.others:
        return []
    own = delivery.device.profile
    levels = [(own, _entry(own, "", latency))]
    for profile in delivery.others:
        console.phase(f"building the libraries for {profile.name}")
        level = folder / profile.name
        level.mkdir(exist_ok=True)
        absent = missing(profile.needs)
        if absent:
            console.warn(f"{profile.name} is not measured: this processor lacks {', '.join(absent)}")
            _untried(profile, level, dense, network, delivery)
            levels.append((profile, _entry(profile, profile.name, None)))
        else:
            measured = _tried(profile, level, dense, network, delivery)
            levels.append((profile, _entry(profile, profile.name, measured)))
    levels.sort(key=lambda pair: len(pair[0].needs.features), reverse=True)
    return [entry for _, entry in levels]


def _entry(profile: Profile, folder: str, latency: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"target": {"name": profile.name, **profile.target}, "folder": folder, "latency_ms": latency}


def _tried(profile: Profile, level: Path, dense: IRModule, network: IRModule, delivery: Delivery) -> dict[str, Any]:
    """Both libraries of a level, tuned, checked and measured; the manifest's ``latency_ms``."""
    asked, threads = delivery.asked, delivery.asked.threads
    cache = cache_folder(asked.cache)
    same = filecmp.cmp(level.parent / "dense.so", level.parent / "model.so", shallow=False)
    with (
        open_device(profile, asked, threads=threads, cache_dir=cache) as device,
        LatencyOracle(profile, cache_dir=cache, trials=asked.trials, threads=threads, bench=device.devices) as oracle,
    ):
        there = replace(delivery, out=level, device=device)
        build_library(dense, oracle, there, "dense.so")
        if same:
            copy(level / "dense.so", level / "model.so")
        else:
            build_library(network, oracle, there, "model.so")
        return end_to_end(level, device, shape=delivery.input_shape)[0]


def _untried(profile: Profile, level: Path, dense: IRModule, network: IRModule, delivery: Delivery) -> None:
    """Both libraries of a level that this machine cannot run."""
    threads, (compiler, options) = delivery.asked.threads, delivery.device.linker
    target = profile.tvm_target(threads)
    for mod, name in ((dense, "dense.so"), (network, "model.so")):
        lowered = lower(mod, batch=delivery.input_shape[0], target=target)
        database = first_schedules(kernels(lowered), lanes=profile.lanes, registers=profile.registers)
        executable = build(lowered, database, target, threads=threads)
        export_library(executable, level / name, cc=compiler, options=options)
