"""One process for each contestant, which holds one runtime and times it: ``python -m peers.runtimes``.

`RUNTIMES` open a network in a runtime; `FILES` make what a runtime reads from the ONNX file of the dense network. A
new peer is an entry in one or both, and a row in `PEERS` of `against_peers.py`. Inputs and outputs stay in the
runtime's own memory while the clock runs, but for MNN's input. Nothing here imports PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.searching.measure.worker import serve

ONNX, IMAGES = "model.onnx", "images.npy"  # in the folder that all processes of a run share
WARM_UP = 0.3  # seconds


@dataclass(frozen=True)
class Opened:
    """A network in a runtime, with its input set.

    Attributes
    ----------
    run
        Computes the output once.
    output
        The output of the last run, (N, …).
    format
        The number format by what the runtime says; empty if it does not say.
    """

    run: Callable[[], object]
    output: Callable[[], np.ndarray]
    version: str
    format: str = ""


def onnxruntime(path: Path, x: np.ndarray, threads: int, options: Mapping[str, Any]) -> Opened:
    """A float32 or quantised ONNX file."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output(session.get_outputs()[0].name)
    return Opened(
        lambda: session.run_with_iobinding(binding),
        lambda: binding.copy_outputs_to_cpu()[0],
        onnxruntime.__version__,
    )


def openvino(path: Path, x: np.ndarray, threads: int, options: Mapping[str, Any]) -> Opened:
    """An ONNX file; ``options`` are properties of the compiled model."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # it would share a core with whatever else is there, and others would move away
        **options,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))
    format = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    return Opened(
        request.infer,
        lambda: np.array(request.get_output_tensor().data),
        metadata.version("openvino"),
        names.get(format, format),
    )


def ncnn(path: Path, x: np.ndarray, threads: int, options: Mapping[str, Any]) -> Opened:
    """What pnnx made; ``options`` are those of ncnn's ``Option``, whose defaults include Winograd."""
    import ncnn

    if len(x) > 1:
        raise ValueError("ncnn takes a batch of 1 only")
    net = ncnn.Net()
    for name, value in {"num_threads": threads, **options}.items():
        setattr(net.opt, name, value)
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise ValueError(f"ncnn cannot read {path.name}")
    image, (source,), (sink,) = ncnn.Mat(x[0]).clone(), net.input_names(), net.output_names()
    last: list[Any] = []

    def run() -> None:
        with net.create_extractor() as extractor:
            extractor.input(source, image)
            failed, output = extractor.extract(sink)
        if failed:
            raise RuntimeError(f"ncnn failed with code {failed}")
        last[:] = [output]

    return Opened(run, lambda: np.array(last[0])[None], metadata.version("ncnn"))


def mnn(path: Path, x: np.ndarray, threads: int, options: Mapping[str, Any]) -> Opened:
    """What MNN's converter made; ``options`` are those of a session."""
    import MNN

    interpreter = MNN.Interpreter(str(path))
    session = interpreter.createSession({"backend": "CPU", "numThread": threads, **options})
    source = interpreter.getSessionInput(session)
    interpreter.resizeTensor(source, x.shape)
    interpreter.resizeSession(session)
    image = MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe)

    def run() -> None:
        source.copyFrom(image)  # a run writes over its input
        interpreter.runSession(session)

    def output() -> np.ndarray:
        sink = interpreter.getSessionOutput(session)
        shape = sink.getShape()
        copy = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, "float32"), MNN.Tensor_DimensionType_Caffe)
        sink.copyToHostTensor(copy)
        return np.array(copy.getData(), "float32").reshape(shape)

    return Opened(run, output, metadata.version("MNN"))


def tvm_lowrank(path: Path, x: np.ndarray, threads: int, options: Mapping[str, Any]) -> Opened:
    """A library of ours; its process was started with this number of threads."""
    import tvm
    from tvm import relax

    from tvm_lowrank.codegen.processor import check

    check(path)  # which also asks for tiles, where the library needs them
    main = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())["main"]
    argument, last = tvm.runtime.tensor(x), []

    def run() -> None:
        last[:] = [main(argument)]

    return Opened(run, lambda: last[0].numpy(), metadata.version("tvm_lowrank"))


Runtime = Callable[[Path, np.ndarray, int, Mapping[str, Any]], Opened]
RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ncnn": ncnn,
    "mnn": mnn,
    "tvm_lowrank": tvm_lowrank,
}


def exported(folder: Path) -> Path:
    """As PyTorch wrote it."""
    path = folder / ONNX
    if not path.is_file():
        raise ValueError("PyTorch could not write the network as ONNX")
    return path


def quantised(folder: Path) -> Path:
    """Statically, from calibration images: int8 weights for each channel, uint8 activations, QDQ."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, made = folder / "folded.onnx", folder / "int8.onnx"
    quant_pre_process(str(exported(folder)), str(folded))
    quantize_static(
        str(folded),
        str(made),
        Reader(folded, np.load(folder / IMAGES)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return made


class Reader:
    """Batches (n, N, C, H, W), as ONNX Runtime's calibration asks for them."""

    def __init__(self, model: Path, batches: np.ndarray) -> None:
        import onnx

        (source,) = onnx.load(model, load_external_data=False).graph.input
        self._inputs = iter({source.name: batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def by_pnnx(folder: Path) -> Path:
    """ncnn's two files, with float32 weights: what else they become is the runtime's business."""
    spec = find_spec("pnnx")
    assert spec is not None and spec.origin is not None
    program = Path(spec.origin).parent / "pnnx"  # the package itself would import PyTorch
    made = folder / "model.ncnn.param"
    shape = ",".join(map(str, np.load(folder / IMAGES, mmap_mode="r").shape[1:]))
    files = [f"ncnnparam={made}", f"ncnnbin={made.with_suffix('.bin')}"]
    return command([program, exported(folder), f"inputshape=[{shape}]", "fp16=0", *files], made)


def by_mnnconvert(folder: Path) -> Path:
    made = folder / "model.mnn"
    converter = [sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX", "--bizCode", "tvm_lowrank"]
    return command([*converter, "--modelFile", exported(folder), "--MNNModel", made], made)


def command(arguments: Sequence[str | Path], made: Path) -> Path:
    """The file that a converter makes; RuntimeError with its last line if it does not."""
    done = subprocess.run([*map(str, arguments)], cwd=made.parent, capture_output=True, text=True)
    if done.returncode or not made.is_file():
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{Path(arguments[0]).name} ended with code {done.returncode}: {lines[-1]}")
    return made


FILES: dict[str, Callable[[Path], Path]] = {
    "onnx": exported,
    "int8": quantised,
    "ncnn": by_pnnx,
    "mnn": by_mnnconvert,
}


class Session:
    """What the process answers."""

    def __init__(self) -> None:
        self._opened: Opened | None = None

    def convert(self, kind: str, folder: str) -> str:
        """Make a file of `FILES`; its path."""
        return str(FILES[kind](Path(folder)))

    def open(
        self, runtime: str, path: str, x: np.ndarray, threads: int, options: Mapping[str, Any]
    ) -> tuple[str, str, np.ndarray]:
        """Open a network and warm it up: the runtime's version, its number format, and the output for x."""
        self._opened = RUNTIMES[runtime](Path(path), x, threads, options)
        self.time(WARM_UP)
        return self._opened.version, self._opened.format, self._opened.output()

    def time(self, seconds: float) -> float:
        """Milliseconds of a run, the mean of as many as fill the time, after one that does not count."""
        assert self._opened is not None
        run = self._opened.run
        run()  # others have had the caches
        start, count, passed = time.perf_counter(), 0, 0.0
        while passed < seconds or not count:
            run()
            count += 1
            passed = time.perf_counter() - start
        return 1e3 * passed / count


if __name__ == "__main__":
    serve(Session())
