"""From kernels to the whole network: what a library takes beyond the sum of its kernels.

A kernel is tuned and timed again and again on the same operands, so it finds them in the caches. In the network its
weights and its input come from farther away, and every call costs something. How much is fitted to the libraries that
were measured end to end on the target; without any, it is nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from tvm_lowrank.codegen.lower import Kernel
from tvm_lowrank.errors import UserError

FILE = "networks.jsonl"
MEGABYTE = 1e6
DOUBT = 0.01  # how much a coefficient of one (ms for a megabyte or a hundred calls) counts against the relative errors
CACHED = 0.5  # megabytes of a kernel's activations that the one before it leaves in the caches
MOST = 50  # libraries that are learnt from: the last ones


@dataclass(frozen=True)
class Traffic:
    """What kernels fetch and cause: see the fields.

    ``weights`` : megabytes of constants.
    ``activations`` : megabytes of other operands, of each kernel those beyond what stays in the caches.
    ``calls`` : hundreds of calls.
    """

    weights: float
    activations: float
    calls: float

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Traffic:
        """That of kernels that are called one after the other."""
        weights = activations = calls = 0.0
        for kernel in kernels:
            constants, operands = operand_bytes(kernel)
            weights += constants / MEGABYTE
            activations += max(0.0, operands / MEGABYTE - CACHED)
            calls += 0.01
        return cls(weights, activations, calls)


@lru_cache(maxsize=4096)
def operand_bytes(kernel: Kernel) -> tuple[int, int]:
    """Of the constants among a kernel's operands, and of the others."""
    main = kernel.func["main"]
    constant = {int(i) for i in (main.attrs or {}).get("layout_free_buffers", ())}
    sizes = [prod(map(int, p.shape)) * np.dtype(str(p.dtype)).itemsize for p in main.params]
    constants = sum(size for i, size in enumerate(sizes) if i in constant)
    return constants, sum(sizes) - constants


@dataclass(frozen=True)
class Measured:
    """A library: the sum of its kernels' ms, its median ms end to end, and its traffic."""

    kernels_ms: float
    whole_ms: float
    traffic: Traffic


def fit(libraries: Sequence[Measured]) -> np.ndarray:
    """Milliseconds for each unit of `Traffic`, none negative, that explain the libraries best in relative error."""
    if not libraries:
        return np.zeros(3)
    whole = np.array([library.whole_ms for library in libraries])
    rows = np.array([astuple(library.traffic) for library in libraries]) / whole[:, None]
    missing = (whole - [library.kernels_ms for library in libraries]) / whole
    # little doubt, but enough that one network does not make up three coefficients
    coefficients, _ = nnls(np.vstack([rows, DOUBT * np.eye(3)]), np.concatenate([missing, np.zeros(3)]))
    return np.asarray(coefficients)


class WholeNetworks:
    """The libraries that were measured on a target, on disk, and what they say about others.

    Parameters
    ----------
    folder
        The target's, beside its kernels. Several processes may use it.

    Raises
    ------
    UserError
        If the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.libraries: list[Measured] = []
        if self.path.exists():
            # a process that was killed may have left the last line unfinished
            complete, _, _ = self.path.read_bytes().rpartition(b"\n")
            self.libraries = [self._parse(line) for line in complete.splitlines()]
        self.coefficients = fit(self.libraries[-MOST:])

    def beyond(self, kernels: Iterable[Kernel]) -> float:
        """Milliseconds that kernels take in a network beyond what they take alone."""
        return float(self.coefficients @ astuple(Traffic.of(kernels)))

    def add(self, library: Measured) -> None:
        """Remember a measurement and learn from it, once: a resumed search knows it already."""
        if library in self.libraries:
            return
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(asdict(library)).encode() + b"\n")
        self.libraries.append(library)
        self.coefficients = fit(self.libraries[-MOST:])

    def _parse(self, line: bytes) -> Measured:
        try:
            entry = json.loads(line)
            traffic = Traffic(**{name: float(value) for name, value in entry["traffic"].items()})
            return Measured(float(entry["kernels_ms"]), float(entry["whole_ms"]), traffic)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete the file") from error
