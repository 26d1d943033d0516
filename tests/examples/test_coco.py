"""Average precision: hand-made cases, and a plain count of one's own that must agree with pycocotools'."""

from __future__ import annotations

import numpy as np
import pytest
from boxes import overlaps
from coco import SPREAD, Images, box_precision, point_precision

pytest.importorskip("pycocotools")

BOXES = np.array([(10, 10, 30, 30), (50, 50, 90, 70)], "float64")
TRUTH = [{"boxes": BOXES, "labels": np.array([0, 1])}, {"boxes": BOXES[:1], "labels": np.array([0])}]


def found(*said: tuple[float, int, tuple[float, ...]]) -> dict[str, np.ndarray]:
    scores, labels, boxes = zip(*said, strict=True) if said else ((), (), ())
    boxes = np.array(boxes, "float64").reshape(-1, 4)
    return {"boxes": boxes, "labels": np.array(labels, int), "scores": np.array(scores)}


def plain_precision(said: Images, truth: Images, least: float) -> float:
    """The mean over classes of the precision at 101 recalls, at one overlap."""
    every = []
    for c in sorted({int(c) for one in truth for c in one["labels"]}):
        total = sum(int((one["labels"] == c).sum()) for one in truth)
        hits = []
        for one, true in zip(said, truth, strict=True):
            free = list(true["boxes"][true["labels"] == c])
            own = one["labels"] == c
            for score, box in sorted(
                zip(one["scores"][own], one["boxes"][own], strict=True), key=lambda pair: -pair[0]
            ):
                shared = overlaps(box[None], np.array(free).reshape(-1, 4))[0]
                hit = len(shared) > 0 and shared.max() >= least
                if hit:
                    free.pop(int(shared.argmax()))
                hits.append((score, hit))
        right = np.cumsum([hit for _, hit in sorted(hits, key=lambda pair: -pair[0])])
        precision = right / np.arange(1, len(right) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / total, np.linspace(0, 1, 101) - 1e-9)
        every.append(np.mean([precision[i] if i < len(precision) else 0 for i in at]))
    return float(np.mean(every))


def test_all_found() -> None:
    said = [found((0.9, 0, BOXES[0]), (0.8, 1, BOXES[1])), found((0.7, 0, BOXES[0]))]
    assert box_precision(said, TRUTH) == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}


def test_nothing_found() -> None:
    assert box_precision([found(), found()], TRUTH) == {"AP": 0, "AP50": 0}


def test_one_of_two_found() -> None:
    said = [found((0.9, 0, BOXES[0]), (0.8, 1, BOXES[1])), found()]
    # class 0: recall to one half at precision 1, which is 51 of the 101 recalls; class 1: all
    assert box_precision(said, TRUTH)["AP50"] == pytest.approx((51 / 101 + 1) / 2)


def test_inexact_boxes_count_at_small_overlaps_only() -> None:
    half = [{"boxes": BOXES[:1], "labels": np.array([0])}]
    said = [found((0.9, 0, (10, 10, 30, 22.4)))]  # 0.62 of the box
    scores = box_precision(said, half)
    assert scores["AP50"] == pytest.approx(1)
    assert scores["AP"] == pytest.approx(0.3)  # at 0.5, 0.55 and 0.6


def test_agrees_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    truth, said = [], []
    for _ in range(30):
        corners = rng.uniform(0, 60, (3, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 30, (3, 2))], 1)
        classes = rng.integers(0, 2, 3)
        truth.append({"boxes": boxes, "labels": classes})
        near = boxes + rng.normal(0, 2.5, boxes.shape)
        mistaken = np.where(rng.random(3) < 0.2, 1 - classes, classes)
        said.append({"boxes": near, "labels": mistaken, "scores": rng.random(3)})
    expected = [plain_precision(said, truth, least) for least in np.arange(0.5, 1, 0.05)]
    scores = box_precision(said, truth)
    assert 0.3 < scores["AP50"] < 0.95
    assert scores["AP50"] == pytest.approx(expected[0], abs=1e-3)
    assert scores["AP"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_points() -> None:
    points = np.array([[(50, 50), (40, 40), (60, 40), (60, 60), (40, 60)]], "float64")
    truth = [{"keypoints": points, "area": np.array([400.0])}]
    score = np.array([1.0])
    assert point_precision([{"keypoints": points, "scores": score}], truth)["AP"] == pytest.approx(1)
    # all points so far aside that the similarity, exp(-d^2 / (2 area (2 spread)^2)), is 0.72
    aside = (-np.log(0.72) * 2 * 400 * (2 * SPREAD) ** 2) ** 0.5
    scores = point_precision([{"keypoints": points + np.array([aside, 0]), "scores": score}], truth)
    assert scores["AP50"] == pytest.approx(1)
    assert scores["AP"] == pytest.approx(0.5)  # at 0.5 to 0.7
    assert point_precision([{"keypoints": points[:0], "scores": score[:0]}], truth) == {"AP": 0, "AP50": 0}
