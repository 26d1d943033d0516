"""Is a device as fast as it was? If it is hot or has other work, its numbers are no match for its earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import tvm
from tvm import te

from tvm_lowrank import console
from tvm_lowrank.codegen.schedule import default_tiling, target_lanes, workload
from tvm_lowrank.searching.measure.bench import Job

REFERENCE_SIZE = 192  # of a matrix product: a millisecond on a slow core, and enough work for all of them
REFERENCE_SECONDS = 0.1
HOT = 0.10  # slower than at its best by this much
COOLING = 10.0  # seconds between two looks at a slow device
LOOK = 30.0  # seconds between two looks at a device's speed


class Device(Protocol):
    """What has a speed: ``reference`` is the reference kernel's best time in seconds, infinite at first."""

    name: str
    reference: float


def settle(
    device: Device, measure: Callable[[], float], *, limit: float, pause: Callable[[float], object] = time.sleep
) -> None:
    """Wait, at most ``limit`` seconds, until what `measure` returns is near the least that it ever was there."""
    waited = 0.0
    while True:
        seconds = measure()
        slower = seconds / min(device.reference, seconds) - 1
        if slower <= HOT:
            device.reference = min(device.reference, seconds)
            return
        if waited >= limit:
            console.warn(f"{device.name} is still {slower:.0%} slower than at its best; going on all the same")
            device.reference = seconds  # the new normal: waiting before every kernel would be in vain
            return
        if not waited:
            console.warn(f"{device.name} is {slower:.0%} slower than at its best (hot, or busy); waiting")
        pause(min(COOLING, limit))
        waited += COOLING


def reference_job(target: tvm.target.Target) -> Job:
    """A matrix product that always takes the same time on a device, unless it is throttled or busy."""
    a, b = (te.placeholder((REFERENCE_SIZE, REFERENCE_SIZE), name=name) for name in "ab")
    k = te.reduce_axis((0, REFERENCE_SIZE), name="k")
    product = te.compute((REFERENCE_SIZE, REFERENCE_SIZE), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="c")
    func = tvm.IRModule({"main": te.create_prim_func([a, b, product])})
    space = workload(func)
    assert space is not None
    return Job(func, default_tiling(space, target_lanes(target)))
