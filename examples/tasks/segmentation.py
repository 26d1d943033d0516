"""Animals and vehicles in scenes of 96x96 pixels, pixel by pixel: a small U-Net, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import with_weights
from scenes import CLASSES, Scene, compose, images, splits, two_classes
from torch import Tensor, nn
from torch.nn import functional as F
from unet import UNet


def network() -> UNet:
    return UNet(3, 1 + len(CLASSES), widths=(16, 24, 48, 96), norm=True)


def trained() -> nn.Module:
    """With the weights of `python train_tasks.py segmentation`."""
    return with_weights(network(), Path(__file__).with_suffix(".npz"))


def target(scene: Scene) -> np.ndarray:
    """The mask (h, w): 0 for the background, 1 for animals, 2 for vehicles."""
    return scene.mask.astype("int64")


def data() -> dict[str, Any]:
    """The targets are masks (n, h, w)."""
    given = splits(target)
    for part in ("selection", "evaluation"):
        x, masks = given[part]
        given[part] = x, np.stack(masks)
    return given


def mean_overlap(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Intersection over union of each class over all images (n, classes, h, w), and the mean of these, from 0 to 1."""
    classes = outputs.shape[1]
    pairs = targets * classes + outputs.argmax(1)
    table = np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)
    shared = table.diagonal()
    return float(np.mean(shared / np.maximum(table.sum(0) + table.sum(1) - shared, 1)))


def batch(rng: np.random.Generator, pictures: np.ndarray, labels: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Scenes to train on, and their masks (n, h, w)."""
    scenes = [compose(rng, pictures, two_classes(labels)) for _ in range(count)]
    return torch.from_numpy(images(scenes)), torch.from_numpy(np.stack([target(scene) for scene in scenes]))


def loss(net: UNet, x: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(net(x).float(), masks)
