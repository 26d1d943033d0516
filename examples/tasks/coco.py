"""COCO's average precision of boxes and of key points, as pycocotools counts it. Needs `pip install pycocotools`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

Images = Sequence[Mapping[str, np.ndarray]]

SPREAD = 0.05  # of every key point: how exactly it can be told, in units of the object's size (COCO's are 0.025 to 0.1)


def box_precision(found: Images, truth: Images) -> dict[str, float]:
    """Average precision of boxes, from 0 to 1: `AP` over overlaps of 0.5 to 0.95, and `AP50`.

    For each image, found has boxes (k, 4), labels (k,) and scores (k,), and truth boxes and labels.
    """
    said = [
        {"image_id": i, "category_id": int(c), "bbox": corner_and_size(box), "score": float(s)}
        for i, one in enumerate(found)
        for box, s, c in zip(one["boxes"], one["scores"], one["labels"], strict=True)
    ]
    true = [
        {"image_id": i, "category_id": int(c), "bbox": corner_and_size(box), "area": float(np.prod(box[2:] - box[:2]))}
        for i, one in enumerate(truth)
        for box, c in zip(one["boxes"], one["labels"], strict=True)
    ]
    return _precision("bbox", said, true, len(truth))


def point_precision(found: Images, truth: Images) -> dict[str, float]:
    """Average precision by the similarity of key points (OKS), from 0 to 1: `AP` over 0.5 to 0.95, and `AP50`.

    For each image, found has keypoints (k, p, 2) and scores (k,), and truth keypoints and area (k,).
    """
    said = [
        {"image_id": i, "category_id": 0, "keypoints": _seen(points), "score": float(score)}
        for i, one in enumerate(found)
        for points, score in zip(one["keypoints"], one["scores"], strict=True)
    ]
    true = [
        {
            "image_id": i,
            "category_id": 0,
            "keypoints": _seen(points),
            "num_keypoints": len(points),
            "area": float(area),
            "bbox": corner_and_size(np.concatenate([points.min(0), points.max(0)])),
        }
        for i, one in enumerate(truth)
        for points, area in zip(one["keypoints"], one["area"], strict=True)
    ]
    return _precision("keypoints", said, true, len(truth))


def corner_and_size(box: np.ndarray) -> list[float]:
    return [float(x) for x in (*box[:2], *(box[2:] - box[:2]))]


def _seen(points: np.ndarray) -> list[float]:
    """x, y and 2 (seen) of each point."""
    return np.pad(points, ((0, 0), (0, 1)), constant_values=2).ravel().tolist()


def _precision(kind: str, said: list[dict], true: list[dict], images: int) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not said or not true:
        return {"AP": 0.0, "AP50": 0.0}
    categories = sorted({one["category_id"] for one in true})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(images)],
            "categories": [{"id": c} for c in categories],
            "annotations": [{"id": i, "iscrowd": 0, **one} for i, one in enumerate(true, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(said), kind)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.full(len(true[0]["keypoints"]) // 3, SPREAD)
        evaluation.evaluate()
        evaluation.accumulate()
    # thresholds x recalls x classes x areas (0: all) x limits (-1: the largest); -1 where there is nothing to find
    precision = evaluation.eval["precision"][..., 0, -1]
    return {name: float(p[p >= 0].mean()) for name, p in (("AP", precision), ("AP50", precision[0]))}
