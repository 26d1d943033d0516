"""Which whole numbers stand for what a convolution in int8 reads: grids of least error on images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.calibrate import batches
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.formats import Grid
from tvm_lowrank.graph import bindings, chain_of
from tvm_lowrank.precision import (
    PLACEHOLDER,
    formats_of,
    grids_of,
    operand_formats,
    with_formats,
    with_grids,
    without_formats,
)

if TYPE_CHECKING:
    from tvm_lowrank.data.images import Images

IMAGES = 256  # that are looked at
EACH = 1024  # numbers of an image that an error is estimated by
SMALLEST = 1 / 64  # size of a channel, relative to the largest one: images that were not seen may have more in it
SHARES = np.geomspace(1.0, 0.1, 24)  # of the range between the smallest and the largest


class _Seen:
    """A sample of the numbers in a variable (N, C, H, W), and the smallest and largest of each channel.

    ``inside`` says whether it is between the factors of a chain.
    """

    def __init__(self, seed: int, *, inside: bool) -> None:
        self.inside = inside
        self.low, self.high, self.squares = np.zeros(1), np.zeros(1), np.zeros(1)  # by channel
        self.sample: list[np.ndarray] = []  # (C, numbers)
        self._rng = np.random.default_rng(seed)

    def __call__(self, values: Tensor) -> None:
        channels = values.detach().transpose(0, 1).flatten(1).numpy()
        self.low = np.minimum(self.low, channels.min(axis=1))
        self.high = np.maximum(self.high, channels.max(axis=1))
        self.squares = self.squares + np.square(channels, dtype="float64").sum(axis=1)
        count = channels.shape[1]
        wanted = max(1, min(count, EACH * len(values) // len(channels)))
        self.sample.append(channels[:, self._rng.integers(count, size=wanted)])

    def grid(self) -> Grid | None:
        """The grid of least error; None if there was nothing but 0, or what is no number.

        Between two factors any scale of a channel is free, for nothing else depends on it. With one grid for all of
        them, the error of their sum is least where all are equally large.
        """
        if not np.isfinite([*self.low, *self.high]).all() or not np.any(self.low < self.high):
            return None
        sample = np.concatenate(self.sample, axis=1)
        if not self.inside:
            return least_error(sample, float(self.low.min()), float(self.high.max()))
        sizes = np.sqrt(self.squares)
        sizes = np.maximum(sizes / sizes.max(), SMALLEST).astype("float32")
        low, high = (self.low / sizes).min(), (self.high / sizes).max()
        return replace(least_error(sample / sizes[:, None], float(low), float(high)), channels=tuple(sizes.tolist()))


def least_error(sample: np.ndarray, low: float, high: float) -> Grid:
    """The grid with the least squared error of a sample, among those that reach over parts of low to high."""
    values = sample.astype("float32")
    grids = [Grid.over(share * low, share * high) for share in SHARES]
    return min(grids, key=lambda grid: float(np.mean(np.square(grid.rounded(values) - values), dtype="float64")))


@torch.no_grad()
def calibrated(
    mod: IRModule,
    images: Images,
    *,
    names: Collection[str] | None = None,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> IRModule:
    """The module with grids for convolutions in int8, of least error on the first images (float32 NCHW).

    What is looked at is the network in float32. ``names`` are the convolutions, of which those get no grid that read
    nothing but 0, or what is no number; None are those in int8 that have no grid yet, which get one in any case. Where
    there are none, the module stays as it is.
    """
    function, any_will_do = mod["main"], names is None
    if names is None:
        whole = [name for name, format in operand_formats(function).items() if format.whole]
        names = set(whole) - set(grids_of(function)) if whole else ()
    if not names:
        return mod
    bridge = TorchBridge(without_formats(mod))
    read = {b.var.name: b.value.args[0] for b in bindings(bridge.function) if b.var.name in names}
    seen: dict[relax.Var, _Seen] = {}
    for name, var in read.items():
        inside = var.name != chain_of(var.name) == chain_of(name)
        seen.setdefault(var, _Seen(seed, inside=inside))
    for _, chunk in batches(images[:IMAGES]):
        bridge(chunk, watch=list(seen.items()))
        advance(len(chunk))
    grids = {var: own.grid() for var, own in seen.items()}
    found = {name: grids[var] or (PLACEHOLDER if any_will_do else None) for name, var in read.items()}
    return with_grids(mod, {name: grid for name, grid in found.items() if grid is not None})


@torch.no_grad()
def folded(mod: IRModule) -> IRModule:
    """The module with the scales of the channels between factors in the factors' weights, so that grids have one scale.

    What it computes stays; formats of other tools have one scale for what a convolution reads.
    """
    function = mod["main"]
    grids = {name: grid for name, grid in grids_of(function).items() if grid.channels}
    if not grids:
        return mod
    before = {b.var.name: b.value.args[0].name for b in bindings(function) if b.var.name in grids}
    bridge = TorchBridge(without_formats(mod))
    for name, grid in grids.items():
        first, second = (bridge.site_parameters(conv).weight for conv in (before[name], name))
        alone = replace(grid, scale=1.0)
        first.div_(torch.from_numpy(alone.scales).reshape(-1, 1, 1, 1))
        second.mul_(torch.from_numpy(alone.by_input(second.shape)))
    scalar = {name: replace(grid, channels=()) for name, grid in grids.items()}
    return with_grids(with_formats(bridge.to_relax(), formats_of(function)), scalar)
