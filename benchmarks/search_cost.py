"""What a search of a large network costs: how often each expensive thing is done, and how long that takes.

    python benchmarks/search_cost.py [--model net.py:build] [--input-shape 1,3,224,224] [--methods channel,spatial]

The default is ResNet-18 at 224x224 with random weights, which take as long as others; there is no data, so synthetic
images stand in, and nothing is fitted: statistics, factorisations, probes, tuning and allocation are those of any
search. The cache is empty. Work that runs on several cores at once is counted for each of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tvm_lowrank import api, console  # noqa: E402
from tvm_lowrank.options import DEFAULT_METHODS  # noqa: E402
from tvm_lowrank.quantities import input_shape  # noqa: E402
from tvm_lowrank.searching.choose import loop, sensitivity  # noqa: E402
from tvm_lowrank.searching.commands import deliver  # noqa: E402
from tvm_lowrank.searching.latency import oracle, times  # noqa: E402


class Counted:
    """Calls of functions and the seconds that they took, by name."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with self._lock:
                    self.calls[name] = self.calls.get(name, 0) + 1
                    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return counted


def watched() -> list[tuple[str, Any, str]]:
    """What to count: a name, where the function is looked up, and its name there."""
    return [
        ("input statistics (one pass over the images)", sensitivity, "collect_moments"),
        ("Fisher information (one pass, with gradients)", sensitivity, "collect_fisher"),
        ("factorisations", sensitivity, "factorise"),
        ("chains cut, for probes and the result", sensitivity, "cut"),
        ("sites' damage predicted (solves of CP, Tucker)", sensitivity.Sensitivity, "_predicted"),
        ("sites probed", sensitivity, "predict_each"),
        ("allocations (integer programs)", loop, "allocate"),
        ("whole networks lowered", times.SiteTimes, "_network"),
        ("kernels tuned", oracle.LatencyOracle, "_tune"),
        ("libraries built and checked", deliver, "build_library"),
        ("end-to-end measurements", deliver, "end_to_end"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="else ResNet-18 with random weights")
    parser.add_argument("--input-shape", default="1,3,224,224")
    parser.add_argument("--methods", default=",".join(DEFAULT_METHODS))
    args = parser.parse_args()
    model: Any = args.model
    if model is None:
        from support.models import ResNet18, randomised

        model = randomised(ResNet18()).eval()
    counted = Counted()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, place, attribute in watched():
            stack.enter_context(patch.object(place, attribute, counted(name, getattr(place, attribute))))
        manifest = api.search(
            model=model,
            input_shape=input_shape(args.input_shape),
            methods=args.methods.split(","),
            out=Path(folder) / "bundle",
            cache=Path(folder) / "cache",
        )
    spent = time.perf_counter() - start
    calls, seconds = counted.calls, counted.seconds
    names = [name for name, _, _ in watched() if name in calls]
    rows = [(name, calls[name], f"{seconds[name]:.1f}", f"{seconds[name] / calls[name]:.3f}") for name in names]
    console.table("calls", ("what", "calls", "s", "s each"), rows)
    console.table("phases", ("phase", "s"), [(name, f"{value:.0f}") for name, value in manifest["seconds"].items()])
    dense, compressed = (manifest["latency_ms"][which]["median"] for which in ("dense", "compressed"))
    print(f"whole search: {spent / 60:.1f} min; {dense:.2f} ms dense, {compressed:.2f} ms, {dense / compressed:.2f}x")


if __name__ == "__main__":
    main()
