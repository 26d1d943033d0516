"""What a network is likely to lose: right on average, and nearer to it than what the labels count."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.data.metric import Metric, load_metric, paired_drop
from tvm_lowrank.searching.choose.likely import Likely, calibrated

CLASSES = 10
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]


def sample(count: int, seed: int, *, sure: float = 1.0, noise: float = 0.5) -> Sample:
    """Outputs of a dense network that is too sure by a factor, of one that differs from it, and labels."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((count, CLASSES)) * rng.exponential(2, (count, 1))
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)
    changed = truth + noise * rng.standard_normal(truth.shape)
    return (sure * truth).astype("float32"), (sure * changed).astype("float32"), labels


def counted(metric: Metric, dense: np.ndarray, changed: np.ndarray, labels: np.ndarray) -> float:
    return paired_drop(metric.scores(dense, labels), metric.scores(changed, labels))[0]


@pytest.mark.parametrize("sure", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("metric", [load_metric("top1"), load_metric("top5")], ids=lambda m: m.name)
def test_it_is_nearer_to_the_truth_than_what_is_counted(metric: Metric, sure: float) -> None:
    truth = counted(metric, *sample(200_000, 0, sure=sure))
    likely, errors, lost = [], [], []
    for seed in range(1, 41):
        dense, changed, labels = sample(600, seed, sure=sure)
        known = Likely.of(metric, dense, labels, Answers())
        assert known is not None
        drop, error = known.drop(changed)
        likely.append(drop)
        errors.append(error)
        lost.append(counted(metric, dense, changed, labels))
    assert np.mean(likely) == pytest.approx(truth, abs=0.15)
    assert np.std(likely) < 0.6 * np.std(lost)
    assert np.std(likely) < 1.2 * np.mean(errors) < 3 * np.std(likely)


def test_probabilities_are_calibrated() -> None:
    dense, _, labels = sample(20_000, 0, sure=4.0)
    expected, _, _ = sample(20_000, 0)
    expected = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibrated(dense, labels), expected, atol=0.02)


def test_a_network_that_is_always_right_loses_what_it_changes() -> None:
    """Labels are what it says of images without any: its probabilities become certain."""
    dense, changed, _ = sample(600, 0)
    known = Likely.of(load_metric(), dense, dense.argmax(axis=1), Answers())
    assert known is not None
    flips = 100 * np.mean(dense.argmax(axis=1) != changed.argmax(axis=1))
    assert known.drop(changed)[0] == pytest.approx(flips, abs=0.5)
    drop, error = known.drop(dense)
    assert drop == 0 and error > 0


def test_where_it_knows_nothing() -> None:
    dense, _, labels = sample(600, 0)
    metric = load_metric()
    assert Likely.of(metric, dense.reshape(600, 2, 5), labels, Answers()) is None
    assert Likely.of(metric, dense, labels + 1, Answers()) is None
    assert Likely.of(metric, dense[:0], labels[:0], Answers()) is None
    surely_wrong = Metric("mine", lambda outputs, own: (outputs.argmax(axis=1) != own).astype(float))
    assert Likely.of(surely_wrong, dense, (dense.argmax(axis=1) + 1) % CLASSES, Answers()) is None


def test_it_is_the_same_again() -> None:
    dense, changed, labels = sample(200, 0)
    first, second = (Likely.of(load_metric(), dense, labels, Answers(), seed=3) for _ in range(2))
    assert first is not None and second is not None and first.drop(changed) == second.drop(changed)
