"""What a search of a large network costs: the seconds and the memory of each phase, and what it keeps.

    python benchmarks/search_cost.py [--network resnet18 | resnet50 | vgg16] [--images 1000] [--time-limit 30m]
    python benchmarks/search_cost.py --model net.py:build --images 0
    python benchmarks/search_cost.py --model net.py:build --data net.py:data --mean 0.485,0.456,0.406 --std 0.229

The networks have random weights at 224x224, which take as long as others; ``--model`` is any other of this size. The
images are made, and the labels are what the dense network says of them; ``--data`` is real data, as of a search. With
``--images 0`` there are no data: synthetic images stand in, and nothing is fitted or evaluated. The cache is empty.
What runs on several cores at once is counted for each of them. Memory is that of this process and of those that it
starts; what a phase keeps is what is more at its end than at its beginning.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.models import ResNet18, ResNet50, Vgg16, randomised  # noqa: E402
from tvm_lowrank import api, console  # noqa: E402
from tvm_lowrank.data.synthetic import dead_leaves  # noqa: E402
from tvm_lowrank.options import DEFAULT_METHODS  # noqa: E402
from tvm_lowrank.quantities import channels, names, seconds  # noqa: E402
from tvm_lowrank.searching.choose import networks, search, sensitivity  # noqa: E402
from tvm_lowrank.searching.commands import deliver, inputs, libraries  # noqa: E402
from tvm_lowrank.searching.latency import oracle, times  # noqa: E402

NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "resnet50": ResNet50, "vgg16": Vgg16}


class Memory:
    """Megabytes of this process and its children, looked at five times a second."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self.seen: list[tuple[float, float]] = []
        self._ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def now(self) -> float:
        total = 0
        for process in (self._own, *self._own.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            self.seen.append((time.perf_counter(), self.now()))

    def peak(self, start: float, end: float) -> float:
        """The most between two times."""
        return max((megabytes for at, megabytes in self.seen if start <= at <= end), default=0.0)


@dataclass
class Cost:
    """Of all calls of a function."""

    calls: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    kept: float = 0.0


class Counted:
    """What functions cost, by name."""

    def __init__(self, memory: Memory) -> None:
        self.costs: dict[str, Cost] = {}
        self._memory = memory
        self._lock = threading.Lock()

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            start, before = time.perf_counter(), self._memory.now()
            try:
                return function(*arguments, **options)
            finally:
                end, after = time.perf_counter(), self._memory.now()
                with self._lock:
                    cost = self.costs.setdefault(name, Cost())
                    cost.calls += 1
                    cost.seconds += end - start
                    cost.peak = max(cost.peak, before, after, self._memory.peak(start, end))
                    cost.kept += after - before

        return counted


def watched() -> list[tuple[str, Any, str]]:
    """What to count: a name, where the function is looked up, and its name there."""
    return [
        ("importing the network", inputs, "import_model"),
        ("input statistics (one pass over the images)", sensitivity.Sensitivity, "_collected_moments"),
        ("Fisher information (one pass, with gradients)", sensitivity.Sensitivity, "_collected_fisher"),
        ("damage of sites predicted (factorisations)", sensitivity.Sensitivity, "_predicted"),
        ("sites probed", sensitivity, "predict_each"),
        ("plans decomposed", sensitivity.Sensitivity, "network"),
        ("targets of the refit (one pass)", sensitivity, "dense_outputs"),
        ("plans refitted", networks, "refit"),
        ("plans reconstructed", networks, "reconstruct_if_better"),
        ("allocations (integer programs)", search, "allocate"),
        ("whole networks lowered", times.SiteTimes, "_network"),
        ("kernels tuned", oracle.LatencyOracle, "_tune"),
        ("libraries built and checked", deliver, "build_library"),
        ("libraries judged on the evaluation images", deliver, "judged"),
        ("end-to-end measurements", libraries, "end_to_end"),
    ]


def network(name: str) -> nn.Module:
    """One of the networks with random weights whose answers differ between images."""
    model = randomised(NETWORKS[name]()).eval()
    with torch.no_grad():
        spread = model(torch.from_numpy(made_images(16))).std()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(3 / spread)
        last.bias.mul_(3 / spread)
    return model


def made_images(count: int, seed: int = 0) -> np.ndarray:
    """Images (count, 3, 224, 224), mirrored and turned ones of fewer."""
    few = dead_leaves((3, 224, 224), -(-count // 8), seed=seed)
    turned = [np.rot90(few, turns, axes=(2, 3)) for turns in range(4)]
    return np.ascontiguousarray(np.concatenate([*turned, *(images[..., ::-1] for images in turned)])[:count])


@torch.no_grad()
def labelled(model: nn.Module, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images = made_images(count, seed)
    answers = [model(part).argmax(1) for part in torch.from_numpy(images).split(16)]
    return images, torch.cat(answers).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet18")
    parser.add_argument("--model", help="in place of the network, for 1,3,224,224")
    parser.add_argument("--images", type=int, default=1000, help="for calibration; 1.3 times as many for the rest")
    parser.add_argument("--data")
    parser.add_argument("--mean", type=channels)
    parser.add_argument("--std", type=channels)
    parser.add_argument("--methods", type=names, default=DEFAULT_METHODS)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--time-limit", type=seconds)
    args = parser.parse_args()
    model: Any = args.model or network(args.network)
    data: Any = args.data
    if args.images and data is None:
        rest = [labelled(model, 13 * args.images // 20, seed) for seed in (2, 3)]
        data = {"calibration": made_images(args.images, 1), "selection": rest[0], "evaluation": rest[1]}
    memory = Memory()
    counted = Counted(memory)
    start, before = time.perf_counter(), memory.now()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, place, attribute in watched():
            stack.enter_context(patch.object(place, attribute, counted(name, getattr(place, attribute))))
        manifest = api.search(
            model=model,
            input_shape=(1, 3, 224, 224),
            data=data,
            mean=args.mean,
            std=args.std,
            methods=args.methods,
            precision=args.precision,
            time_limit=args.time_limit,
            out=Path(folder) / "bundle",
            cache=Path(folder) / "cache",
        )
    end = time.perf_counter()
    rows = [
        (name, cost.calls, f"{cost.seconds:.1f}", f"{cost.peak:.0f}", f"{cost.kept:+.0f}")
        for name, _, _ in watched()
        if (cost := counted.costs.get(name))
    ]
    console.table("calls", ("what", "calls", "s", "peak MB", "kept MB"), rows)
    console.table("phases", ("phase", "s"), [(name, f"{value:.0f}") for name, value in manifest["seconds"].items()])
    dense, compressed = (manifest["latency_ms"][which]["median"] for which in ("dense", "compressed"))
    used = f"at most {memory.peak(start, end):.0f} MB ({before:.0f} before it)"
    speed = f"{dense:.2f} ms dense, {compressed:.2f} ms, {dense / compressed:.2f}x"
    accuracy = manifest["accuracy"]
    if accuracy is not None:
        low, high = accuracy["ci95"]
        print(f"drop {accuracy['drop']:+.2f} points ({low:+.2f} to {high:+.2f}), looks: {accuracy['looks']}")
    print(f"whole search: {(end - start) / 60:.1f} min, {used}; {speed}")


if __name__ == "__main__":
    main()
