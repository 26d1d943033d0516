"""`search`: from a model, data, a target and a budget to a bundle."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.ir import IRModule

from tvm_lowrank import console, example
from tvm_lowrank.bundle import FILES, MANIFEST, find_compiler, prepare_out
from tvm_lowrank.data import EXAMPLE, Splits, load_data, overlaps
from tvm_lowrank.decompose import METHODS
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import constants, find_sites
from tvm_lowrank.importer import import_model
from tvm_lowrank.metric import load_metric
from tvm_lowrank.plan import Plan
from tvm_lowrank.search.deliver import Delivery, deliver, deliver_plan, dense_latency, reason
from tvm_lowrank.search.device import Connection, Device, check_connection, open_device
from tvm_lowrank.search.journal import Journal
from tvm_lowrank.search.loop import Search, Settings
from tvm_lowrank.search.oracle import LatencyOracle
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.synthetic import dead_leaves
from tvm_lowrank.targets.profile import Profile, load_profile
from tvm_lowrank.targets.toolchain import cache_folder

JOURNAL = "journal.jsonl"
# closed forms whose chains run at full speed; each method more costs probes and tuning
DEFAULT_METHODS = ("channel", "channel_in", "spatial", "spatial_rows", "svd")
SYNTHETIC_IMAGES = 500
FINAL_SHARE = 0.15  # of a time limit, kept for building, evaluating and measuring the result


@dataclass(frozen=True)
class Request:
    """Everything that `tvm_lowrank search` can be asked; the defaults are those of the command line.

    ``model`` None is the bundled example, and so is ``data`` None; ``budget`` is in points of the metric,
    ``time_limit`` in seconds, ``input_shape`` (N, C, H, W).
    """

    out: Path
    budget: float = 1.0
    model: str | None = None
    data: str | None = None
    input_shape: tuple[int, ...] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    metric: str = "top1"
    target: str = "x86"
    connection: Connection = field(default_factory=Connection)
    methods: Sequence[str] = DEFAULT_METHODS
    trials: int = 12
    threads: int = 1
    batch: int = 1
    seed: int = 0
    time_limit: float | None = None
    cache: Path | None = None
    force: bool = False
    resume: bool = False


def search(request: Request) -> dict[str, Any]:
    """Run a search and write its bundle; returns the manifest.

    Everything that can be wrong with the input is found before the long work starts.

    Raises
    ------
    UserError
        If the input is bad, or the output cannot be written.
    """
    start = time.monotonic()
    check_options(request)
    find_compiler()
    profile = load_profile(request.target)
    check_connection(profile, request.connection)
    metric = load_metric(request.metric)
    out = _open_out(request)
    mod, splits = load_inputs(request)
    for message in overlaps(splits) if splits is not None else []:
        console.warn(message)

    journal = Journal(out / JOURNAL, _header(request, mod, splits, profile.key))
    if journal.dropped:
        console.warn(f"the last line of {journal.path} was torn and is dropped; its measurement is repeated")
    deadline = math.inf if request.time_limit is None else start + request.time_limit * (1 - FINAL_SHARE)
    settings = Settings(
        budget=request.budget,
        methods=tuple(request.methods),
        lanes=profile.lanes,
        synthetic=splits is None,
        deadline=deadline,
        seed=request.seed,
    )
    with opened(request, profile) as (device, oracle):
        console.phase(f"{len(find_sites(mod))} layers; calibrating and predicting damage")
        times = SiteTimes(mod, find_sites(mod), oracle, batch=request.batch)
        delivery = delivery_of(request, mod, device, splits)
        latency = partial(dense_latency, mod, oracle, delivery)
        finder = Search(mod, splits or _synthetic(mod, request.seed), metric, times, journal, settings, latency)
        if splits is None:
            manifest = _without_data(finder, oracle, delivery)
        else:
            manifest = deliver(finder, finder.run(), oracle, delivery)
    journal.close()
    return manifest


def _without_data(finder: Search, oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Find, build and write a plan of a predicted damage."""
    plan, predicted = finder.unseen()
    console.warn(f"without --data the accuracy is not measured; predicted damage: {predicted:.4f} nats an image")

    def delivered(plan: Plan, predicted: float) -> dict[str, Any]:
        return deliver_plan(
            plan,
            {name: finder.single(name, choice) for name, choice in plan.items()},
            finder.mod,
            finder.times,
            oracle,
            delivery,
            splits=None,
            metric=finder.metric,
            reason=lambda site, choice: reason(finder, site, choice),
            seconds=finder.seconds,
            budget=finder.settings.budget,
            predicted_damage=predicted,
        )

    manifest = delivered(plan, predicted)
    if plan and manifest["speedup"] <= 1:
        console.warn(f"the compressed library is not faster ({manifest['speedup']:.2f}x); delivering the dense model")
        return delivered(Plan(), 0.0)
    return manifest


def _synthetic(mod: IRModule, seed: int) -> Splits:
    """Images that stand in for calibration data; there is nothing to measure accuracy on."""
    images = synthetic_images(mod, seed)
    none = images[:0], np.zeros(0, np.int64)
    return Splits(images, none, none, "synthetic images")


def synthetic_images(mod: IRModule, seed: int) -> np.ndarray:
    """Images (n, C, H, W) for a model that came without data."""
    return dead_leaves(_image_shape(mod), SYNTHETIC_IMAGES, seed=seed)


def _image_shape(mod: IRModule) -> tuple[int, int, int]:
    channels, height, width = (int(d) for d in list(mod["main"].params[0].ty.shape)[1:])
    return channels, height, width


@contextmanager
def opened(request: Request, profile: Profile) -> Iterator[tuple[Device, LatencyOracle]]:
    """The device of a request, and an oracle for it."""
    cache, threads = request.cache or cache_folder(), request.threads
    with (
        open_device(profile, request.connection, threads=threads, cache_dir=cache) as device,
        LatencyOracle(
            device.profile, cache_dir=cache, trials=request.trials, threads=threads, bench=device.devices
        ) as oracle,
    ):
        yield device, oracle


def delivery_of(request: Request, mod: IRModule, device: Device, splits: Splits | None) -> Delivery:
    """What a bundle is made for."""
    profile = device.profile
    return Delivery(
        out=request.out,
        model=request.model or EXAMPLE,
        input_shape=(request.batch, *_image_shape(mod)),
        target={"name": profile.name, **profile.target, "num-cores": request.threads},
        data=None if splits is None else {"source": splits.name, "mean": request.mean, "std": request.std},
        device=device,
    )


def load_inputs(request: Request) -> tuple[IRModule, Splits | None]:
    """The canonical module and the checked data of a search; None if the model comes without data."""
    if request.model is None and request.data is not None:
        raise UserError("--data without --model; name the model that the data belongs to")
    mod = load_model(request)
    return mod, None if request.model is not None and request.data is None else load_data_of(request, mod)


def load_model(request: Request) -> IRModule:
    """The canonical module of a request's model."""
    if request.model is not None:
        return import_model(request.model, input_shape=request.input_shape)
    console.phase("no --model: using the bundled example, a VGG-style CIFAR-10 network")
    return import_model(example.model(), input_shape=example.INPUT_SHAPE)


def load_data_of(request: Request, mod: IRModule) -> Splits:
    """The data of a request, checked against its model's input and output shapes."""
    function = mod["main"]
    classes = int(function.ret_ty.shape[-1]) if len(function.ret_ty.shape) == 2 else None
    if request.data is None:
        console.phase("no --data: using the bundled CIFAR-10 images")
    shape = _image_shape(mod)
    return load_data(request.data, input_shape=shape, mean=request.mean, std=request.std, classes=classes)


def check_options(request: Request) -> None:
    """Raise UserError unless the numbers and methods of a request are possible."""
    unknown = [name for name in request.methods if name not in METHODS]
    if unknown or not request.methods:
        raise UserError(f"unknown method {', '.join(unknown) or '(none)'}; known are {', '.join(METHODS)}")
    for name in ("trials", "threads", "batch"):
        if getattr(request, name) < 1:
            raise UserError(f"--{name} {getattr(request, name)} is not possible; give at least 1")
    if request.time_limit is not None and request.time_limit <= 0:
        raise UserError("--time-limit must be positive; e.g. 600, 10m or 2h")


def _open_out(request: Request) -> Path:
    """The output folder, empty but for what --resume continues."""
    out = request.out
    resumed = request.resume and (out / JOURNAL).is_file()
    prepare_out(out, force=request.force or resumed)
    if request.force and not resumed:
        for name in (*FILES, MANIFEST, JOURNAL):
            (out / name).unlink(missing_ok=True)
    return out


def _header(request: Request, mod: IRModule, splits: Splits | None, target: str) -> dict[str, Any]:
    """What must be the same for a journal's results to be this search's."""
    arrays = () if splits is None else (splits.calibration, *splits.selection, *splits.evaluation)
    return {
        "model": _digest(constants(mod["main"]), text=mod.script()),
        "data": _digest(arrays),
        "target": target,
        "tvm": tvm.__version__,
        "metric": request.metric,
        "methods": list(request.methods),
        "budget": request.budget,
        "batch": request.batch,
        "threads": request.threads,
        "trials": request.trials,
        "seed": request.seed,
    }


def _digest(arrays: Sequence[np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
