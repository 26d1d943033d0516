"""Prints the class with the highest score of each image; needs numpy and a package, and nothing else.

    python classify.py PACKAGE IMAGES [THREADS]

PACKAGE is a folder that `tvm_lowrank package BUNDLE --with-runtime` wrote. IMAGES is a .npy file of float32 images, as
the network takes them (NCHW, normalised). Where tvm_lowrank is installed, `tvm_lowrank.load(BUNDLE)` is shorter.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

FLOATS = ctypes.POINTER(ctypes.c_float)


class Model:
    """A package's compressed network as a function of float32 images (n, C, H, W); outputs are (n, classes)."""

    def __init__(self, package: str | Path, threads: int = 1) -> None:
        library = ctypes.CDLL(str(Path(package).resolve() / "lib" / "libtlr.so"))
        library.tlr_load.restype = ctypes.c_void_p
        library.tlr_error.restype = ctypes.c_char_p
        library.tlr_input_shape.restype = ctypes.POINTER(ctypes.c_int64)
        library.tlr_output_size.restype = ctypes.c_size_t
        for name in ("tlr_free", "tlr_input_shape", "tlr_output_size"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        library.tlr_run.argtypes = [ctypes.c_void_p, FLOATS, ctypes.c_size_t, FLOATS]
        self._library = library
        self._model = library.tlr_load(str(package).encode(), 0, threads)
        if not self._model:
            raise RuntimeError(library.tlr_error().decode())
        self.shape = tuple(library.tlr_input_shape(self._model)[:4])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.float32 or images.shape[1:] != self.shape[1:]:
            raise ValueError(f"expected float32 images (n, {self.shape[1:]}), not {images.dtype} {images.shape}")
        images = np.ascontiguousarray(images)
        scores = np.empty((len(images), self._library.tlr_output_size(self._model)), np.float32)
        status = self._library.tlr_run(
            self._model, images.ctypes.data_as(FLOATS), len(images), scores.ctypes.data_as(FLOATS)
        )
        if status:
            raise RuntimeError(self._library.tlr_error().decode())
        return scores

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.tlr_free(self._model)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} PACKAGE IMAGES [THREADS]")
    model = Model(sys.argv[1], threads=int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    print(*model(np.load(sys.argv[2])).argmax(axis=1), sep="\n")


if __name__ == "__main__":
    main()
