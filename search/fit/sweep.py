"""Images on their way through a network whose sites are replaced one after another, in network order.

What a site sees depends on the sites before it only. So the images are not sent through the whole network for each of
them: they wait, in what is alive there, at a place where little is, and go on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tvm import relax

from tvm_lowrank.bridge.calibrate import batches, positions_of, sample_columns, sample_positions, sample_values
from tvm_lowrank.bridge.torch_bridge import State, TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.graph import Site
from tvm_lowrank.searching.fit.waiting import Shelf

MOST_REPEATED = 0.1  # of the network's MACs: what is computed again for each site; for more, a wider place is taken


class Sweep:
    """A way through a network, from site to site.

    Parameters
    ----------
    bridge, sites : the network, and all its sites.
    images : float32 NCHW.
    folder : where images may wait; None is the system's place for temporary files.
    check : called before each batch; what it raises ends the sweep.
    """

    def __init__(
        self,
        bridge: TorchBridge,
        sites: Sequence[Site],
        images: Images,
        *,
        folder: Path | None = None,
        seed: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._bridge, self._images, self._seed, self._check = bridge, images, seed, check
        macs = {bridge.position(site.id): site.macs for site in sites}
        self._macs = [0, *accumulate(macs.get(position, 0) for position in range(bridge.length))]  # before each step
        self._widths = bridge.widths()
        self._instead: dict[str, Callable[[Tensor], Tensor]] = {}
        self._place = 0  # of the waiting images: steps that they have done
        self._folder = folder
        self._waiting: Shelf[State] = Shelf(folder)

    def replace(self, site: str, compute: Callable[[Tensor], Tensor]) -> None:
        """From now on a site is computed by this function, of its input and without its bias."""
        self._instead[site] = compute

    @torch.no_grad()
    def columns(self, site: Site, residual: relax.Var | None = None) -> tuple[Tensor, Tensor | None]:
        """What a site, not yet replaced, multiplies at its sampled positions, and what is added to its output there.

        Returns the columns (g, samples, D) and the values (samples, N) of the variable `residual`, if one is named.
        Sites are asked for in network order.
        """
        size = site.spec.output_size(site.size)
        depth = int(np.prod(site.spec.weight_shape[1:]))
        draws = positions_of(site.spec, size, len(self._images))
        samples = len(self._images) * draws
        columns = torch.empty(site.spec.groups, samples, depth)
        addends = None if residual is None else torch.empty(samples, site.spec.out_channels)
        for start, count, state in self._arrived(self._bridge.position(site.id)):
            rows, cols = sample_positions(site.id, start, count, size, self._seed, draws=draws)
            own = slice(start * draws, (start + count) * draws)

            def tap(name: str, inputs: Tensor, _: Tensor, own: slice = own, at: tuple = (rows, cols)) -> None:
                if name == site.id:
                    columns[:, own] = sample_columns(inputs, site.spec, *at)

            if residual is None or addends is None:
                self._bridge.resume(state, state.position + 1, tap=tap)
            else:
                values = self._bridge.value(state, residual, instead=self._instead, tap=tap)
                addends[own] = sample_values(values, rows, cols)
        return columns, addends

    def _arrived(self, position: int) -> Iterator[tuple[int, int, State]]:
        """The number of the first image, how many there are, and what is alive before a step, batch by batch."""
        place = self._next_place(position)
        moved: Shelf[State] = Shelf(self._folder)
        for start, chunk in batches(self._images):
            self._check()
            state = self._bridge.start(chunk) if self._place == 0 else _tensors(self._waiting[str(start)])
            if place > self._place:
                state = self._bridge.resume(state, place, instead=self._instead)
                moved.put(str(start), _arrays(state))
            yield start, len(chunk), self._bridge.resume(state, position, instead=self._instead)
        if place > self._place:
            self._place, self._waiting = place, moved

    def _next_place(self, position: int) -> int:
        """The narrowest place from which little is computed again before a step; the last of several."""
        most = MOST_REPEATED * self._macs[-1]
        near = (p for p in range(self._place, position + 1) if self._macs[position] - self._macs[p] <= most)
        return min(near, key=lambda p: (self._widths[p], -p))


def _arrays(state: State) -> State:
    """Tensors as arrays, which are quickly put into files; images as NHWC, for so they lie."""
    values = {slot: _array(value) if isinstance(value, Tensor) else value for slot, value in state.values.items()}
    return replace(state, values=values)


def _array(value: Tensor) -> np.ndarray:
    return (value.permute(0, 2, 3, 1) if value.dim() == 4 else value).numpy()


def _tensors(state: State) -> State:
    values = {slot: _tensor(value) if isinstance(value, np.ndarray) else value for slot, value in state.values.items()}
    return replace(state, values=values)


def _tensor(array: np.ndarray) -> Tensor:
    value = torch.from_numpy(array)
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value
