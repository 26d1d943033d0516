"""A model of the oracle: milliseconds of convolutions that were not measured, from those that were.

The baseline is what the best register tile should take by the number of its instructions, or the memory by the number
of bytes. Gradient-boosted trees (xgboost) learn by what factor reality differs, from features of the loop nest; an
ensemble over resampled data says how sure they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import log, prod

import numpy as np
import xgboost

from tvm_lowrank.codegen.schedule import largest_divisor
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.searching.latency.tiles import register_tiles, tile_cost

MEMBERS = 8
ROUNDS = 200
LEAST = 12  # measurements before the trees are better than the baseline
UNSURE = 0.3  # relative uncertainty of the baseline
BYTES_A_CYCLE = 16.0
PARAMETERS = {
    "max_depth": 4,
    "eta": 0.08,
    "subsample": 0.8,
    "colsample_bynode": 0.7,
    "min_child_weight": 2,
    "lambda": 1.0,
    "nthread": 1,
    "verbosity": 0,
}


NAMES = (
    "macs",
    "positions",
    "channels",
    "group",
    "reduction",
    "inner",
    "height",
    "width",
    "kernel height",
    "kernel width",
    "input bytes",
    "weight bytes",
    "output bytes",
    "MACs a byte",
    "full vectors",
    "lanes used",
    "tile cost",
    "tiles",
    "padded",
    "bytes of an operand",
)


@cache
def features(conv: Convolution, *, lanes: int, registers: int) -> tuple[np.ndarray, float]:
    """What the trees see of a convolution, as `NAMES`, and the baseline in cycles."""
    space = conv.space
    batch, height, width, channels = space.spatial
    *kernel, inner = space.reduction
    weight, output = FORMATS[space.format].bytes * prod(space.reduction) * channels, 4 * prod(space.spatial)
    tiles = register_tiles(space, lanes=lanes, registers=registers)
    vector = largest_divisor(space.group, lanes)
    cost = tile_cost(tiles[0], space, lanes) if tiles else 1.0 / vector
    moved = conv.input_bytes + weight + output
    cycles = space.macs * cost + moved / BYTES_A_CYCLE
    values = [
        log(space.macs),
        log(batch * height * width),
        log(channels),
        log(space.group),
        log(prod(space.reduction)),
        log(inner),
        log(height),
        log(width),
        kernel[0],
        kernel[1],
        log(conv.input_bytes),
        log(weight),
        log(output),
        log(space.macs / moved),
        space.group // lanes,
        vector / lanes,
        log(cost),
        len(tiles),
        space.padded,
        FORMATS[space.format].bytes,
    ]
    return np.array(values, np.float32), cycles


class Surrogate:
    """Predicts milliseconds of convolutions on one target.

    Parameters
    ----------
    lanes, registers : of the target's vectors.
    """

    def __init__(self, *, lanes: int, registers: int) -> None:
        self.lanes, self.registers = lanes, registers
        self._offset = 0.0
        self._members: list[xgboost.Booster] = []

    def fit(self, convs: Sequence[Convolution], ms: Sequence[float], *, seed: int = 0) -> None:
        """Learn from measured convolutions; with less than `LEAST`, only the speed of the baseline."""
        inputs, baseline = self._features(convs)
        factors = np.log(np.asarray(ms)) - baseline
        self._offset = float(np.median(factors))
        self._members = []
        if len(convs) < LEAST:
            return
        generator = np.random.default_rng(seed)
        for member in range(MEMBERS):
            rows = generator.integers(len(convs), size=len(convs))
            data = xgboost.DMatrix(inputs[rows], label=factors[rows] - self._offset)
            self._members.append(xgboost.train({**PARAMETERS, "seed": seed + member}, data, ROUNDS))

    def predict(self, convs: Sequence[Convolution]) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of each, and the relative uncertainty: the members' standard deviation in the logarithm."""
        inputs, baseline = self._features(convs)
        if not self._members:
            return np.exp(baseline + self._offset), np.full(len(convs), UNSURE)
        answers = np.array([member.predict(xgboost.DMatrix(inputs)) for member in self._members])
        return np.exp(baseline + self._offset + answers.mean(axis=0)), answers.std(axis=0)

    def _features(self, convs: Sequence[Convolution]) -> tuple[np.ndarray, np.ndarray]:
        pairs = [features(conv, lanes=self.lanes, registers=self.registers) for conv in convs]
        return np.stack([values for values, _ in pairs]), np.log([cycles for _, cycles in pairs])
