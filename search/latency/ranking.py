"""Which schedules are worth a trial on a target, learnt from all trials that were made on it.

`tvm_lowrank.searching.latency.tiles` ranks tiles by a simple count of instructions, which knows nothing of caches and
of what a processor finds hard. Gradient-boosted trees (xgboost) learn from measured trials by how much each schedule is
slower than the best one of its kernel; what they learnt on other shapes ranks the schedules of a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, log2, prod

import numpy as np
import xgboost

from tvm_lowrank.codegen.schedule import Tiling, Workload
from tvm_lowrank.codegen.units import UNITS
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.searching.latency.tiles import register_tiles, tile_cost, variants

LEAST = 8  # kernels before the trees are better than the count of instructions
MOST = 400  # kernels that are learnt from: the last ones
GROWTH = 1.25  # learn again when there are so many times more
ROUNDS = 150
WORST = 2.0  # a schedule that is slower than this is as bad as any
ALIKE = 2  # schedules of one tile that may be among the first
TILES = 60  # the best by count of instructions; the others are not considered
PARAMETERS = {"max_depth": 6, "eta": 0.1, "subsample": 0.8, "min_child_weight": 2, "nthread": 1, "verbosity": 0}

Trials = Mapping[Tiling, float]
"""Schedules of one kernel, and their milliseconds."""


def features(space: Workload, tiling: Tiling, lanes: int) -> list[float]:
    """What the trees see of a schedule: its tile, how often it is repeated and what it reads meanwhile."""
    *positions, channels = tiling.tile
    count, vectors = prod(positions), channels // tiling.vector
    reduction, inner = prod(space.reduction), space.reduction[-1]
    channel_tiles = space.spatial[-1] // channels
    position_tiles = prod(space.spatial[:-1]) // count
    return [
        count,
        vectors,
        count * vectors,
        tiling.vector / lanes,
        positions[-1] if positions else 1,
        tile_cost(tiling, space, lanes),
        tiling.channels_first,
        tiling.stripe,
        log2(channel_tiles),
        log2(position_tiles),
        log2(reduction),
        log2(inner),
        reduction / inner,
        log2(reduction * channels),  # weights of a tile
        log2(reduction * space.spatial[-1]),  # all weights
        log2(inner * prod(space.spatial[:-1])),  # about the input
        space.padded,
        space.channelwise,
        space.group / space.spatial[-1],
        FORMATS[space.format].bytes,
        UNITS[tiling.unit].depth if tiling.unit else 1,
        UNITS[tiling.unit].rows if tiling.unit else 1,
    ]


class Ranking:
    """An order of the schedules of any kernel, for a target with these vectors."""

    def __init__(self, *, lanes: int, registers: int) -> None:
        self.lanes, self.registers = lanes, registers
        self._learnt = 0
        self._trees: xgboost.Booster | None = None

    def learn(self, kernels: Sequence[tuple[Workload, Trials]], *, seed: int = 0) -> None:
        """Learn from measured kernels, unless there are hardly more of them than the last time."""
        if len(kernels) < max(LEAST, GROWTH * self._learnt):
            return
        rows, labels = [], []
        for space, trials in kernels[-MOST:]:
            best = min(trials.values())
            for tiling, ms in trials.items():
                rows.append(features(space, tiling, self.lanes))
                labels.append(min(log(ms / best), log(WORST)))
        data = xgboost.DMatrix(np.array(rows, np.float32), label=np.array(labels))
        self._trees = xgboost.train({**PARAMETERS, "seed": seed}, data, ROUNDS)
        self._learnt = len(kernels)

    def best(self, space: Workload, limit: int) -> list[Tiling]:
        """At most ``limit`` schedules, the most promising first; none if too little was learnt to say."""
        if self._trees is None:
            return []
        tiles = register_tiles(space, lanes=self.lanes, registers=self.registers)[:TILES]
        pool = list(dict.fromkeys(t for tiling in tiles for t in (tiling, *variants(tiling, space))))
        taken: dict[tuple[int, ...], int] = {}
        found = []
        for tiling in self.order(space, pool):
            if taken.get(tiling.tile, 0) < ALIKE:
                taken[tiling.tile] = taken.get(tiling.tile, 0) + 1
                found.append(tiling)
        return found[:limit]

    def order(self, space: Workload, tilings: Sequence[Tiling]) -> list[Tiling]:
        """These schedules, the most promising first; as they are if too little was learnt to say."""
        if self._trees is None or not tilings:
            return list(tilings)
        rows = np.array([features(space, tiling, self.lanes) for tiling in tilings], np.float32)
        slower = self._trees.predict(xgboost.DMatrix(rows))
        return [tilings[i] for i in np.argsort(slower, kind="stable")]
