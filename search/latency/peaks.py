"""What a device can do at most, measured with the kernels that come nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, te

from tvm_lowrank.codegen.lower import kernels, lower
from tvm_lowrank.codegen.schedule import workload
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.formats import FLOAT32
from tvm_lowrank.precision import PLACEHOLDER, with_formats, with_grids
from tvm_lowrank.searching.latency.tiles import register_tiles
from tvm_lowrank.searching.measure.bench import Bench, Devices, Job, TrialError
from tvm_lowrank.targets.profile import Profile

ROWS, DEPTH, COLUMNS = 96, 128, 64  # of a matrix product, rows for each thread: 100 kB of operands
TILES = 6  # the most promising register tiles; on some processors the first one is not the best
ADDED = (1302, 4096)  # two such tensors and their sum are 64 MB, more than caches hold
SECONDS = 0.1  # for each kernel


@dataclass(frozen=True)
class Peaks:
    """What a device can do in a second.

    ``gflops``: 10⁹ additions and multiplications, by number format; ``gb_per_s``: 10⁹ bytes read and written.
    """

    gflops: Mapping[str, float]
    gb_per_s: float

    def ms(self, *, products: Mapping[str, int], moved: float) -> float:
        """The roofline: milliseconds below which these MACs and bytes cannot be done out of the caches.

        ``products`` has the MACs by number format.
        """
        arithmetic = sum(2 * macs / self.gflops[format] for format, macs in products.items())
        return 1e-6 * max(arithmetic, moved / self.gb_per_s)


def measure_peaks(devices: Devices, profile: Profile, formats: Sequence[str], *, threads: int) -> Peaks:
    """Peaks of one of the devices with so many threads, each the best of many samples; float32's in any case.

    Raises
    ------
    MeasurementError
        If the kernels cannot be compiled or run there.
    """
    rows = ROWS * threads
    flops, moved = 2 * rows * DEPTH * COLUMNS, 4 * 3 * ADDED[0] * ADDED[1]

    def work(bench: Bench, _: None) -> Peaks:
        gflops = {}
        for format in dict.fromkeys((FLOAT32, *formats)):
            bench.forget()
            gflops[format] = 1e-9 * flops / _fastest(bench, _products(rows, profile, format))
        bench.forget()
        return Peaks(gflops, 1e-9 * moved / _fastest(bench, [_sum()]))

    with closing(devices.each([None], work)) as results:
        return next(results)


def _fastest(bench: Bench, jobs: Sequence[Job]) -> float:
    """Seconds of the fastest of some jobs that do the same."""
    samples: list[float] = []
    failure: TrialError | None = None
    for built in bench.build(jobs):
        try:
            if isinstance(built, TrialError):
                raise built
            samples += bench.time(built, SECONDS)
        except TrialError as error:
            failure = error
    if not samples:
        raise MeasurementError(f"the peaks of the device cannot be measured: {failure}") from failure
    return min(samples)


def _products(rows: int, profile: Profile, format: str) -> list[Job]:
    """A matrix product with several register tiles: the kernel of a 1x1 convolution."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((1, DEPTH, 1, rows), FLOAT32))
    weights = np.random.default_rng(0).standard_normal((COLUMNS, DEPTH, 1, 1)).astype(FLOAT32)
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(relax.op.nn.conv2d(x, relax.const(weights)), name_hint="product")
            result = builder.emit_output(product)
        builder.emit_func_output(result)
    mod = with_grids(with_formats(builder.get(), {"product": format}), {"product": PLACEHOLDER})
    [func] = [kernel.func for kernel in kernels(lower(mod, batch=1, target=profile.tvm_target())) if kernel.is_conv]
    space = workload(func)
    assert space is not None
    tiles = register_tiles(space, lanes=profile.lanes, registers=profile.registers)
    return [Job(func, tiling) for tiling in tiles[:TILES]]


def _sum() -> Job:
    """The sum of two tensors that no cache holds."""
    a, b = (te.placeholder(ADDED, name=name) for name in "ab")
    total = te.compute(ADDED, lambda i, j: a[i, j] + b[i, j], name="c")
    return Job(tvm.IRModule({"main": te.create_prim_func([a, b, total])}), None)
