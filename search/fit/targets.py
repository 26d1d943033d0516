"""What the dense network computes at every site, for compressed ones to be fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tvm import relax

from tvm_lowrank.bridge.calibrate import batches, positions_of, sample_positions, sample_values
from tvm_lowrank.bridge.epilogue import epilogue, rivals
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.graph import Site
from tvm_lowrank.searching.fit import waiting
from tvm_lowrank.searching.fit.waiting import Rows, Scratch


@dataclass(frozen=True, eq=False)
class Target:
    """What the dense network computes at a site's sampled positions.

    ``outputs`` (g, samples, N/g) is before the bias; ``addend`` (samples, N) is the other operand of the residual
    addition, and ``floor`` (samples, N) the largest rival in the window of the max-pool, where there are such.
    """

    outputs: Tensor
    addend: Tensor | None = None
    floor: Tensor | None = None


class Targets(Mapping[str, Target]):
    """The targets of sites by their ids, which wait until one is asked for."""

    def __init__(self, sites: Sequence[Site], images: int, folder: Path | None) -> None:
        self._groups = {site.id: site.spec.groups for site in sites}
        self._scratch = Scratch(folder)
        sampled = (positions_of(s.spec, s.spec.output_size(s.size), images) * s.spec.out_channels for s in sites)
        self._in_memory = 4 * images * sum(sampled) <= waiting.IN_MEMORY
        self._rows: dict[tuple[str, str], Rows] = {}

    def add(self, name: str, what: str, values: Tensor) -> None:
        """Append samples of one of a target's fields, (n, N)."""
        if (name, what) not in self._rows:
            self._rows[name, what] = Rows(None if self._in_memory else self._scratch.new_path())
        self._rows[name, what].add(values)

    def __getitem__(self, name: str) -> Target:
        outputs, addend, floor = (self._rows.get((name, what)) for what in ("outputs", "addend", "floor"))
        if outputs is None:
            raise KeyError(name)
        return Target(
            split(outputs.read(), self._groups[name]),
            None if addend is None else addend.read(),
            None if floor is None else floor.read(),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


@torch.no_grad()
def dense_outputs(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    seed: int = 0,
    folder: Path | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> Targets:
    """The target of each site of a dense network over the images (float32 NCHW).

    ``folder`` is where they wait; ``advance`` is called with the number of images done after each batch.
    """
    wanted = {site.id: site for site in sites}
    targets = Targets(sites, len(images), folder)
    start = 0

    def record(name: str, what: str, values: Tensor) -> None:
        size = (values.shape[2], values.shape[3])
        draws = positions_of(wanted[name].spec, size, len(images))
        rows, cols = sample_positions(name, start, len(values), size, seed, draws=draws)
        targets.add(name, what, sample_values(values, rows, cols))

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name in wanted:
            record(name, "outputs", outputs)

    def record_rivals(name: str, window: tuple[int, int], values: Tensor) -> None:
        record(name, "floor", rivals(values, window))

    watch: list[tuple[relax.Var, Callable[[Tensor], None]]] = []
    for name in wanted:
        after = epilogue(bridge.function, name)
        if after.residual is not None:
            watch.append((after.residual, partial(record, name, "addend")))
        if after.window is not None:
            watch.append((after.result, partial(record_rivals, name, after.window)))
    for start, chunk in batches(images):  # noqa: B007 - the taps read it
        bridge(chunk, tap=tap, watch=watch)
        advance(len(chunk))
    return targets


def split(values: Tensor, groups: int) -> Tensor:
    """(samples, N) as (groups, samples, N/groups)."""
    return values.reshape(len(values), groups, -1).transpose(0, 1)
