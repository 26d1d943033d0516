"""What a device can do at most, measured with the kernels that come nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import tvm
from tvm import te

from tvm_lowrank.codegen.schedule import workload
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.searching.latency.tiles import register_tiles
from tvm_lowrank.searching.measure.bench import Bench, Devices, Job, TrialError
from tvm_lowrank.targets.profile import Profile

ROWS, DEPTH, COLUMNS = 96, 128, 64  # of a matrix product, rows for each thread: 100 kB of operands
TILES = 6  # the most promising register tiles; on some processors the first one is not the best
ADDED = (1302, 4096)  # two such tensors and their sum are 64 MB, more than caches hold
SECONDS = 0.1  # for each kernel


@dataclass(frozen=True)
class Peaks:
    """``gflops``: 10⁹ additions and multiplications in a second; ``gb_per_s``: 10⁹ bytes read and written in one."""

    gflops: float
    gb_per_s: float

    def ms(self, *, flops: float, moved: float) -> float:
        """The roofline: milliseconds below which these operations and bytes cannot be done out of the caches."""
        return 1e-6 * max(flops / self.gflops, moved / self.gb_per_s)


def measure_peaks(devices: Devices, profile: Profile, *, threads: int) -> Peaks:
    """Peaks of one of the devices with so many threads, each the best of many samples.

    Raises
    ------
    MeasurementError
        If the kernels cannot be compiled or run there.
    """
    rows = ROWS * threads
    flops, moved = 2 * rows * DEPTH * COLUMNS, 4 * 3 * ADDED[0] * ADDED[1]

    def work(bench: Bench, _: None) -> Peaks:
        bench.forget()
        seconds = _fastest(bench, _products(rows, profile))
        bench.forget()
        return Peaks(1e-9 * flops / seconds, 1e-9 * moved / _fastest(bench, [_sum()]))

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


def _products(rows: int, profile: Profile) -> list[Job]:
    """A matrix product with several register tiles."""
    a, b = te.placeholder((rows, DEPTH), name="a"), te.placeholder((DEPTH, COLUMNS), name="b")
    k = te.reduce_axis((0, DEPTH), name="k")
    product = te.compute((rows, COLUMNS), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="c")
    func = tvm.IRModule({"main": te.create_prim_func([a, b, product])})
    space = workload(func)
    assert space is not None
    tiles = register_tiles(space, lanes=profile.lanes, registers=profile.registers)
    return [Job(func, tiling) for tiling in tiles[:TILES]]


def _sum() -> Job:
    """The sum of two tensors that no cache holds."""
    a, b = (te.placeholder(ADDED, name=name) for name in "ab")
    total = te.compute(ADDED, lambda i, j: a[i, j] + b[i, j], name="c")
    return Job(tvm.IRModule({"main": te.create_prim_func([a, b, total])}), None)
