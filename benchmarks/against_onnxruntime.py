"""Latency of a bundle's two libraries beside ONNX Runtime on the dense model, interleaved in one run.

    python benchmarks/against_onnxruntime.py demo

The bundle must be of the bundled example (or give --model and --input-shape as to search). Prints the medians and
their ratios; batch and threads are the bundle's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def onnxruntime_session(model: str | None, x: np.ndarray, threads: int) -> Callable[[], object]:
    """The dense torch model, exported and run by ONNX Runtime."""
    import onnxruntime
    import torch

    from tvm_lowrank import example
    from tvm_lowrank.data.reference import load_object

    net = (example.model() if model is None else load_object(model)()).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(net, (torch.from_numpy(x),), str(path), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="file.py:factory of the dense model; default: the bundled example")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()

    from tvm_lowrank.bundle.manifest import read_manifest

    manifest = read_manifest(args.bundle)
    threads = int(manifest["latency_ms"]["threads"])
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when TVM first runs something in parallel

    from tvm_lowrank import load

    x = np.random.default_rng(0).standard_normal(manifest["input_shape"]).astype("float32")
    dense, compressed = load(args.bundle, which="dense"), load(args.bundle)
    runs: dict[str, Callable[[], object]] = {
        "tvm dense": lambda: dense(x),
        "tvm compressed": lambda: compressed(x),
        "onnxruntime dense": onnxruntime_session(args.model, x, threads),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.rounds):
        for name, run in runs.items():
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < 0.05:
                run()
                count += 1
            times[name].append(1e3 * (time.perf_counter() - start) / count)
    base = float(np.median(times["onnxruntime dense"]))
    print(f"{threads} thread(s), batch {len(x)}, {args.rounds} interleaved rounds")
    for name, values in times.items():
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        print(f"{name:18s} {median:8.3f} ms  (10 % {p10:.3f}, 90 % {p90:.3f})  {base / median:5.2f}x ONNX Runtime")


if __name__ == "__main__":
    main()
