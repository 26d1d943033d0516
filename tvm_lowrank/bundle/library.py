"""A bundle's libraries, run again: as functions of numpy arrays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tvm_lowrank.bundle.manifest import MANIFEST, read_manifest, sha256
from tvm_lowrank.codegen.processor import check, missing, read
from tvm_lowrank.data.parts import joined, take
from tvm_lowrank.errors import UserError
from tvm_lowrank.tensors import Tensors, as_arrays

Which = Literal["model", "dense"]


class CompiledModel:
    """A compiled library as a function of numpy arrays.

    Call it with float32 (n, C, H, W), or a tuple of the network's inputs (n, …), any n >= 1: it runs the library as
    often as its fixed batch asks for and pads the last run. Returns the library's output, float32 (n, …); a tuple of
    them where the network has several.
    """

    def __init__(
        self, path: Path, input_shape: tuple[int, int, int, int], *, manifest: Mapping[str, Any] | None = None
    ) -> None:
        """``input_shape`` is the library's (N, C, H, W). Raises UserError if the library cannot be loaded or run.

        The manifest's ``inputs`` are those of several of the network, which the library takes as one.
        """
        self.path = path
        self.input_shape = input_shape
        self.manifest = dict(manifest or {})
        self._main = _open_library(path)

    def __call__(self, x: np.ndarray | Sequence[np.ndarray]) -> Any:
        """Raises UserError if ``x`` has another type or shape."""
        batch, *image = self.input_shape
        shapes = tuple(tuple(shape) for shape in self.manifest.get("inputs", ()))
        if shapes and isinstance(x, tuple | list):
            x = self._joined(x, Tensors(shapes))
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
            outputs.append(take(self._main(padded), slice(len(part))))
        return joined(outputs)

    def _joined(self, given: Sequence[np.ndarray], inputs: Tensors) -> Any:
        """The network's inputs as what the library takes."""
        found = [(x.dtype, x.shape[1:]) if isinstance(x, np.ndarray) else (None, ()) for x in given]
        if found != [(np.dtype("float32"), shape) for shape in inputs.shapes] or len({len(x) for x in given}) != 1:
            raise UserError(f"{self.path.name} takes {inputs} in float32, of as many images each; convert them first")
        return inputs.images(given)


def load(directory: str | Path, *, which: Which = "model", threads: int | None = None) -> CompiledModel:
    """Load a bundle's compressed model, or with ``which="dense"`` the tuned original.

    ``threads`` sets the number of TVM's worker threads for the whole process; None leaves it as it is
    (``TVM_NUM_THREADS``, or one per core).

    Raises
    ------
    UserError
        If the bundle is incomplete, damaged, or built for another kind of machine; where only features of the
        processor are missing, it names them.
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


def level(directory: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The best of a bundle's levels that this processor can run, as in the manifest; the last one if it can run none.

    A bundle for one target is its only level. One whose libraries were deleted is passed over.
    """
    levels = manifest.get("levels") or [{"target": manifest["target"], "folder": ""}]
    there = [level for level in levels if (directory / level["folder"] / "model.so").is_file()] or levels[-1:]
    for level in there[:-1]:
        needs = read(directory / level["folder"] / "model.so")
        if needs is None or not missing(needs):
            return level
    return there[-1]


def library(directory: Path, manifest: Mapping[str, Any], which: Which = "model") -> Path:
    """The path of one of a bundle's libraries, of its best level for this processor.

    Raises
    ------
    UserError
        If it is missing, or not the file that the manifest describes.
    """
    return described(directory, manifest, str(Path(level(directory, manifest)["folder"], f"{which}.so")))


def described(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of a library in a bundle, which is the file that the manifest describes.

    Raises
    ------
    UserError
        If it is missing or another file.
    """
    path = directory / name
    if not path.is_file():
        raise UserError(f"{directory} has no {name}; run the search again")
    # the loader does not survive a truncated library: look before it does
    if sha256(path) != manifest["files"].get(name):
        raise UserError(f"{path} is not the file that {MANIFEST} describes; copy the bundle or run the search again")
    return path


def _open_library(path: Path) -> Callable[[np.ndarray], Any]:
    import tvm
    import tvm_ffi
    from tvm import relax

    check(path)
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
    return lambda x: as_arrays(main(tvm.runtime.tensor(x)))
