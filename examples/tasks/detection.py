"""Animals and vehicles in scenes of 96x96 pixels, with their boxes: a small CenterNet, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import with_weights
from centernet import STRIDE, CenterNet, centernet
from coco import box_precision
from peaks import bumps, peaks
from scenes import CLASSES, SIZE, Scene, compose, images, splits, two_classes
from torch import Tensor, nn
from torch.nn import functional as F

GRID = SIZE // STRIDE


def network() -> CenterNet:
    return centernet()


def trained() -> nn.Module:
    """With the weights of `python train_tasks.py detection`."""
    return with_weights(network(), Path(__file__).with_suffix(".npz"))


def target(scene: Scene) -> dict[str, np.ndarray]:
    """Boxes (k, 4) in pixels and labels (k,)."""
    return {"boxes": scene.boxes, "labels": scene.classes}


def data() -> dict[str, Any]:
    return splits(target)


def decode(outputs: tuple[np.ndarray, ...], *, least: float = 0.05) -> list[dict[str, np.ndarray]]:
    """What the network found in each image, best first: boxes (k, 4) in pixels, labels (k,) and scores (k,)."""
    found = []
    for heat, size, offset in zip(*outputs, strict=True):
        at, scores = peaks(heat, least)
        labels, rows, columns = at.T
        centres = np.stack([columns, rows], 1) + offset[:, rows, columns].T
        half = size[:, rows, columns].T / 2
        boxes = STRIDE * np.concatenate([centres - half, centres + half], 1)
        found.append({"boxes": boxes, "labels": labels, "scores": scores})
    return found


def precision_50(outputs: tuple[np.ndarray, ...], targets: list[dict[str, np.ndarray]]) -> float:
    """Mean average precision at an overlap of 0.5, from 0 to 1, over all images together."""
    return box_precision(decode(outputs), targets)["AP50"]


def precision(outputs: tuple[np.ndarray, ...], targets: list[dict[str, np.ndarray]]) -> float:
    """COCO's mean average precision, over overlaps of 0.5 to 0.95."""
    return box_precision(decode(outputs), targets)["AP"]


def batch(rng: np.random.Generator, pictures: np.ndarray, labels: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Scenes to train on, and for each the heat maps, sizes, offsets and whether there is a centre: (n, 7, h, w)."""
    scenes = [compose(rng, pictures, two_classes(labels)) for _ in range(count)]
    return torch.from_numpy(images(scenes)), torch.stack([wanted(scene) for scene in scenes])


def wanted(scene: Scene) -> Tensor:
    maps = torch.zeros(len(CLASSES) + 5, GRID, GRID)
    boxes = scene.boxes / STRIDE
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    cells = np.minimum(centres.astype(int), GRID - 1)
    for c in range(len(CLASSES)):
        own = scene.classes == c
        maps[c] = bumps(cells[own], sizes[own].min(1) / 8, GRID)
    columns, rows = cells.T
    told = np.concatenate([sizes, centres - cells, np.ones((len(cells), 1))], 1)
    maps[len(CLASSES) :, rows, columns] = torch.from_numpy(told.T.astype("float32"))
    return maps


def loss(net: CenterNet, x: Tensor, maps: Tensor) -> Tensor:
    """The paper's: a focal loss of the heat maps, and the absolute errors of size and offset at the centres."""
    heat, size, offset = (output.float() for output in net(x))
    true, true_size, true_offset, centre = maps.split((len(CLASSES), 2, 2, 1), 1)
    heat = heat.clamp(1e-4, 1 - 1e-4)
    hit = (1 - heat) ** 2 * heat.log() * (true == 1)
    miss = (1 - true) ** 4 * heat**2 * (1 - heat).log() * (true < 1)
    wrong_size = F.l1_loss(size * centre, true_size, reduction="sum")
    wrong_offset = F.l1_loss(offset * centre, true_offset, reduction="sum")
    return (0.1 * wrong_size + wrong_offset - hit.sum() - miss.sum()) / centre.sum()
