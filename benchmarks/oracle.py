"""What the latency oracle is worth, in one run on an otherwise idle machine.

    python benchmarks/oracle.py                       # everything, about 20 minutes
    python benchmarks/oracle.py trials networks       # some of its parts
    python benchmarks/oracle.py networks --threads 2

trials      trials per minute of TVM's own `tune_relax` and of the oracle, and what they found, on the same tasks
schedules   how far the best of few trials is from the best known, for shapes that nothing was tuned for before: cold,
            and transferred from what other shapes taught
surrogate   the error of predicted times on convolutions that were not measured, by how many were
whole       predicted against measured milliseconds of whole networks, five plans of each
chains      the methods on one 512 to 512 3x3 convolution: how much of the MAC ratio becomes time
methods     the same on the convolutions of VGG-16 as a whole, end to end
networks    dense ResNet-18 and VGG-16 beside ONNX Runtime and OpenVINO (where they are installed)

Nothing is taken from the user's cache. GFLOPS count two operations for a multiply-accumulate. Times that are compared
were measured in turns; ratios are of medians.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1, 3, 224, 224)
METHOD_RANKS: dict[str, dict[str, Any]] = {
    "channel": {"rank": 192},
    "spatial": {"rank": 192},
    "spatial_channel": {"rank": (192, 192)},
    "cp3": {"rank": 512},
    "dac": {"rank": 4},
    "tucker2": {"rank": (144, 144)},
    "btd": {"rank": (128, 128, 4)},
}


@dataclass(frozen=True)
class Shape:
    """A convolution of square images."""

    kind: str
    inside: int
    outside: int
    size: int
    kernel: tuple[int, int]
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.inside}-{self.outside} at {self.size}"


def unseen(count: int, seed: int) -> list[Shape]:
    """Shapes of all kinds, with channels on and off the lane grid."""
    generator = np.random.default_rng(seed)
    kinds = {"1x1": (1, 1), "3x3": (3, 3), "3x1": (3, 1), "1x3": (1, 3), "depthwise": (3, 3), "grouped": (3, 3)}
    shapes = []
    for i in range(count):
        kind = list(kinds)[i % len(kinds)]
        size = int(generator.choice([7, 14, 16, 28, 32, 56]))
        inside, outside = (int(16 * generator.integers(2, 33)) for _ in range(2))
        groups = 1
        if kind == "depthwise":
            outside = groups = inside
        if kind == "grouped":
            groups = int(generator.choice([2, 4]))
            inside, outside = (int(16 * groups * generator.integers(1, 9)) for _ in range(2))
        if kind == "3x3" and i % 2:
            outside += int(generator.integers(1, 16))  # off the grid
        shapes.append(Shape(kind, inside, outside, size, kinds[kind], groups))
    return shapes


def module_of(shapes: Sequence[Shape]) -> list[Any]:
    """The canonical module of each convolution with its bias and ReLU."""
    from torch import nn

    from tvm_lowrank.importers.importer import import_model

    modules = []
    for shape in shapes:
        padding = (shape.kernel[0] // 2, shape.kernel[1] // 2)
        conv = nn.Conv2d(shape.inside, shape.outside, shape.kernel, padding=padding, groups=shape.groups)
        net = nn.Sequential(conv, nn.ReLU()).eval()
        modules.append(import_model(net, input_shape=(1, shape.inside, shape.size, shape.size)))
    return modules


class Bench:
    """What all parts need: the target, worker processes, and folders that nothing else uses."""

    def __init__(self, folder: Path, threads: int) -> None:
        from tvm_lowrank.searching.measure.local import LocalBench
        from tvm_lowrank.targets.profile import load_profile

        self.folder, self.threads = folder, threads
        self.profile = load_profile("x86")
        self.target = self.profile.tvm_target(threads)
        self.local = LocalBench(target=self.target, threads=threads)

    def oracle(self, name: str, trials: int) -> Any:
        """An oracle with a database of this name; closing it would end the processes that all of them share."""
        from tvm_lowrank.searching.latency.oracle import LatencyOracle

        options = {"trials": trials, "threads": self.threads, "bench": self.local}
        return LatencyOracle(self.profile, cache_dir=self.folder / name, **options)

    def kernel(self, module: Any) -> Any:
        """The convolution of a module that has one."""
        from tvm_lowrank.codegen.lower import kernels, lower

        (found,) = [k for k in kernels(lower(module, batch=1, target=self.target)) if k.is_conv]
        return found

    def compare(self, func: Any, tilings: Sequence[Any], rounds: int = 6) -> list[float]:
        """Seconds of schedules of one kernel, measured in turns."""
        from tvm_lowrank.searching.latency.oracle import undisturbed
        from tvm_lowrank.searching.measure.bench import Job

        self.local.forget()
        handles = self.local.build([Job(func, tiling) for tiling in tilings])
        samples: list[list[float]] = [[] for _ in handles]
        for _ in range(rounds):
            for own, handle in zip(samples, handles, strict=True):
                own.extend(self.local.time(handle, 0.03))
        return [undisturbed(own) for own in samples]


def gflops(func: Any, seconds: float) -> float:
    """Of a kernel that takes so long."""
    from tvm_lowrank.codegen.schedule import workload

    return float(2e-9 * workload(func).macs / seconds)


def trials(bench: Bench) -> Iterator[str]:
    """TVM's own tuning and ours on the same tasks."""
    from tvm.s_tir import meta_schedule as ms

    count = 16
    shapes = [Shape("3x3", 128, 128, 28, (3, 3)), Shape("1x1", 256, 144, 28, (1, 1))]
    logging.disable()  # MetaSchedule's, which is long
    modules = module_of(shapes)
    oracle = bench.oracle("warm-up", 2)  # the workers' import is not part of it
    oracle.measure([bench.kernel(module_of([Shape("1x1", 16, 16, 7, (1, 1))])[0])])
    heads = ("stock: GFLOPS", "trials/min", "ours: GFLOPS", "trials/min")
    yield f"{'task':24s} " + " ".join(f"{head:>13s}" for head in heads) + f" {'times':>6s}"
    for shape, module in zip(shapes, modules, strict=True):
        kernel = bench.kernel(module)
        with tempfile.TemporaryDirectory() as work, bench.target:
            start = time.perf_counter()
            database = ms.tune_tir(
                kernel.func["main"],
                bench.target,
                work,
                max_trials_global=count,
                num_trials_per_iter=count,
                num_tuning_cores=os.cpu_count() or 1,
                seed=0,
            )
            stock_seconds = time.perf_counter() - start
            records = [r for r in database.get_all_tuning_records() if r.run_secs]
            stock = min(float(min(r.run_secs)) for r in records)
        oracle = bench.oracle("trials", count)
        start = time.perf_counter()
        oracle.measure([kernel])
        seconds = time.perf_counter() - start
        ours = oracle.known(kernel.key).ms / 1e3
        rates = [60 * count / stock_seconds, 60 * count / seconds]
        found = [gflops(kernel.func, s) for s in (stock, ours)]
        yield (
            f"{shape!s:24s} {found[0]:13.0f} {rates[0]:13.0f} {found[1]:13.0f} {rates[1]:13.0f} "
            f"{rates[1] / rates[0]:6.1f}"
        )


def schedules(bench: Bench) -> Iterator[str]:
    """Best found against the number of trials."""
    budgets, thorough = (2, 4, 8), 48
    shapes = unseen(12, 5)
    teachers = unseen(30, 77)
    yield f"slower than the best known (GFLOPS) after so many trials; taught by {len(teachers)} other shapes; s for 8"
    heads = " ".join(f"{f'cold {b}':>8s}" for b in budgets) + " " + " ".join(f"{f'taught {b}':>9s}" for b in budgets)
    yield f"{'shape':26s} {'best':>5s} {heads} {'s':>5s}"
    oracle = bench.oracle("taught", 8)
    oracle.measure([bench.kernel(module) for module in module_of(teachers)])
    (database,) = (bench.folder / "taught").rglob("*.jsonl")
    lost: dict[str, list[float]] = {}
    for number, (shape, module) in enumerate(zip(shapes, module_of(shapes), strict=True)):
        kernel, found, seconds = bench.kernel(module), {}, 0.0
        for start in ("cold", "taught"):
            for budget in (*budgets, *((thorough,) if start == "taught" else ())):
                name = f"{start}-{budget}-{number}"
                copy = bench.folder / name / database.relative_to(bench.folder / "taught")
                copy.parent.mkdir(parents=True)
                if start == "taught":
                    copy.write_bytes(database.read_bytes())
                oracle = bench.oracle(name, budget)
                began = time.perf_counter()
                oracle.measure([kernel])
                if (start, budget) == ("taught", 8):
                    seconds = time.perf_counter() - began
                found[f"{start} {budget}"] = oracle.database[kernel.key]
        distinct = list(dict.fromkeys(found.values()))
        times = dict(zip(distinct, bench.compare(kernel.func, distinct), strict=True))
        best = min(times.values())
        for name, tiling in found.items():
            lost.setdefault(name, []).append(times[tiling] / best - 1)
        row = " ".join(f"{100 * lost[f'cold {b}'][-1]:7.1f}%" for b in budgets)
        row += " " + " ".join(f"{100 * lost[f'taught {b}'][-1]:8.1f}%" for b in budgets)
        yield f"{shape!s:26s} {gflops(kernel.func, best):5.0f} {row} {seconds:5.1f}"
    for name, how in (("median", np.median), ("worst", np.max)):
        row = " ".join(f"{100 * how(lost[f'cold {b}']):7.1f}%" for b in budgets)
        row += " " + " ".join(f"{100 * how(lost[f'taught {b}']):8.1f}%" for b in budgets)
        yield f"{name:26s} {'':5s} {row}"


def surrogate(bench: Bench) -> Iterator[str]:
    """Errors on convolutions that were not measured."""
    from tvm_lowrank.searching.latency.surrogate import Surrogate

    oracle = bench.oracle("surrogate", 8)
    oracle.measure([bench.kernel(module) for module in module_of(unseen(150, 11))])
    known = oracle.convolutions()
    order = np.random.default_rng(0).permutation(len(known))
    held = [known[i] for i in order[100:]]
    yield f"{'measured':>8s} {'unseen':>7s} {'median error':>13s} {'90th percentile':>16s}"
    for count in (25, 50, 100):
        model = Surrogate(lanes=bench.profile.lanes, registers=bench.profile.registers)
        convs, ms = zip(*[known[i] for i in order[:count]], strict=True)
        model.fit(convs, ms)
        predicted, _ = model.predict([conv for conv, _ in held])
        errors = np.abs(predicted / np.array([ms for _, ms in held]) - 1)
        yield f"{count:8d} {len(held):7d} {np.median(errors):13.1%} {np.percentile(errors, 90):16.1%}"


def random_plans(sites: Sequence[Any], count: int, lanes: int) -> list[dict[str, Any]]:
    """Plans that change most sites to anything, and the dense one first."""
    from tvm_lowrank.options import DEFAULT_METHODS
    from tvm_lowrank.searching.candidates import candidates

    generator = np.random.default_rng(3)
    plans: list[dict[str, Any]] = [{}]
    for _ in range(count):
        plan = {}
        for site in sites:
            choices = candidates(site, methods=DEFAULT_METHODS, lanes=lanes)
            if choices and generator.random() < 0.8:
                plan[site.id] = choices[generator.integers(len(choices))]
        plans.append(plan)
    return plans


def whole(bench: Bench) -> Iterator[str]:
    """Whole networks: five random plans of each, predicted when only the dense ones have been measured end to end."""
    from tvm_lowrank import example
    from tvm_lowrank.codegen.lower import build, lower
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.searching.latency.times import SiteTimes
    from tvm_lowrank.searching.measure.local import measure_interleaved
    from tvm_lowrank.transform import replace_sites, shape_chains

    models = {"example": (example.model(), example.INPUT_SHAPE), "ResNet-18": (resnet18(), SIZE)}
    yield f"{'network':12s} {'plan':>6s} {'measured ms':>12s} {'sum of kernels':>15s} {'predicted':>10s} {'error':>7s}"
    runs = {}
    oracle = bench.oracle("whole", 8)
    for name, (module, shape) in models.items():
        mod = import_torch(module, shape)
        sites = find_sites(mod)
        times = SiteTimes(mod, sites, oracle, batch=1)
        times.measure_others({})
        plans = random_plans(sites, 5, bench.profile.lanes)
        libraries = {}
        for i, plan in enumerate(plans):
            times.whole(plan)
            changed = replace_sites(mod, shape_chains(mod, plan)) if plan else mod
            lowered = lower(changed, batch=1, target=bench.target)
            libraries[str(i)] = build(lowered, oracle.database, bench.target, threads=bench.threads)
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        found = measure_interleaved(libraries, x, rounds=15, threads=bench.threads)
        runs[name] = [(plan, float(np.median(found[str(i)]))) for i, plan in enumerate(plans)]
        sums = [times.whole(plan) for plan in plans]
        times.learn({}, runs[name][0][1])
        errors = []
        for i, (plan, ms) in enumerate(runs[name]):
            predicted = times.whole(plan)
            errors.append(abs(predicted / ms - 1))
            label = f"{i}" if i else "dense"
            yield f"{name:12s} {label:>6s} {ms:12.3f} {sums[i]:15.3f} {predicted:10.3f} {errors[-1]:7.1%}"
        yield f"{name:12s} {'worst of five':>19s} {max(errors[1:]):33.1%}"


def chains(bench: Bench) -> Iterator[str]:
    """The methods on one convolution."""
    from tvm_lowrank.plan import Choice, Plan

    (mod,) = module_of([Shape("3x3", 512, 512, 28, (3, 3))])
    plans = {"dense": Plan()}
    plans |= {name: Plan({site_id(mod): Choice(name, **entry)}) for name, entry in METHOD_RANKS.items()}
    yield from _chains(bench, mod, plans, None, "chains")


def methods(bench: Bench) -> Iterator[str]:
    """The methods on the convolutions of VGG-16, each at the rank whose MACs are nearest to 0.4 of the layer's."""
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.plan import Plan
    from tvm_lowrank.searching.candidates import candidates, site_macs

    mod = import_torch(vgg16().features, SIZE)
    plans = {"dense": Plan()}
    for name in METHOD_RANKS:
        chosen = {}
        for site in find_sites(mod):
            own = candidates(site, methods=[name], lanes=bench.profile.lanes)
            if own:
                chosen[site.id] = min(own, key=lambda c, s=site: abs(site_macs(s, c) / s.macs - 0.4))
        plans[name] = Plan(chosen)
    yield from _chains(bench, mod, plans, SIZE, "methods")


def _chains(bench: Bench, mod: Any, plans: Any, shape: Sequence[int] | None, database: str) -> Iterator[str]:
    """Times of plans: end to end for inputs of a shape, or else the sum of their convolutions."""
    from tvm_lowrank.codegen.lower import build, kernels, lower
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.plan import Choice
    from tvm_lowrank.searching.candidates import site_macs
    from tvm_lowrank.searching.measure.local import measure_interleaved
    from tvm_lowrank.transform import replace_sites, shape_chains

    sites, libraries, times, tuned, macs, slowest = find_sites(mod), {}, {}, {}, {}, {}
    oracle = bench.oracle(database, 12)
    for name, plan in plans.items():
        changed = replace_sites(mod, shape_chains(mod, plan)) if plan else mod
        lowered = lower(changed, batch=1, target=bench.target)
        start = time.perf_counter()
        found = oracle.measure(kernels(lowered))
        tuned[name] = time.perf_counter() - start
        convs = [k for k in kernels(lowered) if k.is_conv]
        times[name] = sum(found[k.key].ms for k in convs)
        if shape is not None:
            libraries[name] = build(lowered, oracle.database, bench.target, threads=bench.threads)
        macs[name] = sum(site_macs(site, plan.get(site.id, Choice())) for site in sites)
        slowest[name] = min(gflops(k.func, found[k.key].ms / 1e3) for k in convs)
    if shape is not None:
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        runs = measure_interleaved(libraries, x, rounds=15, threads=bench.threads)
        times = {name: float(np.median(ms)) for name, ms in runs.items()}
    yield (
        f"{'method':16s} {'ms':>8s} {'MAC ratio':>10s} {'speed-up':>9s} {'of it':>6s} {'GFLOPS':>7s} "
        f"{'slowest kernel':>15s} {'tuned in s':>11s}"
    )
    for name in plans:
        ms, dense = times[name], times["dense"]
        ratio = macs["dense"] / macs[name]
        yield (
            f"{name:16s} {ms:8.3f} {ratio:10.2f} {dense / ms:9.2f} {dense / ms / ratio:6.2f} "
            f"{2e-6 * macs[name] / ms:7.0f} {slowest[name]:15.0f} {tuned[name]:11.0f}"
        )


def networks(bench: Bench) -> Iterator[str]:
    """Dense networks beside other runtimes."""
    from tvm_lowrank.bundle.library import CompiledModel
    from tvm_lowrank.codegen.lower import build, kernels, lower

    yield f"{'network':12s} {'runtime':14s} {'median ms':>10s} {'p10':>8s} {'p90':>8s} {'tuned in s':>11s}"
    for name, module in {"ResNet-18": resnet18(), "VGG-16": vgg16()}.items():
        mod = import_torch(module, SIZE)
        lowered = lower(mod, batch=1, target=bench.target)
        oracle = bench.oracle("networks", 8)
        start = time.perf_counter()
        oracle.measure(kernels(lowered))
        seconds = time.perf_counter() - start
        path = bench.folder / f"{name}.so"
        build(lowered, oracle.database, bench.target, threads=bench.threads).export_library(str(path))
        bench.local.close()
        x = np.random.default_rng(0).standard_normal(SIZE).astype("float32")
        runs: dict[str, Callable[[np.ndarray], Any]] = {"ours": CompiledModel(path, SIZE)}
        runs |= other_runtimes(module, x, bench.threads)
        expected = runs["ours"](x)
        for runtime, run in runs.items():
            np.testing.assert_allclose(run(x), expected, rtol=1e-3, atol=1e-3, err_msg=runtime)
        times: dict[str, list[float]] = {runtime: [] for runtime in runs}
        for _ in range(30):
            for runtime, run in runs.items():
                run(x)
                start = time.perf_counter()
                run(x)
                times[runtime].append(1e3 * (time.perf_counter() - start))
        for runtime, ms in times.items():
            p10, median, p90 = np.percentile(ms, [10, 50, 90])
            spent = f"{seconds:11.0f}" if runtime == "ours" else ""
            yield f"{name:12s} {runtime:14s} {median:10.2f} {p10:8.2f} {p90:8.2f} {spent}"
        others = [np.median(ms) for runtime, ms in times.items() if runtime != "ours"]
        if others:
            yield f"{name:12s} ours / the better of the others: {np.median(times['ours']) / min(others):.2f}"


def other_runtimes(module: Any, x: np.ndarray, threads: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """The module in ONNX Runtime and OpenVINO."""
    import torch

    found: dict[str, Callable[[np.ndarray], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module, (torch.from_numpy(x),), str(path), dynamo=True, verbose=False)
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            found["ONNX Runtime"] = lambda x: session.run(None, {name: x})[0]
        except ImportError:
            print("onnxruntime is not installed (pip install onnxruntime)")
        try:
            import openvino

            settings = {
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # it would share a core with whatever else is there
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            }
            request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
            found["OpenVINO"] = lambda x: request.infer([x])[0]
        except ImportError:
            print("openvino is not installed (pip install openvino)")
    return found


def import_torch(module: Any, shape: Sequence[int]) -> Any:
    """The canonical module of a torch module."""
    from tvm_lowrank.importers.importer import import_model

    return import_model(module, input_shape=tuple(shape))


def site_id(mod: Any) -> str:
    """Of the only site."""
    from tvm_lowrank.graph import find_sites

    (site,) = find_sites(mod)
    return str(site.id)


def resnet18() -> Any:
    """With random weights, which take as long as others."""
    from support.models import ResNet18, randomised

    return randomised(ResNet18()).eval()


def vgg16() -> Any:
    """With random weights."""
    from support.models import Vgg16, randomised

    return randomised(Vgg16()).eval()


PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {
    part.__name__: part for part in (trials, schedules, surrogate, whole, chains, methods, networks)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all if none is named")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))  # their networks
    os.environ["TVM_NUM_THREADS"] = str(args.threads)  # read when TVM first runs something in parallel
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.threads)
        with closing(bench.local):
            for name in args.parts or PARTS:
                print(f"\n== {name}, {args.threads} thread{'s' if args.threads > 1 else ''}", flush=True)
                start = time.perf_counter()
                for line in PARTS[name](bench):
                    print(line, flush=True)
                print(f"({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
