"""Which whole numbers stand for what a convolution in int8 reads: grids of least error on images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.calibrate import batches
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.formats import FLOAT32, FORMATS, Grid
from tvm_lowrank.graph import bindings, chain_of, is_site
from tvm_lowrank.precision import PLACEHOLDER, formats_of, grids_of, operand_formats, with_formats, with_grids

if TYPE_CHECKING:
    from tvm_lowrank.data.images import Images

IMAGES = 256  # that are looked at
EACH = 1024  # numbers of an image that an error is estimated by
SHARES = np.geomspace(1.0, 0.1, 24)  # of the range between the smallest and the largest


class _Seen:
    """A sample of the numbers in a variable, and the smallest and largest of all."""

    def __init__(self, seed: int) -> None:
        self.low, self.high = 0.0, 0.0
        self.sample: list[np.ndarray] = []
        self._rng = np.random.default_rng(seed)

    def __call__(self, values: Tensor) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        each = values.detach().reshape(len(values), -1)
        taken = torch.from_numpy(self._rng.integers(each.shape[1], size=min(EACH, each.shape[1])))
        self.sample.append(each[:, taken].numpy().ravel())

    def grid(self) -> Grid | None:
        """The grid of least error; None if there was nothing but 0, or what is no number."""
        if not np.isfinite([self.low, self.high]).all() or self.low == self.high:
            return None
        return least_error(np.concatenate(self.sample), self.low, self.high)


def least_error(sample: np.ndarray, low: float, high: float) -> Grid:
    """The grid with the least squared error of a sample, among those that reach over parts of low to high."""
    values = sample.astype("float32")
    grids = [Grid.over(share * low, share * high) for share in SHARES]
    return min(grids, key=lambda grid: float(np.mean(np.square(grid.rounded(values) - values), dtype="float64")))


@torch.no_grad()
def equalised(mod: IRModule, images: Images) -> IRModule:
    """The module in which the channels between the factors of chains in int8 are about equally large on images.

    What is between two factors may be scaled channel by channel, for nothing but them depends on it. With one grid for
    all channels, the error of their sum is least where all use the whole of it.
    """
    function = mod["main"]
    formats = operand_formats(function)
    convs = {b.var: b for b in bindings(function) if is_site(b.value)}
    pairs = {
        binding.var.name: before.name
        for binding in convs.values()
        if formats.get(binding.var.name, FORMATS[FLOAT32]).whole
        and (before := binding.value.args[0]) in convs
        and before.name != chain_of(before.name) == chain_of(binding.var.name)
    }
    if not pairs:
        return mod
    bridge = TorchBridge(with_formats(mod, dict.fromkeys(formats_of(function), FLOAT32)))
    squares: dict[str, Tensor] = {}

    def tap(name: str, inputs: Tensor, _outputs: Tensor) -> None:
        if name in pairs:
            squares[name] = squares.get(name, torch.zeros(())) + inputs.double().square().sum(dim=(0, 2, 3))

    for _, chunk in batches(images[:IMAGES]):
        bridge(chunk, tap)
    for name, before in pairs.items():
        size = squares[name].sqrt()
        size = torch.where(size > 0, size / size.max(), 1.0).float()
        first, second = (bridge.site_parameters(conv).weight for conv in (before, name))
        first.div_(size.reshape(-1, 1, 1, 1))
        groups = len(size) // second.shape[1]
        parts = second.reshape(groups, -1, *second.shape[1:])
        second.copy_((parts * size.reshape(groups, 1, -1, 1, 1)).reshape(second.shape))
    return with_formats(bridge.to_relax(), formats_of(function))


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
    bridge = TorchBridge(with_formats(mod, dict.fromkeys(formats_of(function), FLOAT32)))
    read = {b.var.name: b.value.args[0] for b in bindings(bridge.function) if b.var.name in names}
    seen: dict[relax.Var, _Seen] = {}
    for var in read.values():
        seen.setdefault(var, _Seen(seed))
    for _, chunk in batches(images[:IMAGES]):
        bridge(chunk, watch=list(seen.items()))
        advance(len(chunk))
    grids = {var: own.grid() for var, own in seen.items()}
    found = {name: grids[var] or (PLACEHOLDER if any_will_do else None) for name, var in read.items()}
    return with_grids(mod, {name: grid for name, grid in found.items() if grid is not None})
