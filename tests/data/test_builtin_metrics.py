"""The metrics that come with the tool: by hand, by functions of libraries, and what they say of what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification, image

from tvm_lowrank.data.measure import POINTS, Metric
from tvm_lowrank.data.metric import BUILT_IN, evaluate, load_metric, tried
from tvm_lowrank.errors import UserError

N = 12
rng = np.random.default_rng(0)


def of(name: str, outputs: Any, targets: Any) -> float:
    metric = load_metric(name)
    return metric.value(metric.scores(outputs, targets))


# labels


def test_f1_is_that_of_torchmetrics() -> None:
    outputs, targets = rng.normal(size=(N, 4)).astype("float32"), rng.integers(0, 2, (N, 4))
    chances = torch.from_numpy(1 / (1 + np.exp(-outputs)))
    expected = 100 * float(classification.multilabel_f1_score(chances, torch.from_numpy(targets), num_labels=4))
    assert of("f1", outputs, targets) == pytest.approx(expected, abs=1e-4)
    assert of("f1-probability", chances.numpy(), targets) == pytest.approx(expected, abs=1e-4)
    assert of("f1", 2.0 * targets - 1, targets) == 100 and of("f1", 1 - 2.0 * targets, targets) == 0


def test_f1_by_hand() -> None:
    """One label with two hits, an alarm and a miss: 2/3; one with a hit: 1; one that does not occur counts nothing."""
    said = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    true = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert of("f1", said - 0.5, true) == pytest.approx(100 * (2 / 3 + 1) / 2)


# masks

SAID = np.array([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [0, 0, 0]]])
TRUE = np.array([[[0, 1, 1], [1, 2, 255]], [[0, 0, 0], [0, 0, 1]]])
SCORES = np.moveaxis(np.eye(4)[SAID], -1, 1).astype("float32")  # of four classes, of which one never occurs


def test_mean_iou_and_dice_by_hand() -> None:
    """Over the split, not over images; pixels of no class do not count, nor do classes that do not occur."""
    both, said, true = np.array([6, 2, 1]), np.array([8, 2, 1]), np.array([6, 4, 1])
    for outputs in (SCORES, SAID):
        assert of("mean-iou", outputs, TRUE) == pytest.approx(100 * (both / (said + true - both)).mean())
        assert of("dice", outputs, TRUE) == pytest.approx(100 * (2 * both / (said + true))[1:].mean())
        assert of("mean-iou", outputs, TRUE[:, None]) == of("mean-iou", outputs, TRUE)


def test_masks_of_yes_or_no() -> None:
    true = np.array([[[1, 0, 0, 1]]])
    for form in ((1, 1, 1, 4), (1, 1, 4)):
        for name, outputs in (("", [3.0, -1.0, 1.0, -2.0]), ("-probability", [0.9, 0.4, 0.6, 0.1])):
            values = np.array(outputs).reshape(form)
            assert of("mean-iou" + name, values, true) == pytest.approx(100 / 3)
            assert of("dice" + name, values, true) == pytest.approx(50)


# pictures


def test_pictures_are_those_of_torchmetrics() -> None:
    targets = rng.random((4, 3, 16, 16)).astype("float32")
    outputs = (targets + 0.1 * rng.normal(size=targets.shape)).astype("float32")
    pair = torch.from_numpy(outputs).double(), torch.from_numpy(targets).double()
    each = image.peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(load_metric("psnr").scores(outputs, targets), each.numpy(), rtol=1e-6)
    one_by_one = [
        float(image.structural_similarity_index_measure(*(x[i : i + 1] for x in pair), data_range=1.0))
        for i in range(4)
    ]
    assert of("ssim", outputs, targets) == pytest.approx(100 * np.mean(one_by_one), abs=1e-5)
    pixels = rng.integers(0, 256, targets.shape, dtype="uint8")
    assert of("psnr", (pixels / 255).astype("float32"), pixels) > 90
    assert of("psnr", np.full(targets.shape, np.nan, "float32"), targets) == 0


def test_psnr_by_hand() -> None:
    zeros = np.zeros((2, 1, 4, 4))
    assert of("psnr", zeros + 0.1, zeros) == pytest.approx(20)
    assert of("psnr", np.stack([zeros[0] + 0.1, zeros[0] + 0.01]), zeros) == pytest.approx(30)
    assert of("psnr", zeros, zeros) == 100
    assert load_metric("psnr").unit.name == load_metric("psnr").unit.sign == "dB"


# embeddings


def test_verification_takes_the_best_threshold() -> None:
    """Of pairs with similarities 0.9 (same), 0.8 (others), 0.7 (same) and 0.1 (others) three can be told right."""
    angles = np.arccos([0.9, 0.8, 0.7, 0.1])
    vectors = np.stack([np.stack([np.ones(4), np.zeros(4)], 1), np.stack([np.cos(angles), np.sin(angles)], 1)], 1)
    vectors = 7 * vectors.reshape(8, 2)
    assert of("verification", vectors, np.array([1, 1, 2, 3, 4, 4, 5, 6])) == 75
    assert of("verification", vectors, np.array([1, 1, 2, 2, 4, 4, 5, 6])) == 100
    same = np.ones((8, 2))  # no threshold parts equal similarities
    assert of("verification", same, np.array([1, 1, 2, 3, 4, 4, 5, 6])) == 50


def test_pairs_are_drawn_again_together() -> None:
    metric = load_metric("verification")
    people = np.repeat(np.arange(60), 2)
    people[1::4] += 1000
    good = rng.normal(size=(60, 8)).repeat(2, axis=0) + np.where(
        people[:, None] >= 1000, 5 * rng.normal(size=(120, 8)), 0
    )
    rows = metric.scores(good, people)
    bad = metric.scores(good + 2 * rng.normal(size=good.shape), people)
    drop, (low, high) = metric.drop(rows, bad)
    assert metric.value(rows) == 100 and drop == pytest.approx(100 - metric.value(bad))
    assert 0 < low < drop < high < 60


# against the dense network


def test_agreement_is_that_of_decisions() -> None:
    dense, other = np.eye(4)[[0, 1, 2, 3]], np.eye(4)[[0, 1, 2, 0]]
    for name, outputs, expected in (
        ("agreement", (dense, other), 75),
        ("agreement", (dense[:, :, None].repeat(2, 2), np.stack([dense, other], 2)), 87.5),
        ("agreement", ((dense, dense), (dense, other)), 87.5),
        ("agreement-tokens", (dense[:, None], other[:, None]), 75),
        ("agreement-labels", (dense - 0.5, other - 0.5), 87.5),
        ("agreement-labels-probability", (dense, other), 87.5),
        ("agreement", (dense, np.where(other == 0, np.nan, other)), 0),
    ):
        metric = load_metric(name)
        assert not metric.labelled
        before, after = (metric.scores(own, np.zeros((4, 0))) for own in outputs)
        assert (metric.value(before), metric.value(after, before)) == (100, expected)
        drop, (low, high) = metric.drop(before, after)
        assert drop == 100 - expected and low < drop <= high


def test_relative_error() -> None:
    metric = load_metric("relative-error")
    dense = rng.normal(size=(50, 2, 3)).astype("float32")
    before, after = metric.scores(dense, np.zeros((50, 0))), metric.scores(1.1 * dense, np.zeros((50, 0)))
    assert metric.value(before) == 0 and metric.value(after, before) == pytest.approx(10, rel=1e-5)
    drop, (low, high) = metric.drop(before, after)
    assert (low, drop, high) == pytest.approx((10, 10, 10), rel=1e-5)
    several = [metric.scores(own, np.zeros((50, 0))) for own in ((dense, 100 * dense), (dense, 120 * dense))]
    assert metric.value(several[1], several[0]) == pytest.approx(10, rel=1e-5), (
        "outputs count alike, whatever their size"
    )
    nothing = metric.scores(np.full_like(dense, np.nan), np.zeros((50, 0)))
    assert metric.value(nothing, before) == pytest.approx(100)


# detections


def write(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(f"import numpy as np\n{body}\n")
    return f"{folder}/mine.py"


# boxes as outputs (n, k, 6): x1, y1, x2, y2, a label and a score, which is 0 where there is no box
DECODE = """
def decode(outputs):
    kept = [own[own[:, 5] > 0] for own in outputs]
    return [{"boxes": own[:, :4], "labels": own[:, 4], "scores": own[:, 5]} for own in kept]
"""


def scene(count: int = 30, noise: float = 2.0) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Random boxes of three classes, found with noise, some missed, some false."""
    random, outputs, targets = np.random.default_rng(1), [], []
    for _ in range(count):
        k = int(random.integers(0, 5))
        corner, size = random.uniform(0, 80, (k, 2)), random.uniform(5, 30, (k, 2))
        boxes, labels = np.concatenate([corner, corner + size], axis=1), random.integers(0, 3, k)
        targets.append({"boxes": boxes, "labels": labels})
        found = np.zeros((6, 6))
        found[:k, :4] = boxes + noise * random.normal(size=(k, 4))
        found[:k, 4], found[:k, 5] = labels, random.uniform(0.1, 1, k) * (random.random(k) < 0.8)
        found[5] = [
            *random.uniform(0, 40, 2),
            *random.uniform(50, 90, 2),
            random.integers(0, 3),
            random.uniform(0.1, 0.6),
        ]
        outputs.append(found)
    return np.stack(outputs), targets


@pytest.fixture
def decode(tmp_path: Path) -> str:
    return write(tmp_path, DECODE) + ":decode"


def test_average_precision_is_that_of_pycocotools(decode: str) -> None:
    """By its own evaluation of areas and all, whose first two numbers are these."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    outputs, targets = scene(noise=1.5)
    known, found = COCO(), COCO()
    wanted = [
        (i, box, label, 1.0)
        for i, own in enumerate(targets)
        for box, label in zip(own["boxes"], own["labels"], strict=True)
    ]
    got = [(i, own[:4], own[4], own[5]) for i, image in enumerate(outputs) for own in image if own[5] > 0]
    for table, rows in ((known, wanted), (found, got)):
        table.dataset = {
            "images": [{"id": i} for i in range(len(targets))],
            "categories": [{"id": i} for i in range(3)],
            "annotations": [
                {
                    "id": number,
                    "image_id": i,
                    "category_id": int(label),
                    "bbox": [*box[:2], *(box[2:] - box[:2])],
                    "area": float(np.prod(box[2:] - box[:2])),
                    "iscrowd": 0,
                    "score": score,
                }
                for number, (i, box, label, score) in enumerate(rows, 1)
            ],
        }
        table.createIndex()
    run = COCOeval(known, found, "bbox")
    run.evaluate(), run.accumulate(), run.summarize()
    assert 20 < of(f"coco-map:{decode}", outputs, targets) == pytest.approx(100 * run.stats[0])
    assert 40 < of(f"voc-map:{decode}", outputs, targets) == pytest.approx(100 * run.stats[1])


def test_average_precision_by_hand(decode: str) -> None:
    """Two boxes, found first and third of three: precision 1 up to half of the recall, then 2/3."""
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 70]])
    targets = [{"boxes": boxes[:2], "labels": [1, 1]}]
    outputs = np.array([[[*boxes[0], 1, 0.9], [*boxes[2], 1, 0.8], [*boxes[1], 1, 0.7]]])
    expected = 100 * (51 + 50 * 2 / 3) / 101
    for name in ("voc-map", "coco-map"):
        assert of(f"{name}:{decode}", outputs, targets) == pytest.approx(expected)
    shifted = outputs.copy()
    shifted[0, 2, [0, 2]] += 4  # overlaps by two thirds
    assert of(f"voc-map:{decode}", shifted, targets) == pytest.approx(expected)
    assert of(f"coco-map:{decode}", shifted, targets) < expected - 10
    padded = np.array([[[*boxes[0], 1], [*boxes[1], 1], [0, 0, 0, 0, -1]]])
    assert of(f"voc-map:{decode}", outputs, padded) == pytest.approx(expected)
    ignored = [{"boxes": boxes, "labels": [1, 1, 1], "difficult": [0, 0, 1]}]
    assert of(f"voc-map:{decode}", outputs, ignored) == pytest.approx(100), "found, and nothing is made of it"
    nothing = [{"boxes": np.zeros((0, 4)), "labels": []}]
    assert of(f"voc-map:{decode}", outputs, nothing) == 0


def test_images_drawn_again_give_what_they_would_as_a_split(decode: str) -> None:
    metric = load_metric(f"coco-map:{decode}")
    outputs, targets = scene()
    assert metric.whole is not None
    drawn = metric.whole(metric.scores(outputs, targets))
    for seed in range(3):
        picked = np.random.default_rng(seed).integers(0, len(targets), len(targets))
        again = metric.value(metric.scores(outputs[picked], [targets[i] for i in picked]))
        assert 100 * drawn(picked) == pytest.approx(again)


PEOPLE = """
def decode(outputs):
    return [{"keypoints": own[:, :-1].reshape(len(own), -1, 2), "scores": own[:, -1]} for own in outputs]
"""


@pytest.mark.parametrize("points", [17, 5])
def test_key_points(tmp_path: Path, points: int) -> None:
    random = np.random.default_rng(2)
    people = random.uniform(0, 100, (20, 2, points, 2))
    targets = [
        {"keypoints": np.concatenate([own, np.full((2, points, 1), 2)], axis=2), "area": [6400, 6400]} for own in people
    ]
    name, values = f"oks-map:{write(tmp_path, PEOPLE)}:decode", []
    for noise in (0, 3, 6, 100):
        moved = people + noise * random.normal(size=people.shape)
        values.append(of(name, np.concatenate([moved.reshape(20, 2, -1), np.ones((20, 2, 1))], axis=2), targets))
    assert values[0] == 100 and values[0] > values[1] > values[2] > values[3] and values[3] < 5
    hidden = [{**own, "keypoints": own["keypoints"] * [1, 1, 0]} for own in targets]
    assert of(name, np.concatenate([people.reshape(20, 2, -1), np.ones((20, 2, 1))], axis=2), hidden) == 0


# what does not fit

LABELS, PIXELS, BOXES = np.arange(2), np.zeros((2, 3, 8, 8)), [{"boxes": np.zeros((0, 4)), "labels": []}] * 2


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        ("top1", np.zeros((2, 5)), PIXELS, "top1 needs one integer label per image, not targets of shape 2x3x8x8"),
        ("top1", np.zeros((2, 5)), BOXES, "top1 takes targets that are numbers of one shape, not lists"),
        ("top1", (np.zeros((2, 5)),) * 2, LABELS, "top1 takes one output, the network has 2"),
        ("f1", np.zeros((2, 5)), LABELS, "f1 takes a number for each label.*outputs 2x5 and targets 2"),
        ("f1", np.zeros((2, 1)), np.full((2, 1), 2), "targets that are 0 or 1, not 2 to 2"),
        ("mean-iou", PIXELS, np.zeros((2, 4, 4), int), "mean-iou takes a class for each pixel.*2x3x8x8 and.*2x4x4"),
        ("dice", PIXELS, np.zeros((2, 8, 8)), "dice takes masks of integers, not float64"),
        ("mean-iou", np.full((2, 8, 8), 300), np.zeros((2, 8, 8), int), "masks hold classes 300 to 300"),
        ("psnr", PIXELS, PIXELS[:, :, :4], "psnr takes pictures"),
        ("verification", PIXELS, LABELS, "verification takes a vector for each image"),
        ("agreement", np.zeros((2, 1)), np.zeros((2, 0)), "agreement needs outputs with classes on axis 1, not 2x1"),
        ("coco-map", np.zeros((2, 7, 6)), BOXES, "coco-map needs a function that makes .* coco-map:file.py:function"),
        ("binary", np.zeros((2, 1)), PIXELS, "binary takes a label for each image"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(name: str, outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tried(load_metric(name), lambda count: outputs, targets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "targets", "message"),
    [
        ("return 1 / 0", BOXES, "mine.py:f failed: ZeroDivisionError"),
        ("return np.zeros(3)", BOXES, r"returned shape \(3,\) for 2 images"),
        ("return [{}]", BOXES, "the function gave 1 items for 2 images"),
        ("return [{'boxes': 1}] * 2", BOXES, r"outputs: boxes have shape \(\)"),
        ("return [{'boxes': [], 'labels': []}] * 2", BOXES, "outputs have boxes, labels, but no 'scores'"),
        ("return [{'boxes': [[0, 0, 1, 1]], 'labels': [1], 'scores': []}] * 2", BOXES, "0 scores for 1 boxes"),
        ("return [{'boxes': [['a'] * 4], 'labels': [1], 'scores': [1]}] * 2", BOXES, "list is no boxes of numbers"),
        ("return [{'boxes': [[0, 0, 1, np.nan]], 'labels': [1], 'scores': [1]}] * 2", BOXES, "boxes hold NaN"),
        ("return [{'boxes': [], 'labels': [], 'scores': []}] * 2", LABELS, "targets have shape"),
        ("return [{'boxes': [], 'labels': [], 'scores': []}] * 2", [{"box": 1}] * 2, "have box, but no 'boxes'"),
    ],
)
def test_post_processing_that_fails(tmp_path: Path, body: str, targets: Any, message: str) -> None:
    metric = load_metric(f"coco-map:{write(tmp_path, f'def f(outputs): {body}')}:f")
    with pytest.raises(UserError, match=message) as error:
        tried(metric, lambda count: np.zeros((2, 5)), targets)
    assert "\n" not in str(error.value)


def test_post_processing_of_any_metric(tmp_path: Path) -> None:
    """The network's mask is smaller; arrays, tensors and tuples may be returned."""
    path = write(
        tmp_path, "import torch\ndef larger(x): return torch.from_numpy(x).repeat_interleave(2, 2)\nnothing = 3"
    )
    metric = load_metric(f"mean-iou:{path}:larger")
    assert metric.name == f"mean-iou:{path}:larger" and metric.unit == POINTS
    assert metric.value(metric.scores(SCORES, TRUE.repeat(2, axis=1))) == pytest.approx(of("mean-iou", SCORES, TRUE))
    with pytest.raises(UserError, match="names no function"):
        load_metric("mean-iou:larger")
    with pytest.raises(UserError, match="is not a function"):
        load_metric(f"mean-iou:{path}:nothing")


@pytest.mark.parametrize(("name", "package"), [("ssim", "torchmetrics"), ("voc-map", "pycocotools")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in [own for own in sys.modules if own.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{name} needs {package}; pip install 'tvm_lowrank\[metrics\]'"):
        load_metric(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_metric_has_its_own_name(name: str) -> None:
    assert load_metric(name).name == name


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_rows_are_the_same_in_any_chunks(chunk: int | None, decode: str) -> None:
    """Of counts, of matched boxes, and of several outputs."""
    outputs, targets = scene(12)
    cases: list[tuple[Metric, Callable[[np.ndarray], Any], Any]] = [
        (load_metric(f"coco-map:{decode}"), lambda numbers: outputs[numbers], targets),
        (load_metric("mean-iou"), lambda numbers: SCORES[numbers % 2], TRUE[np.arange(12) % 2]),
        (load_metric("agreement"), lambda numbers: (SCORES[numbers % 2], np.eye(12)[numbers]), np.zeros((12, 0))),
    ]
    images = np.arange(12, dtype="float32").reshape(12, 1, 1, 1)
    for metric, network, own in cases:
        whole = metric.scores(network(np.arange(12)), own)
        rows = evaluate(lambda x: network(x[:, 0, 0, 0].astype(int)), images, own, metric, chunk=chunk)  # noqa: B023
        assert len(rows) == 12 and metric.value(rows) == metric.value(whole)
