"""`search`: from a model, data, a target and a budget to a bundle."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm

from tvm_lowrank import console
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import FILES, LIBRARIES, MANIFEST, read_manifest
from tvm_lowrank.bundle.report import REPORT
from tvm_lowrank.data.splits import Splits
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import constants
from tvm_lowrank.options import SearchOptions
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.choose import loop
from tvm_lowrank.searching.choose.forecast import delivery, seconds_of_an_image
from tvm_lowrank.searching.choose.networks import dismiss, follow
from tvm_lowrank.searching.choose.search import Search, Settings
from tvm_lowrank.searching.commands.deliver import deliver, deliver_plan, reason
from tvm_lowrank.searching.commands.frontier import FRONTIER, clear, deliver_frontier
from tvm_lowrank.searching.commands.inputs import (
    Inputs,
    load,
    load_model,
    load_training_of,
    opened,
    resumes,
    synthetic_images,
)
from tvm_lowrank.searching.commands.libraries import Delivery, dense_latency
from tvm_lowrank.searching.commands.within import deliver_within
from tvm_lowrank.searching.fit.torchrun import joined
from tvm_lowrank.searching.fit.waiting import PREFIX
from tvm_lowrank.searching.journal import JOURNAL, Journal, check_unused
from tvm_lowrank.searching.latency.oracle import LatencyOracle

FITTED = "fitted"  # folder of the networks that the search tried; goes away when it ends
FINAL_SHARE = 0.15  # of a time limit, at least, kept for building, evaluating and measuring the result


def search(asked: SearchOptions) -> dict[str, Any]:
    """Run a search and write its bundle; returns the manifest, or for a frontier what `frontier.json` holds.

    Under `torchrun` all workers must call this: they share the training, the first one does everything else, and all
    return the same.

    Raises
    ------
    UserError
        If the input is bad, which is found before the long work starts, or the output cannot be written.
    """
    start = time.monotonic()
    with joined() as workers:
        if workers.count > 1 and asked.finetune is None:
            raise UserError(f"{workers.count} workers, but nothing to share; give --finetune, or start one")
        found = None
        if workers.rank:
            mod = load_model(asked)
            follow(mod, load_training_of(asked, mod, workers))
        else:
            found = _search(asked, load(asked, workers), start)
            dismiss(workers)
        return workers.of_first(lambda: cast("dict[str, Any]", found))


def _search(asked: SearchOptions, inputs: Inputs, start: float) -> dict[str, Any]:
    """The search of the first worker; ``start`` is when it began, as `time.monotonic` counts."""
    _make_room(asked)
    with closing(Journal(asked.folder / JOURNAL, _header(asked, inputs))) as journal:
        _remove_unfinished(asked.folder)
        result = _searched(asked, inputs, journal, start)
    shutil.rmtree(asked.folder / FITTED, ignore_errors=True)
    return result


def _searched(asked: SearchOptions, inputs: Inputs, journal: Journal, start: float) -> dict[str, Any]:
    ended = asked.folder / (FRONTIER if asked.frontier else MANIFEST)
    finished = "finished" if inputs.training is None else f"finished with {inputs.training.name}"
    if journal.get("run", finished) and ended.is_file():
        console.phase(f"the search in {asked.folder} had ended; nothing is repeated")
        return json.loads(ended.read_text()) if asked.frontier else read_manifest(asked.folder)
    if journal.dropped:
        console.warn(f"the last line of {journal.path} was torn and is dropped; its measurement is repeated")
    deadline = _deadline(asked, inputs, start)
    with opened(inputs) as (device, oracle, times), console.search_view("searching"):
        console.phase(f"{len(inputs.sites)} layers; calibrating and predicting damage")
        delivery = Delivery.of(inputs, device)
        finder = Search(
            inputs.mod,
            inputs.splits or _synthetic(inputs, asked.seed),
            inputs.metric,
            times,
            journal,
            _settings(asked, inputs, deadline),
            partial(dense_latency, inputs.mod, oracle, delivery),
            asked.folder / FITTED,
            inputs.training,
            asked.folder,
        )
        manifest = _delivered(asked, inputs, finder, oracle, delivery)
    if time.monotonic() < deadline:  # else more time may find more
        journal.once("run", finished, lambda: True)
    return manifest


def _deadline(asked: SearchOptions, inputs: Inputs, start: float) -> float:
    """When the search must end with what it has, so that the result is there at the end of the time limit."""
    if asked.time_limit is None:
        return math.inf
    kept = FINAL_SHARE * asked.time_limit * (1 + len(inputs.others))
    if inputs.splits is not None:
        splits = inputs.splits
        image = seconds_of_an_image(TorchBridge(inputs.mod), splits.calibration)
        # a late plan is evaluated once more
        kept = max(kept, delivery(image, len(splits.evaluation[1])) + image * len(splits.selection[1]))
    return start + asked.time_limit - min(kept, asked.time_limit / 2)


def _settings(asked: SearchOptions, inputs: Inputs, deadline: float) -> Settings:
    return Settings(
        budget=asked.allowed(inputs.metric.unit.name, inputs.metric.name),
        methods=tuple(asked.methods),
        lanes=inputs.profile.lanes,
        synthetic=inputs.splits is None,
        deadline=deadline,
        seed=asked.seed,
        confident=asked.confident,
        formats=inputs.formats,
    )


def _delivered(
    asked: SearchOptions, inputs: Inputs, finder: Search, oracle: LatencyOracle, delivery: Delivery
) -> dict[str, Any]:
    """Find what was asked for and write it."""
    if asked.max_latency is not None:
        return deliver_within(finder, oracle, delivery, asked.max_latency)
    if asked.frontier:
        return deliver_frontier(finder, oracle, delivery)
    if inputs.splits is None:
        return _without_data(finder, oracle, delivery)
    return deliver(finder, loop.run(finder), oracle, delivery)


def _without_data(finder: Search, oracle: LatencyOracle, delivery: Delivery) -> dict[str, Any]:
    """Find, build and write a plan of a predicted damage."""
    plan, predicted = loop.unseen(finder)
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
            dense_plan=finder.dense,
            budget=finder.settings.budget,
            predicted_damage=predicted,
        )

    manifest = delivered(plan, predicted)
    if plan and manifest["speedup"] <= 1:
        console.warn(f"the compressed library is not faster ({manifest['speedup']:.2f}x); delivering the dense model")
        return delivered(Plan(), 0.0)
    return manifest


def _synthetic(inputs: Inputs, seed: int) -> Splits:
    """Images that stand in for calibration data; there is nothing to measure accuracy on."""
    images = synthetic_images(inputs.mod, seed)
    none = images[:0], np.zeros(0, np.int64)
    return Splits(images, none, none, "synthetic images")


def _make_room(asked: SearchOptions) -> None:
    """Remove what an earlier search left in the output folder, but for what --resume continues."""
    out = asked.folder
    if asked.force:
        check_unused(out / JOURNAL)
    if resumes(asked):
        return
    shutil.rmtree(out / FITTED, ignore_errors=True)
    if asked.force:
        for name in (*FILES, MANIFEST, REPORT, JOURNAL):
            (out / name).unlink(missing_ok=True)
        for target in asked.target.split(","):
            for name in LIBRARIES:
                (out / Path(target.strip()).stem / name).unlink(missing_ok=True)
        clear(out)


def _remove_unfinished(out: Path) -> None:
    """Remove what a search that was killed was writing; only who has the journal may do that."""
    for name in (*FILES, MANIFEST, REPORT, FRONTIER):
        for path in out.glob(f"**/.{name}-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in out.glob(f"{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _header(asked: SearchOptions, inputs: Inputs) -> dict[str, Any]:
    """What must be the same for a journal's results to be this search's."""
    digests = {} if inputs.splits is None else inputs.splits.digests
    return {
        "model": _digest(constants(inputs.mod["main"]), text=inputs.mod.script()),
        "data": _digest((), text=" ".join(digest.sha256 for digest in digests.values())),
        "target": " ".join(profile.key for profile in (inputs.profile, *inputs.others)),
        "tvm": tvm.__version__,
        "metric": asked.metric,
        "methods": list(asked.methods),
        "budget": None if asked.max_latency is not None else asked.allowed(inputs.metric.unit.name, inputs.metric.name),
        "max_latency_ms": asked.max_latency,
        "frontier": asked.frontier,
        "batch": asked.batch,
        "threads": asked.threads,
        "trials": asked.trials,
        "seed": asked.seed,
        "confident": asked.confident,
        "formats": list(inputs.formats),
    }


def _digest(arrays: Sequence[np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
