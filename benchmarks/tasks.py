"""Classification, detection and pose at one loss: MACs saved and the speed-up, without data, with images, and by DAC.

    python benchmarks/tasks.py [--tasks detection,pose] [--loss 2] [--out tasks]

The tasks are the bundled classifier and the trained detector and key-point network of examples/tasks. *DAC* is the
method as it was published (Li et al. 2019): depthwise and pointwise filters from the weights alone, in every layer with
a kernel, each with the fewest filters whose relative error is at most a common threshold. *Without data* is a search
that has none, with budgets of 1, 2, 4 ... points. Of both the strongest network is taken that loses no more than asked
on the selection split; *with images* is a search with that split. What is printed is counted on the evaluation split,
by the compiled libraries, and timed in one run with the dense one. The cache is that of searches.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "examples" / "tasks"
sys.path.insert(0, str(TASKS))

import tvm_lowrank  # noqa: E402
from tvm_lowrank import example  # noqa: E402
from tvm_lowrank.bridge.calibrate import answered  # noqa: E402
from tvm_lowrank.bridge.torch_bridge import TorchBridge  # noqa: E402
from tvm_lowrank.bundle.library import CompiledModel  # noqa: E402
from tvm_lowrank.bundle.portable import write_portable  # noqa: E402
from tvm_lowrank.console import table  # noqa: E402
from tvm_lowrank.data.metric import evaluate, load_metric  # noqa: E402
from tvm_lowrank.data.splits import load_data  # noqa: E402
from tvm_lowrank.graph import Site, find_sites  # noqa: E402
from tvm_lowrank.importers.importer import import_model  # noqa: E402
from tvm_lowrank.methods import METHODS, Chain, chain_macs, compose, cut, factorise  # noqa: E402
from tvm_lowrank.searching.measure.local import measure_interleaved  # noqa: E402
from tvm_lowrank.transform import replace_sites  # noqa: E402

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)  # points that a search without data is asked for
THRESHOLDS = np.geomspace(0.001, 0.5, 24)  # squared relative errors of weights
LANES = 4
ROUNDS = 30
MODEL = "tvm_lowrank.example:model"
Judge = Callable[[Any], float]


@dataclass(frozen=True)
class Task:
    """A network with its data (None is the bundled one) and metric."""

    model: str | None
    data: str | None
    metric: str
    shape: tuple[int, int, int, int]


ALL = {
    "classification": Task(None, None, "top1", example.INPUT_SHAPE),
    "detection": Task(
        f"{TASKS / 'detection.py'}:trained",
        f"{TASKS / 'detection.py'}:data",
        f"voc-map:{TASKS / 'detection.py'}:decode",
        (1, 3, 96, 96),
    ),
    "pose": Task(
        f"{TASKS / 'keypoints.py'}:trained",
        f"{TASKS / 'keypoints.py'}:data",
        f"oks-map:{TASKS / 'keypoints.py'}:decode",
        (1, 3, 96, 96),
    ),
}


@dataclass(frozen=True)
class Found:
    """A compressed network: its library, and its MACs of those of the dense sites."""

    library: Path
    macs: float


def dac(sites: Sequence[Site], threshold: float) -> dict[str, Chain]:
    """Chains of the weights alone, of sites with a kernel: the fewest filters with at most this relative error."""
    found = {}
    for site in sites:
        if max(site.spec.kernel) == 1 or site.spec.groups > 1:
            continue
        factors = factorise(site.weight, site.spec, method="dac")
        size = np.sum(np.square(site.weight))
        for rank in METHODS["dac"].ranks(site.spec, LANES):
            chain = cut("dac", factors, rank, site.weight, None)
            missing = site.weight - compose(chain.specs, [conv.weight for conv in chain.convs])
            if np.sum(np.square(missing)) <= threshold * size:
                found |= {site.id: chain} if chain_macs(chain.specs, site.size) < site.macs else {}
                break
    return found


def by_dac(mod: Any, judge: Judge, folder: Path, options: Mapping[str, Any]) -> Found | None:
    """The strongest network of DAC's that keeps the loss on the selection split."""
    sites = find_sites(mod)
    for threshold in THRESHOLDS[::-1]:
        chains = dac(sites, threshold)
        changed = replace_sites(mod, chains)
        if not chains or judge(changed) <= options["budget"]:
            break
    if not chains or judge(changed) > options["budget"]:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_portable(changed, folder)
    given = {name: options[name] for name in ("cache", "precision")}
    tvm_lowrank.compile(model=str(folder / "model.pt2"), out=folder / "bundle", force=True, **given)
    macs = sum(chain_macs(chains[s.id].specs, s.size) if s.id in chains else s.macs for s in sites)
    return Found(folder / "bundle" / "dense.so", macs / sum(site.macs for site in sites))


def unseen(task: Task, judge: Judge, folder: Path, options: Mapping[str, Any]) -> Found | None:
    """The strongest network of searches without data that keeps the loss on the selection split."""
    best = None
    for budget in BUDGETS:
        out = folder / f"{budget:g}"
        given = {**options, "budget": budget}
        manifest = tvm_lowrank.search(model=task.model or MODEL, input_shape=task.shape, out=out, force=True, **given)
        if judge(CompiledModel(out / "model.so", task.shape)) > options["budget"]:
            break
        best = Found(out / "model.so", share(manifest))
    return best


def seen(task: Task, folder: Path, options: Mapping[str, Any]) -> tuple[Found, Path]:
    """What a search with data delivers, and its dense library."""
    model = {} if task.model is None else {"model": task.model, "input_shape": task.shape, "data": task.data}
    manifest = tvm_lowrank.search(**model, metric=task.metric, out=folder, force=True, **options)
    return Found(folder / "model.so", share(manifest)), folder / "dense.so"


def share(manifest: Mapping[str, Any]) -> float:
    """The MACs of a bundle's network, of those of the dense one."""
    sites = manifest["sites"]
    return float(sum(site["macs"] for site in sites) / sum(site["dense_macs"] for site in sites))


def compared(name: str, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a task's table."""
    task, metric = ALL[name], load_metric(ALL[name].metric)
    (folder / "unseen").mkdir(parents=True, exist_ok=True)
    mod = import_model(task.model or MODEL, input_shape=task.shape)
    splits = load_data(task.data, input_shape=task.shape[1:])
    images, targets = splits.selection
    before = metric.scores(answered(TorchBridge(mod), images), targets)

    def judge(network: Any) -> float:
        """What a module or a library loses on the selection split."""
        outputs = network(images[:]) if isinstance(network, CompiledModel) else answered(TorchBridge(network), images)
        return metric.drop(before, metric.scores(outputs, targets))[0]

    with_images, dense = seen(task, folder / "seen", options)
    found = {
        "DAC, no data": by_dac(mod, judge, folder / "dac", options),
        "ours, no data": unseen(task, judge, folder / "unseen", options),
        "ours, with images": with_images,
    }
    there = {way: own for way, own in found.items() if own is not None}
    x = np.random.default_rng(0).standard_normal(task.shape).astype("float32")
    ms = measure_interleaved({"dense": dense, **{way: own.library for way, own in there.items()}}, x, rounds=ROUNDS)
    scores = {
        way: evaluate(CompiledModel(path, task.shape), *splits.evaluation, metric, description=way)
        for way, path in (("dense", dense), *((way, own.library) for way, own in there.items()))
    }
    rows = []
    for way in found:
        if way not in there:
            rows.append((name, way, "none keeps the loss", "", "", ""))
            continue
        drop, (low, high) = metric.drop(scores["dense"], scores[way])
        speedup = np.median(ms["dense"]) / np.median(ms[way])
        saved = f"{100 * (1 - there[way].macs):.0f} %"
        rows.append((name, way, saved, f"{speedup:.2f}", f"{drop:+.2f}", f"{low:+.2f} to {high:+.2f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(ALL), help="some of " + ", ".join(ALL))
    parser.add_argument("--loss", type=float, default=2.0, help="points that may be lost")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, help="folder for the bundles")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.tasks.split(","):
            options = {"budget": args.loss, "precision": args.precision, "cache": args.cache}
            rows += compared(name, (args.out or Path(temporary)) / name, options)
            columns = ("task", "", "MACs saved", "speed-up", "drop", "95 % interval")
            table(f"at most {args.loss:g} points lost on the selection split", columns, rows)


if __name__ == "__main__":
    main()
