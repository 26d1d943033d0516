"""`search`: from a model, data, a target and a budget to a bundle."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from tvm_lowrank.search.deliver import Delivery, deliver
from tvm_lowrank.search.journal import Journal
from tvm_lowrank.search.loop import Search, Settings
from tvm_lowrank.search.oracle import LatencyOracle
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.targets.profile import load_profile

JOURNAL = "journal.jsonl"
# closed forms whose chains run at full speed; each method more costs probes and tuning
DEFAULT_METHODS = ("channel", "channel_in", "spatial", "spatial_rows")
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
    methods: Sequence[str] = DEFAULT_METHODS
    trials: int = 12
    threads: int = 1
    batch: int = 1
    seed: int = 0
    time_limit: float | None = None
    cache: Path | None = None
    force: bool = False
    resume: bool = False


def cache_folder() -> Path:
    """Where measurements are kept: ``TVM_LOWRANK_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("TVM_LOWRANK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "tvm_lowrank"


def search(request: Request) -> dict[str, Any]:
    """Run a search and write its bundle; returns the manifest.

    Everything that can be wrong with the input is found before the long work starts.

    Raises
    ------
    UserError
        If the input is bad, or the output cannot be written.
    """
    start = time.monotonic()
    _check_options(request)
    find_compiler()
    profile = load_profile(request.target)
    metric = load_metric(request.metric)
    out = _open_out(request)
    mod, splits = load_inputs(request)
    for message in overlaps(splits):
        console.warn(message)

    shape = (request.batch, *splits.calibration.shape[1:])
    journal = Journal(out / JOURNAL, _header(request, mod, splits, profile.key))
    if journal.dropped:
        console.warn(f"the last line of {journal.path} was torn and is dropped; its measurement is repeated")
    deadline = math.inf if request.time_limit is None else start + request.time_limit * (1 - FINAL_SHARE)
    settings = Settings(
        budget=request.budget, methods=tuple(request.methods), lanes=profile.lanes, deadline=deadline, seed=request.seed
    )
    cache = request.cache or cache_folder()
    with LatencyOracle(profile, cache_dir=cache, trials=request.trials, threads=request.threads) as oracle:
        console.phase(f"{len(find_sites(mod))} convolutions; calibrating and predicting damage")
        times = SiteTimes(mod, find_sites(mod), oracle, batch=request.batch)
        finder = Search(mod, splits, metric, times, journal, settings)
        kept = finder.run()
        delivery = Delivery(
            out=out,
            model=request.model or EXAMPLE,
            input_shape=shape,
            target={"name": profile.name, **profile.target, "num-cores": request.threads},
            data={"source": splits.name, "mean": request.mean, "std": request.std},
            threads=request.threads,
        )
        manifest = deliver(finder, kept, oracle, delivery)
    journal.close()
    return manifest


def load_inputs(request: Request) -> tuple[IRModule, Splits]:
    """The canonical module and the checked data of a search."""
    if request.model is None and request.data is not None:
        raise UserError("--data without --model; name the model that the data belongs to")
    if request.model is not None and request.data is None:
        raise UserError("--model without --data; give file.py:factory, a .npz or a folder (see --help)")
    mod = load_model(request)
    return mod, load_data_of(request, mod)


def load_model(request: Request) -> IRModule:
    """The canonical module of a request's model."""
    if request.model is not None:
        return import_model(request.model, input_shape=request.input_shape)
    console.phase("no --model: using the bundled example, a VGG-style CIFAR-10 network")
    return import_model(example.model(), input_shape=example.INPUT_SHAPE)


def load_data_of(request: Request, mod: IRModule) -> Splits:
    """The data of a request, checked against its model's input and output shapes."""
    function = mod["main"]
    channels, height, width = (int(d) for d in list(function.params[0].ty.shape)[1:])
    classes = int(function.ret_ty.shape[-1]) if len(function.ret_ty.shape) == 2 else None
    if request.data is None:
        console.phase("no --data: using the bundled CIFAR-10 images")
    return load_data(
        request.data, input_shape=(channels, height, width), mean=request.mean, std=request.std, classes=classes
    )


def _check_options(request: Request) -> None:
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


def _header(request: Request, mod: IRModule, splits: Splits, target: str) -> dict[str, Any]:
    """What must be the same for a journal's results to be this search's."""
    arrays = (splits.calibration, *splits.selection, *splits.evaluation)
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
