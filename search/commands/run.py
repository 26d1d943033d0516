"""`search`: from a model, data, a target and a budget to a bundle."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm
from torch import nn
from tvm.ir import IRModule

from tvm_lowrank import console, example
from tvm_lowrank.bundle.bundle import FILES, MANIFEST, find_compiler, prepare_out, read_manifest
from tvm_lowrank.bundle.report import JOURNAL, REPORT
from tvm_lowrank.data.metric import load_metric
from tvm_lowrank.data.splits import EXAMPLE, Splits, load_data, overlaps
from tvm_lowrank.data.synthetic import dead_leaves
from tvm_lowrank.data.training_data import load_training, name_of
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import constants, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.choose.loop import Search, Settings
from tvm_lowrank.searching.choose.networks import Training, dismiss, follow
from tvm_lowrank.searching.commands.deliver import Delivery, deliver, deliver_plan, dense_latency, reason
from tvm_lowrank.searching.commands.frontier import FRONTIER, clear, deliver_frontier
from tvm_lowrank.searching.commands.within import deliver_within
from tvm_lowrank.searching.fit.torchrun import Workers, joined
from tvm_lowrank.searching.journal import Journal, check_unused
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.searching.measure.device import Connection, Device, check_connection, open_device
from tvm_lowrank.targets.profile import Profile, load_profile
from tvm_lowrank.targets.toolchain import cache_folder

FITTED = "fitted"  # folder of the networks that the search tried; goes away when it ends
# quickly fitted, and their chains run at full speed; each method more costs time
DEFAULT_METHODS = ("channel", "channel_in", "spatial", "spatial_rows", "tucker2", "cp3", "svd")
SYNTHETIC_IMAGES = 500
FINAL_SHARE = 0.15  # of a time limit, kept for building, evaluating and measuring the result


@dataclass(frozen=True)
class Request:
    """Everything that a search can be asked; `tvm_lowrank.search` says what the fields mean, and has the defaults."""

    out: Path
    budget: float = 1.0
    model: str | Path | nn.Module | None = None
    data: str | Path | Mapping[str, Any] | None = None
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
    confident: bool = False
    max_latency: float | None = None
    frontier: bool = False
    finetune: str | Callable[[int], Iterable[Any]] | Iterable[Any] | None = None
    epochs: int = 5
    stages: int = 1
    time_limit: float | None = None
    cache: Path | None = None
    force: bool = False
    resume: bool = False

    @property
    def model_name(self) -> str:
        """What reports call the model."""
        if self.model is None:
            return EXAMPLE
        return type(self.model).__name__ if isinstance(self.model, nn.Module) else str(self.model)


def search(request: Request) -> dict[str, Any]:
    """Run a search and write its bundle; returns the manifest, or for a frontier what `frontier.json` holds.

    Everything that can be wrong with the input is found before the long work starts. Under `torchrun` all workers must
    call this: they share the training, the first one does everything else, and all return the same.

    Raises
    ------
    UserError
        If the input is bad, or the output cannot be written.
    """
    start = time.monotonic()
    check_options(request)
    with joined() as workers:
        if workers.count > 1 and request.finetune is None:
            raise UserError(f"{workers.count} workers, but nothing to share; give --finetune, or start one")
        if workers.rank:
            mod = load_model(request)
            follow(mod, cast(Training, load_training_of(request, mod, workers)))
            found = None
        else:
            found = _search(request, workers, start)
            dismiss(workers)
        return workers.of_first(lambda: cast("dict[str, Any]", found))


def _search(request: Request, workers: Workers, start: float) -> dict[str, Any]:
    """The search of the first worker; ``start`` is when it began, as `time.monotonic` counts."""
    find_compiler()
    profile = load_profile(request.target)
    check_connection(profile, request.connection)
    metric = load_metric(request.metric)
    out = _open_out(request)
    mod, splits = load_inputs(request)
    training = load_training_of(request, mod, workers)
    for message in overlaps(splits) if splits is not None else []:
        console.warn(message)

    journal = Journal(out / JOURNAL, _header(request, mod, splits, profile.key))
    _remove_unfinished(out)
    ended = out / (FRONTIER if request.frontier else MANIFEST)
    finished = "finished" if training is None else f"finished with {training.name}"
    if journal.get("run", finished) and ended.is_file():
        console.phase(f"the search in {out} had ended; nothing is repeated")
        journal.close()
        return json.loads(ended.read_text()) if request.frontier else read_manifest(out)
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
        confident=request.confident,
    )
    with opened(request, profile) as (device, oracle), console.search_view("searching"):
        console.phase(f"{len(find_sites(mod))} layers; calibrating and predicting damage")
        times = SiteTimes(mod, find_sites(mod), oracle, batch=request.batch)
        delivery = delivery_of(request, mod, device, splits)
        latency = partial(dense_latency, mod, oracle, delivery)
        known = splits or _synthetic(mod, request.seed)
        finder = Search(mod, known, metric, times, journal, settings, latency, out / FITTED, training)
        if request.max_latency is not None:
            manifest = deliver_within(finder, oracle, delivery, request.max_latency)
        elif request.frontier:
            manifest = deliver_frontier(finder, oracle, delivery)
        elif splits is None:
            manifest = _without_data(finder, oracle, delivery)
        else:
            manifest = deliver(finder, finder.run(), oracle, delivery)
    if time.monotonic() < deadline:  # else more time may find more
        journal.once("run", finished, lambda: True)
    journal.close()
    shutil.rmtree(out / FITTED, ignore_errors=True)
    return manifest


def _without_data(finder: Search, oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Find, build and write a plan of a predicted damage."""
    plan, predicted = finder.unseen()
    console.warn(f"without --data the accuracy is not measured; predicted damage: {predicted:.4f} nats an image")

    def delivered(plan: Plan, predicted: float) -> dict[str, Any]:
        return deliver_plan(
            plan,
            finder.sensitivity.network(plan),
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
        model=request.model_name,
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
    if request.data is None:
        console.phase("no --data: using the bundled CIFAR-10 images")
    shape = _image_shape(mod)
    return load_data(request.data, input_shape=shape, mean=request.mean, std=request.std, classes=_classes(mod))


def load_training_of(request: Request, mod: IRModule, workers: Workers) -> Training | None:
    """How a request's networks learn with labels, if they do; the first batch is checked."""
    if request.finetune is None:
        return None
    if request.model is not None and request.data is None:
        raise UserError("--finetune without --data; the accuracy that it is to restore is not known")
    shape, mean, std = _image_shape(mod), request.mean, request.std
    if request.data is None:
        mean = std = None  # the example's training data comes normalised
    batches = load_training(request.finetune, input_shape=shape, mean=mean, std=std, classes=_classes(mod))
    name = f"{name_of(request.finetune)}, {request.epochs} epochs" + (
        f", {request.stages} stages" if request.stages > 1 else ""
    )
    return Training(batches, name, request.epochs, request.stages, workers, request.seed)


def _classes(mod: IRModule) -> int | None:
    shape = mod["main"].ret_ty.shape
    return int(shape[-1]) if len(shape) == 2 else None


def check_options(request: Request) -> None:
    """Raise UserError unless the numbers and methods of a request are possible."""
    unknown = [name for name in request.methods if name not in METHODS]
    if unknown or not request.methods:
        raise UserError(f"unknown method {', '.join(unknown) or '(none)'}; known are {', '.join(METHODS)}")
    for name in ("trials", "threads", "batch", "epochs", "stages"):
        if getattr(request, name) < 1:
            raise UserError(f"--{name} {getattr(request, name)} is not possible; give at least 1")
    if request.stages > 1 and request.finetune is None:
        raise UserError("--stages without --finetune; between stages the network is trained with labels")
    if request.time_limit is not None and request.time_limit <= 0:
        raise UserError("--time-limit must be positive; e.g. 600, 10m or 2h")
    if request.max_latency is not None and request.frontier:
        raise UserError("--max-latency and --frontier ask for different things; leave one out")
    if request.confident and (request.max_latency is not None or request.frontier):
        raise UserError("--confident needs a --budget to keep; leave out --confident, or --max-latency and --frontier")
    if request.frontier and request.model is not None and request.data is None:
        raise UserError("--frontier without --data; the accuracy that it weighs against time is not known")


def _open_out(request: Request) -> Path:
    """The output folder, empty but for what --resume continues."""
    out = request.out
    resumed = request.resume and (out / JOURNAL).is_file()
    if request.force:
        check_unused(out / JOURNAL)
    prepare_out(out, force=request.force or resumed)
    if not resumed:
        shutil.rmtree(out / FITTED, ignore_errors=True)
    if request.force and not resumed:
        for name in (*FILES, MANIFEST, REPORT, JOURNAL):
            (out / name).unlink(missing_ok=True)
        clear(out)
    return out


def _remove_unfinished(out: Path) -> None:
    """Remove what a search that was killed was writing; only who has the journal may do that."""
    for name in (*FILES, MANIFEST, REPORT, FRONTIER):
        for path in out.glob(f"**/.{name}-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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
        "budget": None if request.max_latency is not None else request.budget,
        "max_latency_ms": request.max_latency,
        "frontier": request.frontier,
        "batch": request.batch,
        "threads": request.threads,
        "trials": request.trials,
        "seed": request.seed,
        "confident": request.confident,
    }


def _digest(arrays: Sequence[np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
