"""Boxes (k, 4) as left, top, right, bottom: how much two overlap, which to keep, and the default boxes of SSD300."""

from __future__ import annotations

from itertools import product

import numpy as np

SSD_MAPS = (38, 19, 10, 5, 3, 1)  # positions a side
SSD_SCALES = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075)  # of the boxes of each map, and of one after the last
SSD_SHAPES = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # width to height, and the reciprocals; 1 is in all
SSD_VARIANCES = (0.1, 0.2)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each box of a (m, 4) with each of b (n, 4): (m, n)."""
    start = np.maximum(a[:, None, :2], b[None, :, :2])
    end = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(end - start, 0).prod(-1)
    area_a, area_b = (np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b[None] - shared, 1e-12)


def suppress(boxes: np.ndarray, scores: np.ndarray, most: float = 0.5) -> np.ndarray:
    """Non-maximum suppression: indices, best first, of boxes that no better one that is kept overlaps by more."""
    order = np.argsort(-scores, kind="stable")
    shared = overlaps(boxes[order], boxes[order])
    keep = np.ones(len(order), bool)
    for i in range(len(order)):
        if keep[i]:
            keep[i + 1 :] &= shared[i, i + 1 :] <= most
    return order[keep]


def ssd_default_boxes() -> np.ndarray:
    """The 8,732 default boxes of SSD300, (8732, 4) as x and y of the centre, width and height, from 0 to 1.

    Sections 2.2 and 3.1 of the paper: the second box at each position is of a scale between this map's and the next's.
    """
    boxes = []
    for size, scale, larger, shapes in zip(SSD_MAPS, SSD_SCALES, SSD_SCALES[1:], SSD_SHAPES, strict=False):
        sides = [(scale, scale), ((scale * larger) ** 0.5,) * 2]
        for shape in shapes:
            wide = (scale * shape**0.5, scale / shape**0.5)
            sides += [wide, wide[::-1]]
        boxes += [
            ((column + 0.5) / size, (row + 0.5) / size, *side)
            for row, column, side in product(range(size), range(size), sides)
        ]
    return np.array(boxes, "float32")


def ssd_boxes(offsets: np.ndarray) -> np.ndarray:
    """SSD300's first output (n, 8732, 4) as boxes (n, 8732, 4), on the scale 0 to 1."""
    default = ssd_default_boxes()
    centre = default[:, :2] + offsets[..., :2] * SSD_VARIANCES[0] * default[:, 2:]
    half = default[:, 2:] * np.exp(offsets[..., 2:] * SSD_VARIANCES[1]) / 2
    return np.concatenate([centre - half, centre + half], -1)


def ssd_found(
    outputs: tuple[np.ndarray, np.ndarray], *, least: float = 0.01, limit: int = 200
) -> list[dict[str, np.ndarray]]:
    """What SSD300 found in each image, best first: boxes (k, 4), labels (k,) and scores (k,).

    The outputs are (n, 8732, 4) and (n, 8732, classes). Labels count from 0: the background, the first class of the
    scores, is left out.
    """
    offsets, scores = outputs
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    likely = (scores / scores.sum(-1, keepdims=True))[..., 1:]
    return [_best(boxes, own, least, limit) for boxes, own in zip(ssd_boxes(offsets), likely, strict=True)]


def _best(boxes: np.ndarray, likely: np.ndarray, least: float, limit: int) -> dict[str, np.ndarray]:
    """Of boxes (k, 4) and what is how likely in each (k, classes): the best of each class, without their doubles."""
    kept = []
    for label, own in enumerate(likely.T):
        (above,) = np.nonzero(own > least)
        kept += [(label, i) for i in above[suppress(boxes[above], own[above], 0.45)]]
    labels, index = np.array(kept, int).reshape(-1, 2).T
    scores = likely[index, labels]
    order = np.argsort(-scores, kind="stable")[:limit]
    return {"boxes": boxes[index[order]], "labels": labels[order], "scores": scores[order]}
