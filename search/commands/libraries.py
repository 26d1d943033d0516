"""The libraries of a bundle: built, compared with PyTorch, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.library import level
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.lower import build, kernels, lower
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.options import BundleOptions
from tvm_lowrank.plan import Plan
from tvm_lowrank.precision import operand_formats, with_formats
from tvm_lowrank.searching.commands.inputs import Inputs, image_shape
from tvm_lowrank.searching.fit.waiting import give_back
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.searching.measure.device import Device, Model
from tvm_lowrank.targets.profile import Profile
from tvm_lowrank.tensors import Tensors

ROUNDS = 30
ORIGINAL = "float32.so"  # the dense network in float32, while a bundle is made
DENSE_ROUNDS = 10
TOLERANCE = 1e-3  # of the largest output: the compiled library against PyTorch


@dataclass(frozen=True)
class Delivery:
    """What the bundle is made for, besides what the search knows; ``others`` are further targets.

    ``several`` has the shapes of the network's inputs and outputs where there are several, as in the manifest.
    """

    asked: BundleOptions
    out: Path
    model: str
    input_shape: tuple[int, int, int, int]
    target: Mapping[str, Any]
    data: Mapping[str, Any] | None  # source, mean, std
    device: Device
    others: tuple[Profile, ...] = ()
    several: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, device: Device) -> Delivery:
        """The bundle of a command."""
        asked, profile, splits = inputs.asked, device.profile, inputs.splits
        assert isinstance(asked, BundleOptions)
        function = inputs.mod["main"]
        tensors = {"inputs": Tensors.taken(function), "outputs": Tensors.of(function)}
        return cls(
            asked=asked,
            out=asked.folder,
            model=asked.model_name,
            input_shape=(asked.batch, *image_shape(inputs.mod)),
            target={"name": profile.name, **profile.target, "num-cores": asked.threads},
            data=None if splits is None else {"source": splits.name, "mean": asked.mean, "std": asked.std},
            device=device,
            others=inputs.others,
            several={name: list(map(list, own.shapes)) for name, own in tensors.items() if not own.single},
        )


@dataclass(frozen=True, eq=False)
class Library:
    """A compiled module: as a function of images on its device, and the module itself."""

    model: Model
    mod: IRModule


def build_library(mod: IRModule, oracle: LatencyOracle, delivery: Delivery, name: str) -> Library:
    """Compile a canonical module to a file of the bundle; kernels that the oracle does not know are tuned first.

    Raises
    ------
    MeasurementError
        If the device's outputs are not those that PyTorch computes here.
    """
    shape, device, path = delivery.input_shape, delivery.device, delivery.out / name
    target = oracle.profile.tvm_target(oracle.threads)
    lowered = lower(mod, batch=shape[0], target=target)
    compiler, options = device.linker
    oracle.measure(kernels(lowered))
    executable = build(lowered, oracle.database, target, threads=oracle.threads)
    export_library(executable, path, cc=compiler, options=options)
    model = device.model(path, shape)
    x = np.random.default_rng(0).standard_normal((shape[0], *shape[1:])).astype("float32")
    bridge = TorchBridge(mod)
    error = bridge.outputs.error(bridge.outputs.joined(model(x)), predict(bridge, x))
    if not error < tolerance(mod):
        raise MeasurementError(
            f"{name} does not compute on the device what PyTorch does here (relative error {error:.1e}); "
            "tvm_lowrank doctor checks the device; if it is well, report this model"
        )
    give_back()
    return Library(model, mod)


def tolerance(mod: IRModule) -> float:
    """How far a library may be from PyTorch, relative to the largest output.

    Sums are made in another order, and a number may then be rounded to its other neighbour. Where the format itself
    adds up some products, their errors add like a random walk.
    """
    formats = operand_formats(mod["main"]).values()
    return max([TOLERANCE, *(2 * format.roundoff * format.summed**0.5 for format in formats)])


def build_dense(mod: IRModule, plan: Plan, oracle: LatencyOracle, delivery: Delivery) -> Library:
    """The dense library in the formats of a plan, and where these are others, the one in float32 for comparison."""
    if plan.formats:
        build_library(mod, oracle, delivery, ORIGINAL)
    return build_library(with_formats(mod, plan.formats), oracle, delivery, "dense.so")


def dense_latency(mod: IRModule, oracle: LatencyOracle, delivery: Delivery, plan: Plan) -> float:
    """Build the dense library in the formats of a plan and measure it: median ms, end to end."""
    build_library(with_formats(mod, plan.formats), oracle, delivery, "dense.so")
    x = np.random.default_rng(0).standard_normal(delivery.input_shape).astype("float32")
    runs = delivery.device.interleaved({"dense": delivery.out / "dense.so"}, x, rounds=DENSE_ROUNDS)
    return float(np.median(runs["dense"]))


def end_to_end(
    directory: Path, device: Device, *, rounds: int = ROUNDS, shape: Sequence[int]
) -> tuple[dict[str, Any], float]:
    """Latency of a bundle's two libraries, interleaved in one run: (the manifest's ``latency_ms``, speed-up).

    ``shape`` is the libraries' (N, C, H, W).
    """
    console.phase("measuring both libraries end to end, interleaved")
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    libraries = {"dense": directory / "dense.so", "compressed": directory / "model.so"}
    if (directory / ORIGINAL).exists():
        libraries["float32"] = directory / ORIGINAL
    runs = device.interleaved(libraries, x, rounds=rounds)
    latency: dict[str, Any] = {name: summary(ms) for name, ms in runs.items()}
    speedup = latency["dense"]["median"] / latency["compressed"]["median"]
    return {**latency, "threads": device.threads, "batch": shape[0], "how": device.how}, speedup


def compare(times: SiteTimes, plan: Plan, dense: Plan, delivery: Delivery) -> tuple[dict[str, Any], float]:
    """`end_to_end` of both libraries, beside what was predicted for them; the prediction learns from it.

    ``dense`` has the formats of the dense library. Where these are others than float32, the dense network in float32 is
    measured as well.
    """
    predicted = {"dense": times.whole(dense), "compressed": times.whole(plan or dense)}
    latency, speedup = end_to_end(delivery.out, delivery.device, shape=delivery.input_shape)
    for name, own in {"dense": dense, "compressed": plan}.items():
        latency[name]["predicted"] = predicted[name]
        if own or name == "dense":
            times.learn(own, latency[name]["median"])
    return latency, speedup


def measure_again(directory: Path, device: Device, *, rounds: int) -> tuple[dict[str, Any], float]:
    """`end_to_end` of a finished bundle."""
    manifest = read_manifest(directory)
    folder = directory / level(directory, manifest)["folder"]
    return end_to_end(folder, device, rounds=rounds, shape=manifest["input_shape"])


def summary(ms: Sequence[float]) -> dict[str, float]:
    """The manifest's entry of a library's milliseconds."""
    p10, median, p90 = np.percentile(ms, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}
