"""The bundle: the directory that is shipped, written piece by piece, read and run again.

``model.so`` (compressed) and ``dense.so`` have one function ``main(x)`` for a fixed batch; ``plan.json`` says what
became of every site; ``model.pt2`` and ``model.onnx`` are the compressed network for other tools;
``manifest.json`` (schema 1, written last) describes the rest (``accuracy`` and ``data`` are null if there was no data):

    schema, versions, model, target, budget (points), input_shape ([N, C, H, W] of the libraries),
    data: {source, mean, std, evaluation_sha256},
    accuracy (percent): {metric, n, dense, compressed, drop, ci95: [low, high], looks, on_device (of n)},
    latency_ms: {dense: {median, p10, p90, predicted}, compressed: {…}, threads, batch, how}, speedup,
    sites: [{id, method, rank, ms, dense_ms, macs, dense_macs, reason,
             offers: [{method, rank, ms, nats, measured, cost}]}],
    plans (of searches with data): [{plan (as in plan.json), fit, ms (sum of its sites), predicted, damage (nats),
             drop, error, expected (points: counted, their standard error, by the damage)}], in order of evaluation,
    seconds: {phase: s of the last run}, files: {name: SHA-256}
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tvm_lowrank.console import progress
from tvm_lowrank.data.metric import Metric
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import write_text

if TYPE_CHECKING:
    from tvm.runtime import Executable

SCHEMA = 1
MANIFEST = "manifest.json"
Which = Literal["model", "dense"]
PORTABLE = ("model.pt2", "model.onnx")
FILES = ("model.so", "dense.so", "plan.json", *PORTABLE)

# what a reader may rely on; `write_manifest` refuses a manifest without it
REQUIRED: dict[str, tuple[str, ...]] = {
    "schema": (),
    "model": (),
    "target": (),
    "versions": (),
    "budget": (),
    "input_shape": (),
    "data": ("source", "mean", "std", "evaluation_sha256"),
    "accuracy": ("metric", "n", "dense", "compressed", "drop", "ci95", "looks", "on_device"),
    "latency_ms": ("dense", "compressed", "threads", "batch", "how"),
    "speedup": (),
    "sites": (),
    "files": ("model.so",),
}
SITE_KEYS = ("id", "method", "rank", "ms", "dense_ms", "macs", "dense_macs", "reason")
PLAN_KEYS = {"plan": Mapping, "fit": str} | dict.fromkeys(
    ("ms", "predicted", "damage", "drop", "error", "expected"), Real
)
LARGEST = 1e300  # a plan's numbers are finite, and charts have room for them


def prepare_out(out: Path, *, force: bool = False) -> Path:
    """Make sure that a bundle can be written to ``out``, without touching what is there.

    Raises
    ------
    UserError
        If ``out`` is a file, holds something and ``force`` is not set, its parent is missing, or it is not writable.
    """
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist; create it or choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    try:
        out.mkdir(exist_ok=True)
        if any(out.iterdir()) and not force:
            raise UserError(f"{out} is not empty; use --force to overwrite a bundle there, or choose another --out")
        # permissions do not tell for certain (root, read-only file systems): try
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return out


def find_compiler(cc: str | None = None) -> str:
    """The C++ compiler that links libraries: ``cc``, or the one that TVM finds.

    Raises
    ------
    UserError
        If there is none.
    """
    from tvm.support.cc import get_cc

    compiler = cc or get_cc()
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        missing = compiler or "g++, clang++ or cc"
        raise UserError(f"no C++ compiler ({missing}) to link the library; install one, e.g. the package g++")
    return str(compiler)


def export_library(executable: Executable, path: Path, *, cc: str | None = None, options: Sequence[str] = ()) -> None:
    """Link a compiled module to the shared library ``path``; ``cc`` is the C++ compiler of the target.

    Raises
    ------
    UserError
        If no compiler is found, or linking or writing fails.
    """
    compiler = find_compiler(cc)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            linked = Path(folder) / path.name
            executable.export_library(str(linked), cc=compiler, options=list(options))
            os.replace(linked, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another --out") from error
    except RuntimeError as error:  # the compiler's output
        lines = str(error).strip().splitlines()
        why = next((line for line in lines if "error" in line.lower() and "Compilation error" not in line), lines[-1])
        raise UserError(f"{compiler} cannot link {path.name}: {why}; check the compiler") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a bundle contains."""
    packages = ("tvm_lowrank", "apache-tvm", "apache-tvm-ffi", "torch", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a manifest with its schema, versions and the files' hashes, write it, and return it.

    It is written last: a bundle with a manifest is a finished bundle.

    Raises
    ------
    ValueError
        If a key is missing or a number is not finite: a fault of the caller.
    UserError
        If the file cannot be written.
    """
    hashes = {name: sha256(out / name) for name in FILES if (out / name).is_file()}
    complete = {"versions": versions(), **manifest, "schema": SCHEMA, "files": hashes}
    missing = _missing_key(complete)
    if missing:
        raise ValueError(f"the manifest has no {missing}")
    text = json.dumps(complete, indent=2, sort_keys=True, allow_nan=False, default=_plain) + "\n"
    write_text(out / MANIFEST, text)
    return json.loads(text)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises
    ------
    UserError
        If there is no bundle, or it is incomplete, malformed or from a newer version.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"no such bundle: {directory}; give the folder that search wrote with --out")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {MANIFEST}; it is no bundle, or its search has not finished") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; restore it or run the search again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise UserError(f"{path} has no valid 'schema'; restore it or run the search again")
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}; update tvm_lowrank")
    missing = _missing_key(manifest)
    if missing:
        raise UserError(f"{path} has no {missing}; restore it or run the search again")
    shape = manifest["input_shape"]
    if not (isinstance(shape, list) and len(shape) == 4 and all(isinstance(d, int) and d > 0 for d in shape)):
        raise UserError(f"{path} has input_shape {shape!r}, not [N, C, H, W]; restore it or run the search again")
    if not (directory / "model.so").is_file():
        raise UserError(f"{directory} has no model.so; run the search again")
    return manifest


class CompiledModel:
    """A compiled library as a function of numpy arrays.

    Call it with float32 (n, C, H, W), any n >= 1: it runs the library as often as its fixed batch asks for and pads
    the last run. Returns the library's output, float32 (n, …).
    """

    def __init__(
        self, path: Path, input_shape: tuple[int, int, int, int], *, manifest: Mapping[str, Any] | None = None
    ) -> None:
        """``input_shape`` is the library's (N, C, H, W). Raises UserError if the library cannot be loaded."""
        self.path = path
        self.input_shape = input_shape
        self.manifest = dict(manifest or {})
        self._main = _open_library(path)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Raises UserError if ``x`` has another type or shape."""
        batch, *image = self.input_shape
        wanted = f"a float32 numpy array of shape (n, {', '.join(map(str, image))})"
        if not isinstance(x, np.ndarray):
            raise UserError(f"{self.path.name} takes {wanted}, not {type(x).__name__}; convert it first")
        if x.dtype != np.float32 or x.ndim != 4 or list(x.shape[1:]) != image or not len(x):
            raise UserError(f"{self.path.name} takes {wanted}, not {x.dtype} {x.shape}; convert it first")
        outputs = []
        for start in range(0, len(x), batch):
            part = np.ascontiguousarray(x[start : start + batch])
            missing = batch - len(part)
            padded = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else part
            outputs.append(self._main(padded)[: len(part)])
        return np.concatenate(outputs)


def load(directory: str | Path, *, which: Which = "model", threads: int | None = None) -> CompiledModel:
    """Load a bundle's compressed model, or with ``which="dense"`` the tuned original.

    ``threads`` sets the number of TVM's worker threads for the whole process; None leaves it as it is
    (``TVM_NUM_THREADS``, or one per core).

    Raises
    ------
    UserError
        If the bundle is incomplete, damaged, or built for another kind of machine.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    path = library(folder, manifest, which)
    if threads is not None:
        if threads < 1:
            raise UserError(f"{threads} threads are not possible; give at least 1")
        import tvm

        # TVM binds the calling thread to one core, and with it every thread that torch or numpy start later
        cores = os.sched_getaffinity(0)
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        os.sched_setaffinity(0, cores)
    batch, channels, height, width = manifest["input_shape"]
    return CompiledModel(path, (batch, channels, height, width), manifest=manifest)


def library(directory: Path, manifest: Mapping[str, Any], which: Which = "model") -> Path:
    """The path of one of a bundle's libraries, which is the file that the manifest describes.

    Raises
    ------
    UserError
        If it is missing or another file.
    """
    path = directory / f"{which}.so"
    if not path.is_file():
        raise UserError(f"{directory} has no {path.name}; run the search again")
    # the loader does not survive a truncated library: look before it does
    if sha256(path) != manifest["files"].get(path.name):
        raise UserError(f"{path} is not the file that {MANIFEST} describes; copy the bundle or run the search again")
    return path


def evaluate(
    model: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    metric: Metric,
    *,
    description: str = "accuracy",
    chunk: int = 64,
) -> np.ndarray:
    """The metric's score of each image, float64 (n,); ``model`` maps float32 (m, C, H, W) to outputs (m, …)."""
    scores = []
    with progress(description, len(images)) as advance:
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            scores.append(metric.scores(model(images[part]), labels[part]))
            advance(len(labels[part]))
    return np.concatenate(scores)


def _open_library(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import tvm
    import tvm_ffi
    from tvm import relax

    try:
        # The system's loader answers a path that it has seen in this process with the library that was there then,
        # even if another one has taken its place. A link with a new name makes it look (tvm.runtime.load_module
        # would resolve the link).
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / path.name
            link.symlink_to(path.resolve())
            machine = relax.VirtualMachine(tvm_ffi.load_module(str(link)), tvm.cpu())
        main = machine["main"]
    except Exception as error:  # TVM's errors have no common base; dlopen's are among them
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {path}: {first}; is it built for this kind of machine?") from error
    return lambda x: main(tvm.runtime.tensor(x)).numpy()


def _missing_key(manifest: Mapping[str, Any]) -> str | None:
    for key, inner in REQUIRED.items():
        if key not in manifest:
            return repr(key)
        if manifest[key] is None and key in ("accuracy", "data"):
            continue  # made without data
        for name in inner:
            if not isinstance(manifest[key], Mapping) or name not in manifest[key]:
                return f"{name!r} in {key!r}"
    sites = manifest["sites"]
    if not isinstance(sites, Sequence) or not all(isinstance(site, Mapping) for site in sites):
        return "list of 'sites'"
    for site in sites:
        for name in SITE_KEYS:
            if name not in site:
                return f"{name!r} in site {site.get('id', '?')!r}"
    plans = manifest.get("plans", [])  # not in every bundle
    if not isinstance(plans, list) or not all(isinstance(plan, Mapping) for plan in plans):
        return "list of 'plans'"
    for number, plan in enumerate(plans, 1):
        for name, kind in PLAN_KEYS.items():
            value = plan.get(name)
            if not isinstance(value, kind) or (isinstance(value, Real) and not abs(value) < LARGEST):
                return f"valid {name!r} in plan {number}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: object) -> Any:
    """numpy's scalars and paths as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a manifest")
