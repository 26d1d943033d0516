"""Centre and corners of turned pictures in scenes of 96x96 pixels: a small part-affinity network, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import with_weights
from coco import point_precision
from openpose import PoseNetwork
from peaks import between, bumps, peaks
from scenes import POINTS, SIZE, Scene, compose, images, splits, two_classes
from torch import Tensor, nn

STRIDE = 4
GRID = SIZE // STRIDE
CORNERS = len(POINTS) - 1  # a limb joins the centre, which is point 0, with each
FRONT = (16, 16, "pool", 32, 32, "pool", 48, 48, 24)
SPREAD = 1.2  # of a point's heat, in positions
WIDTH = 1.0  # of a limb on each side, in positions


def network() -> PoseNetwork:
    return PoseNetwork(CORNERS, len(POINTS), stages=2, front=FRONT, norm=True)


def trained() -> nn.Module:
    """With the weights of `python train_tasks.py keypoints`."""
    return with_weights(network(), Path(__file__).with_suffix(".npz"))


def target(scene: Scene) -> dict[str, np.ndarray]:
    """Key points (k, 5, 2) in pixels, and the area (k,) of each object in square pixels."""
    return {"keypoints": scene.points, "area": scene.areas}


def data() -> dict[str, Any]:
    return splits(target)


def decode(outputs: tuple[np.ndarray, np.ndarray], *, least: float = 0.1) -> list[dict[str, np.ndarray]]:
    """What the network found in each image, best first: keypoints (k, 5, 2) in pixels and scores (k,).

    The outputs are (n, 8, h, w) and (n, 6, h, w).
    """
    return [grouped(f.reshape(CORNERS, 2, *f.shape[1:]), h, least) for f, h in zip(*outputs, strict=True)]


def grouped(fields: np.ndarray, heat: np.ndarray, least: float) -> dict[str, np.ndarray]:
    """Each centre with the corners that its limbs lead to (section 2.3 of the paper), for skeletons that are a star.

    An object without one of its corners has its centre instead.
    """
    at, heights = peaks(heat[:-1], least)
    places = np.array([between(heat[m], row, column) for m, row, column in at]).reshape(-1, 2)
    first = at[:, 0] == 0
    points = np.repeat(places[first][:, None], len(POINTS), 1)
    scores = heights[first].copy()
    for corner in range(1, len(POINTS)):
        own = at[:, 0] == corner
        for centre, end in pairs(fields[corner - 1], places[first], places[own]):
            points[centre, corner] = places[own][end]
            scores[centre] += heights[own][end]
    order = np.argsort(-scores, kind="stable")
    return {"keypoints": STRIDE * (points[order] + 0.5), "scores": scores[order] / len(POINTS)}


def pairs(field: np.ndarray, starts: np.ndarray, ends: np.ndarray, steps: int = 8) -> list[tuple[int, int]]:
    """Which start belongs to which end, by the mean of a field (2, h, w) along the line between; none in two pairs."""
    if not len(starts) or not len(ends):
        return []
    way = ends[None] - starts[:, None]
    direction = way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-6)
    line = starts[:, None, None] + way[:, :, None] * np.linspace(0, 1, steps)[:, None]  # (starts, ends, steps, 2)
    columns, rows = np.moveaxis(np.clip(line.round().astype(int), 0, field.shape[-1] - 1), -1, 0)
    along = (field[:, rows, columns] * np.moveaxis(direction, -1, 0)[..., None]).sum(0).mean(-1)
    taken: list[tuple[int, int]] = []
    for start, end in zip(*np.unravel_index(np.argsort(-along, axis=None), along.shape), strict=True):
        if along[start, end] > 0.2 and not any(start == s or end == e for s, e in taken):
            taken.append((int(start), int(end)))
    return taken


def precision(outputs: tuple[np.ndarray, ...], targets: list[dict[str, np.ndarray]]) -> float:
    """COCO's average precision by key points, from 0 to 1, over all images together."""
    return point_precision(decode(outputs), targets)["AP"]


def batch(rng: np.random.Generator, pictures: np.ndarray, labels: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Scenes to train on, and for each the fields and the heat maps: (n, 8 + 6, h, w)."""
    scenes = [compose(rng, pictures, two_classes(labels)) for _ in range(count)]
    return torch.from_numpy(images(scenes)), torch.stack([wanted(scene.points) for scene in scenes])


def wanted(points: np.ndarray) -> Tensor:
    at = points / STRIDE - 0.5
    spread = np.full(len(at), SPREAD)
    heat = torch.stack([bumps(at[:, i], spread, GRID) for i in range(len(POINTS))])
    fields = torch.stack([limbs(at[:, 0], at[:, i]) for i in range(1, len(POINTS))])
    return torch.cat([fields.flatten(0, 1), heat, 1 - heat.amax(0, keepdim=True)])


def limbs(starts: np.ndarray, ends: np.ndarray) -> Tensor:
    """The field (2, h, w) of limbs from (k, 2) to (k, 2): their direction on them, 0 elsewhere."""
    field = np.zeros((2, GRID, GRID), "float32")
    rows, columns = np.mgrid[:GRID, :GRID]
    for start, end in zip(starts, ends, strict=True):
        x, y = (end - start) / np.linalg.norm(end - start)
        right, down = columns - start[0], rows - start[1]
        along, aside = right * x + down * y, np.abs(down * x - right * y)
        on = (along >= -0.5) & (along <= np.linalg.norm(end - start) + 0.5) & (aside <= WIDTH)
        field[:, on] = np.array([[x], [y]])
    return torch.from_numpy(field)


def loss(net: PoseNetwork, x: Tensor, maps: Tensor) -> Tensor:
    """The paper's: squared errors of every stage, of the fields and of the heat maps."""
    said = (torch.cat(stage, 1).float() for stage in net.all_stages(x))
    return sum(((stage - maps) ** 2).sum((1, 2, 3)).mean() for stage in said)
