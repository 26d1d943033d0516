"""Our libraries beside other runtimes on the dense network, interleaved in one run, each in several number formats.

    python benchmarks/against_peers.py demo                        # a bundle of the bundled example
    python benchmarks/against_peers.py bundle --model net.py:build
    python benchmarks/against_peers.py resnet50 --cache tuning     # tuned by this tool first
    python benchmarks/against_peers.py resnet50 --cache tuning --budget-free

A bundle brings its dense and its compressed library; it must be of the bundled example, or --model is the network that
it was made from. A network by name has random weights at 224x224, which take as long as others; its dense library is
tuned here, in float32 and in the fastest formats of this processor. With --budget-free it is also compressed, to half
of the MACs, whatever that does to its accuracy.

The peers run the dense network: ONNX Runtime, OpenVINO, ncnn (converted by pnnx) and MNN. One that is not installed, or
cannot run the network, stands in the table with the reason.

    pip install onnxruntime openvino ncnn pnnx MNN

Each contestant is a process of its own with so many threads. What its format costs in accuracy is not measured: the
column "error" is the largest difference from PyTorch's float32 outputs for one batch, relative to the largest output,
and shows that no contestant is broken.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peers.contest import COARSE, COLUMNS, EXACT, INT8, Contestant, Process, compete, rows, verdict
from peers.entries import NAMES, Entry, bundle, named, prepared, threads_of
from tvm_lowrank import MeasurementError, UserError, console
from tvm_lowrank.searching.measure.bench import Worker

HERE = Path(__file__).resolve().parent
PEERS = (
    Contestant("ONNX Runtime", "float32", "onnxruntime", "onnx", "onnxruntime", EXACT),
    Contestant("ONNX Runtime", INT8, "onnxruntime", "int8", "onnxruntime", COARSE),
    Contestant("OpenVINO", "float32", "openvino", "onnx", "openvino", EXACT, {"INFERENCE_PRECISION_HINT": "f32"}),
    Contestant("OpenVINO", "default", "openvino", "onnx", "openvino"),
    Contestant("OpenVINO", INT8, "openvino", "int8", "openvino", COARSE),
    Contestant("ncnn", "default", "ncnn", "ncnn", "ncnn"),
    Contestant("ncnn", "bfloat16", "ncnn", "ncnn", "ncnn", options={"use_bf16_storage": True}),
    Contestant("MNN", "default", "mnn", "mnn", "MNN", options={"precision": "normal"}),
    Contestant("MNN", "low precision", "mnn", "mnn", "MNN", options={"precision": "low"}),
)


@contextmanager
def pinned(threads: int) -> Iterator[Callable[[], Process]]:
    """Starts processes in which every runtime has this number of threads."""
    changed = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    changed["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield lambda: Worker(threads=threads, module="peers.runtimes")
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def entry_of(args: argparse.Namespace, folder: Path, threads: int) -> Entry:
    """What was asked for; what is built goes to the folder."""
    if args.what not in NAMES:
        return bundle(Path(args.what), args.model, count=args.images)
    console.phase(f"tuning {args.what}")
    cache = args.cache or folder / "cache"
    return named(args.what, folder, threads=threads, cache=cache, count=args.images, budget_free=args.budget_free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default=NAMES[0], help=f"a bundle, or one of {', '.join(NAMES)}")
    parser.add_argument("--model", help="file.py:factory, the network that a bundle was made from")
    parser.add_argument("--threads", type=int, help="default: the bundle's, or 1")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a contestant's turn in each round")
    parser.add_argument("--images", type=int, default=200, help="for the calibration of int8")
    parser.add_argument("--cache", type=Path, help="folder that keeps the tuning; default: a temporary one")
    parser.add_argument("--budget-free", action="store_true", help="compress a named network, to half of its MACs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells which packages it could use are not there
    try:
        threads = args.threads or 1 if args.what in NAMES else threads_of(Path(args.what), args.threads)
        with tempfile.TemporaryDirectory() as name, pinned(threads) as start:
            entry = entry_of(args, Path(name), threads)
            match = prepared(entry, Path(name), threads=threads, rounds=args.rounds, seconds=args.seconds)
            results = compete((*PEERS, *entry.libraries), match, start, console.phase)
    except (UserError, MeasurementError) as error:
        console.error(str(error))
        sys.exit(1)
    title = f"{args.what}, batch {len(match.x)}, threads: {threads}, {args.rounds} rounds of {args.seconds} s"
    console.table(title, COLUMNS, rows(results))
    print("\n".join(verdict(results)))


if __name__ == "__main__":
    main()
