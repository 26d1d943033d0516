from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import bootstrap

from tvm_lowrank.data.measure import FEW, Unscored, unit_called
from tvm_lowrank.data.metric import evaluate, load_metric, paired_drop, tried
from tvm_lowrank.errors import UserError
from tvm_lowrank.options import SearchOptions
from tvm_lowrank.quantities import Budget, budget


@pytest.mark.parametrize(
    ("text", "points"), [("1%", 1), ("0.5%", 0.5), ("1", 1), (" .25 % ", 0.25), ("0", 0), ("100%", 100)]
)
def test_budget(text: str, points: float) -> None:
    assert budget(text).within("points", "top1") == points


@pytest.mark.parametrize("text", ["banana", "-1%", "150%", "", "%", "nan", "inf", "1e3", "1,5%", "1%%", "1 2", "²"])
def test_bad_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"write e\.g\. 1%"):
        budget(text)


def test_a_budget_in_the_unit_of_the_metric() -> None:
    assert budget("0.5dB") == budget(" 0.5 dB") == Budget(0.5, "dB")
    assert budget("0.5 dB").within("dB", "psnr") == budget("0.5").within("dB", "psnr") == 0.5
    assert budget("300").within("dB", "psnr") == 300
    for text, unit, message in (
        ("1%", "dB", r"1%, but psnr counts in dB; write e\.g\. 0\.5dB"),
        ("1dB", "points", r"1dB, but psnr counts in points; write e\.g\. 0\.5%"),
        ("101", "points", "from 0 to 100"),
    ):
        with pytest.raises(UserError, match=message):
            budget(text).within(unit, "psnr")


def test_what_a_search_may_lose() -> None:
    assert SearchOptions().allowed("points", "top1") == 1
    assert SearchOptions(budget=0.25).allowed("dB", "psnr") == SearchOptions(budget="0.25dB").allowed("dB", "psnr")
    assert SearchOptions(max_latency=1.0).allowed("dB", "psnr") == 1
    with pytest.raises(UserError, match=r"psnr counts in dB; give a --budget such as 0\.5dB"):
        SearchOptions().allowed("dB", "psnr")
    for wrong in (-1.0, float("nan"), "two"):
        with pytest.raises(UserError, match="is not a number of points"):
            SearchOptions(budget=wrong)


def test_top_k_agrees_with_sorting() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(200, 12)).astype("float32"), rng.integers(0, 12, 200)
    order = np.argsort(-logits, axis=1)
    for k in (1, 5):
        expected = (order[:, :k] == labels[:, None]).any(axis=1)
        np.testing.assert_array_equal(load_metric(f"top{k}").scores(logits, labels), expected)
    top1 = load_metric("top1")
    assert top1.value(top1.scores(logits, logits.argmax(1))) == 100


def test_ties_and_nan_do_not_count_as_right() -> None:
    top1, top5 = load_metric("top1"), load_metric("top5")
    constant = np.zeros((12, 12), "float32")
    assert top1.scores(constant, np.arange(12)).sum() == 1
    assert top5.scores(constant, np.arange(12)).sum() == 5
    broken = np.full((12, 12), np.nan, "float32")
    assert top1.scores(broken, np.arange(12)).sum() == top5.scores(broken, np.arange(12)).sum() == 0


def test_outputs_that_no_top_k_fits() -> None:
    for logits, labels, message in (
        (np.zeros((2, 5)), [0, 1], "always right"),
        (np.zeros((2, 8, 3)), [0, 1], "shape"),
        (np.zeros((2, 8)), [0, 8], "do not fit 8 classes"),
    ):
        with pytest.raises(UserError, match=message):
            load_metric("top5").scores(logits, np.array(labels))


def write(tmp_path: Path, body: str) -> str:
    (tmp_path / "metrics.py").write_text(f"import numpy as np\ndef metric(logits, labels):\n    {body}\n")
    return f"{tmp_path}/metrics.py:metric"


@pytest.mark.parametrize(
    "body",
    [
        "return logits.argmax(1) == labels",
        "return float((logits.argmax(1) == labels).mean())",
        "import torch; return torch.from_numpy(logits).argmax(1) == torch.from_numpy(labels)",
    ],
)
def test_own_function_per_image_or_as_a_mean(tmp_path: Path, body: str) -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(20, 4)).astype("float32"), rng.integers(0, 4, 20)
    metric = load_metric(write(tmp_path, body))
    assert metric.name == f"{tmp_path}/metrics.py:metric"
    np.testing.assert_array_equal(metric.scores(logits, labels), logits.argmax(1) == labels)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError"),
        ("return 'good'", "failed: ValueError"),
        ("return np.zeros(3)", "returned shape"),
        ("return np.full(len(labels), 100.0)", "from 0 to 1"),
    ],
)
def test_own_function_that_fails(tmp_path: Path, body: str, message: str) -> None:
    metric = load_metric(write(tmp_path, body))
    with pytest.raises(UserError, match=message) as error:
        metric.scores(np.zeros((5, 4), "float32"), np.zeros(5, "int64"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body", ["return np.where(logits[:, 0], 1.0, np.nan)", "return 0.5 if logits[:, 0].all() else -np.inf"]
)
def test_what_is_no_number_is_said_of_the_network_that_it_is_of(tmp_path: Path, body: str) -> None:
    """Which is the compressed one, whose drop is not known, or the dense one, of which none is."""
    labels, good, bad = np.zeros(70), np.ones((70, 4)), np.ones((70, 4))
    bad[5] = 0
    metric = tried(load_metric(write(tmp_path, body)), lambda count: good[:count], labels)
    before, after = (metric.scores(own, labels) for own in (good, bad))
    assert metric.drop(before, before)[0] == 0 and metric.everything(before) == metric.value(before)
    with pytest.raises(Unscored, match=r"metric of the compressed network is (nan|-inf); correct it"):
        metric.drop(before, after)
    with pytest.raises(UserError, match=r"metric of the dense network is (nan|-inf); correct it") as error:
        metric.drop(after, before)
    assert not isinstance(error.value, Unscored)


def test_everything_is_lost_of_what_there_was() -> None:
    assert load_metric().everything(np.array([1.0, 1, 0, 0])) == 50
    psnr = load_metric("psnr")
    assert psnr.everything(np.array([30.0, 34])) == 32
    less = load_metric("relative-error")
    rows = less.scores(np.ones((5, 2)), np.zeros((5, 0)))
    assert less.everything(rows) == 100


def test_unknown_metrics(tmp_path: Path) -> None:
    for spec, message in (("f2", "unknown metric 'f2'"), ("no.py:f", "no such file"), ("math:pi", "not a function")):
        with pytest.raises(UserError, match=message):
            load_metric(spec)


# the interval

scores = hnp.arrays("float64", st.integers(1, 60), elements=st.floats(0, 1))
binary = hnp.arrays("float64", st.integers(1, 60), elements=st.sampled_from([0.0, 1.0]))


@given(st.one_of(scores, binary), st.randoms(use_true_random=False))
def test_interval_is_sane(dense: np.ndarray, random: object) -> None:
    compressed = dense.copy()
    random.shuffle(compressed)  # type: ignore[attr-defined]
    drop, (low, high) = paired_drop(dense, compressed)
    assert drop == pytest.approx(100 * (dense.mean() - compressed.mean()), abs=1e-9)
    assert -100 <= low <= drop <= high <= 100
    assert high > low
    back, (back_low, back_high) = paired_drop(compressed, dense)
    assert (back, back_low, back_high) == pytest.approx((-drop, -high, -low), abs=1e-9)
    wide_low, wide_high = paired_drop(dense, compressed, confidence=0.99)[1]
    assert wide_low <= low and high <= wide_high
    more_low, more_high = paired_drop(np.tile(dense, 8), np.tile(compressed, 8))[1]
    assert more_high - more_low < high - low


def test_interval_is_agresti_and_min() -> None:
    # 2 x 2 table: 20 images only dense gets right, 8 only compressed, 60 both, 12 none
    dense = np.repeat([1, 0, 1, 0], [20, 8, 60, 12])
    compressed = np.repeat([0, 1, 1, 0], [20, 8, 60, 12])
    b, c, n = 20.5, 8.5, 102
    centre, half = (b - c) / n, 1.959964 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    drop, interval = paired_drop(dense, compressed)
    assert drop == pytest.approx(12)
    assert interval == pytest.approx((100 * (centre - half), 100 * (centre + half)), abs=1e-4)


@pytest.mark.parametrize("n", [30, 2000])
@pytest.mark.parametrize("kind", ["binary", "real"])
def test_interval_covers_the_true_drop(n: int, kind: str) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        if kind == "binary":  # 4 % lost, 2 % won
            change = rng.choice([1.0, -1.0, 0.0], n, p=[0.04, 0.02, 0.94])
            dense, compressed, truth = (change > 0) * 1.0, (change < 0) * 1.0, 2.0
        else:
            dense, loss = rng.uniform(0.5, 1, n), rng.beta(0.5, 4.5, n)
            compressed, truth = dense * (1 - loss), 100 * 0.75 * 0.1
        low, high = paired_drop(dense, compressed)[1]
        hits += low <= truth <= high
    assert hits / 400 > 0.93


def test_interval_without_any_difference_is_not_a_point() -> None:
    drop, (low, high) = paired_drop(np.ones(2000), np.ones(2000))
    assert drop == 0
    assert -0.1 < low < 0 < high < 0.1


def test_interval_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_drop(np.ones(3), np.ones(4))


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
def test_every_image_is_scored_once_in_any_chunks(chunk: int | None) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3, 2, 2)).astype("float32")
    labels, given = x.mean(axis=(2, 3)).argmax(1), []
    labels[::3] += 1

    def model(images: np.ndarray) -> np.ndarray:
        given.append(len(images))
        return images[:].mean(axis=(2, 3))

    scores = evaluate(model, x, labels % 3, load_metric("top1"), chunk=chunk)
    np.testing.assert_array_equal(scores, np.arange(10) % 3 != 0)
    assert max(given) <= (chunk or 10) and sum(given) == 10


# metrics of a whole split


def write_whole(tmp_path: Path, body: str, unit: str = "") -> str:
    text = f"import numpy as np\ndef metric(outputs, targets):\n    {body}\n" + (
        f"metric.unit = {unit!r}\n" if unit else ""
    )
    path = tmp_path / f"whole{len(list(tmp_path.iterdir()))}.py"  # another module each time
    path.write_text(text)
    return f"{path}:metric"


def test_one_number_for_all_images_is_a_metric_of_the_split(tmp_path: Path) -> None:
    """Of the median: no score of single images says it, and targets are a list as they were given."""
    body = "return float(np.median([abs(o[0] - t['value']) < 1 for o, t in zip(outputs, targets, strict=True)]))"
    outputs, targets = np.array([[0.0], [2], [2]]), [{"value": 0.5}, {"value": 0.5}, {"value": 2}]
    metric = tried(load_metric(write_whole(tmp_path, body)), lambda count: outputs[:count], targets)
    rows = metric.scores(outputs, targets)
    assert metric.value(rows) == 100 and metric.resamples == FEW
    assert metric.value(metric.scores(outputs + 1, targets)) == 0
    several = tried(
        load_metric(write_whole(tmp_path, "return outputs[1].mean()")),
        lambda n: (outputs[:n], outputs[:n] / 4),
        targets,
    )
    assert several.value(several.scores((outputs, outputs / 4), targets)) == pytest.approx(100 / 3)


def test_it_is_what_the_same_function_is_of_scores(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 300)
    before, after = (np.eye(4)[labels] + noise * random.normal(size=(300, 4)) for noise in (0.3, 0.6))
    body = "return (outputs.argmax(1) == targets).mean()"
    metric = tried(load_metric(write_whole(tmp_path, body)), lambda count: before[:count], labels)
    found, (low, high) = metric.drop(metric.scores(before, labels), metric.scores(after, labels))
    top1 = load_metric()
    expected, interval = top1.drop(top1.scores(before, labels), top1.scores(after, labels))
    assert found == pytest.approx(expected)
    assert (low, high) == pytest.approx(interval, abs=1.0)


def test_a_unit_of_its_own(tmp_path: Path) -> None:
    spec = write_whole(tmp_path, "return 30 + outputs[:, 0] - targets", "dB")
    outputs, targets = np.arange(6.0)[:, None], np.zeros(6)
    metric = tried(load_metric(spec), lambda count: outputs[:count], targets)
    rows = metric.scores(outputs, targets)
    assert metric.unit == unit_called("dB") and metric.value(rows) == 32.5
    drop, (low, high) = metric.drop(rows, metric.scores(outputs - 0.5, targets))
    assert (low, drop, high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError"),
        ("return float('nan')", "metric of the dense network on the first 2 images is nan; correct it or its targets"),
        ("return [float('nan'), 1]", "metric of the dense network on the first 2 images is nan; correct it"),
        ("return 27.5", "returned 27.5 to 27.5; scores must lie from 0 to 1"),
        ("return np.zeros((2, 2))", "returned shape"),
        ("return {'a': 1}", "failed: TypeError"),
    ],
)
def test_whole_metrics_that_are_none(tmp_path: Path, body: str, message: str) -> None:
    metric = load_metric(write_whole(tmp_path, body))
    with pytest.raises(UserError, match=message) as error:
        tried(metric, lambda count: np.zeros((count, 4)), np.zeros((2, 3)))
    assert "\n" not in str(error.value)


def test_where_two_images_say_nothing_more_are_tried(tmp_path: Path) -> None:
    """A metric that needs both classes; draws without one of them do not count."""
    body = (
        "a, b = (outputs[targets == own, 0] for own in (1, 0)); assert len(a) and len(b); return (a.mean() > b).mean()"
    )
    labels = np.repeat([0, 1], [10, 2])
    metric = tried(load_metric(write_whole(tmp_path, body)), lambda count: labels[:count, None] - 0.5, labels)
    rows = metric.scores(labels[:, None] - 0.5, labels)
    drop, (low, high) = metric.drop(rows, metric.scores(0.5 - labels[:, None], labels))
    assert drop == 100 and low <= 100 <= high and np.isfinite([low, high]).all()
    with pytest.raises(UserError, match="failed: AssertionError"):
        tried(load_metric(write_whole(tmp_path, body)), lambda count: np.zeros((count, 1)), labels[:10])


# the bootstrap


def intersections(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of mean IoU of two networks, of images whose objects are large or small and found well or badly."""
    size, dense = random.lognormal(5, 0.8, (count, 1)), random.beta(8, 2, (count, 3))
    after = dense * random.beta(12, 2, (count, 3))
    area = size * random.dirichlet([2, 2, 2], count)
    return tuple(np.concatenate([own * area, area * (1 + own)], axis=1) for own in (dense, after))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [50, 200])
def test_the_bootstrap_covers_the_true_drop(count: int) -> None:
    metric = replace(load_metric("mean-iou"), resamples=200)
    many = intersections(np.random.default_rng(0), 200_000)
    truth = metric.value(many[0]) - metric.value(many[1])
    hits, lengths = 0, []
    for seed in range(300):
        drop, (low, high) = metric.drop(*intersections(np.random.default_rng([1, seed]), count), seed=seed)
        assert low <= drop <= high
        hits, lengths = hits + (low <= truth <= high), [*lengths, high - low]
    assert 0.9 <= hits / 300 <= 0.98, "some must miss it, or the interval says little"
    assert np.mean(lengths) < 60 / count**0.5


def test_the_bootstrap_is_that_of_scipy_and_repeats() -> None:
    metric, (before, after) = load_metric("mean-iou"), intersections(np.random.default_rng(3), 80)

    def lost(numbers: np.ndarray) -> float:
        return metric.value(before[numbers]) - metric.value(after[numbers])

    expected = bootstrap(
        (np.arange(80),), lost, vectorized=False, n_resamples=1000, method="percentile"
    ).confidence_interval
    found = metric.drop(before, after, seed=5)
    assert found[1] == pytest.approx(tuple(expected), rel=0.1)
    assert found == metric.drop(before, after, seed=5) != metric.drop(before, after, seed=6)
    assert metric.drop(before, before) == (0, (0, 0))


def test_nothing_that_differs_is_not_certain_where_images_count() -> None:
    metric, rows = load_metric("f1"), np.tile([1.0, 0, 0], (200, 1))
    drop, (low, high) = metric.drop(rows, rows)
    assert drop == 0 and (low, high) == pytest.approx((-0.98, 0.98), abs=0.01)
    assert metric.half_an_image == 50 and load_metric("psnr").half_an_image == 0
