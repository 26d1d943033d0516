"""The model of the oracle: it learns what the baseline lacks, knows what it does not know, and sees the lanes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from tvm_lowrank.methods import ConvSpec
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.searching.latency.surrogate import LEAST, NAMES, Surrogate, features

LANES, REGISTERS = 16, 32


def convolutions(count: int, seed: int) -> list[Convolution]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        size = int(rng.choice([7, 14, 28]))
        inside, outside = (int(c) for c in rng.choice(np.arange(16, 272, 16), 2))
        kernel = ((1, 1), (3, 3), (3, 1), (1, 3))[rng.integers(4)]
        padding = (kernel[0] // 2, kernel[1] // 2) * 2
        found.append(
            Convolution.of(ConvSpec(inside, outside, kernel, padding=padding), (size, size), batch=1, lanes=16)
        )
    return found


def milliseconds(convs: Sequence[Convolution]) -> np.ndarray:
    """A machine on which small images and 1 x 1 kernels are slower than the baseline says."""
    cycles = np.array([features(conv, lanes=LANES, registers=REGISTERS)[1] for conv in convs])
    slower = [1 + 2.0 / conv.space.spatial[2] + 0.3 * (conv.space.reduction[0] == 1) for conv in convs]
    return cycles * slower * 3e-7


def test_learns_what_the_baseline_lacks() -> None:
    known, unknown = convolutions(100, 0), convolutions(60, 1)
    model = Surrogate(lanes=LANES, registers=REGISTERS)
    model.fit(known[: LEAST - 1], milliseconds(known[: LEAST - 1]))
    baseline = np.abs(np.log(model.predict(unknown)[0] / milliseconds(unknown)))
    model.fit(known, milliseconds(known))
    predicted, unsure = model.predict(unknown)
    errors = np.abs(np.log(predicted / milliseconds(unknown)))
    assert np.median(errors) < 0.03 < np.median(baseline)
    assert np.percentile(errors, 90) < 0.08
    assert np.all(unsure > 0) and np.median(unsure) < 0.05


def test_the_same_data_give_the_same_model() -> None:
    known = convolutions(40, 0)
    answers = []
    for _ in range(2):
        model = Surrogate(lanes=LANES, registers=REGISTERS)
        model.fit(known, milliseconds(known))
        answers.append(model.predict(known)[0])
    np.testing.assert_array_equal(*answers)


def test_staircase_at_the_lanes() -> None:
    """Channels that do not fill the vectors cost as much as those that do, or more."""
    model = Surrogate(lanes=LANES, registers=REGISTERS)
    known = convolutions(100, 0)
    model.fit(known, milliseconds(known))
    ranks = list(range(32, 65))
    convs = [Convolution.of(ConvSpec(64, n, (3, 3), padding=(1, 1, 1, 1)), (28, 28), batch=1, lanes=16) for n in ranks]
    times = dict(zip(ranks, model.predict(convs)[0], strict=True))
    for full in (48, 64):
        assert times[full] < 1.02 * min(times[n] for n in range(full - 7, full))
    assert times[49] > 1.05 * times[48]


def test_features_have_names_and_survive_json() -> None:
    conv = convolutions(1, 3)[0]
    assert len(features(conv, lanes=LANES, registers=REGISTERS)[0]) == len(NAMES)
    assert Convolution.from_json(json.loads(json.dumps(conv.to_json()))) == conv
    with pytest.raises(KeyError):
        Convolution.from_json({"spatial": [1], "reduction": [1]})
