"""The trained networks in `examples/tasks` are as good as its README says."""

from __future__ import annotations

from types import ModuleType

import detection
import keypoints
import numpy as np
import pytest
import segmentation
import torch
import train_tasks
import upscaling
from torch.nn import functional as F

pytestmark = pytest.mark.slow


def score(task: ModuleType, metric: str, images: int = 200) -> float:
    """Of the first evaluation images."""
    x, y = task.data()["evaluation"]
    return float(np.mean(getattr(task, metric)(train_tasks.outputs(task.trained(), x[:images]), y[:images])))


def test_boxes() -> None:
    pytest.importorskip("pycocotools")
    assert score(detection, "precision_50") > 0.9
    assert score(detection, "precision") > 0.75


def test_key_points() -> None:
    pytest.importorskip("pycocotools")
    assert score(keypoints, "precision") > 0.75


def test_masks() -> None:
    assert score(segmentation, "mean_overlap") > 0.8


def test_pictures() -> None:
    small, large = (torch.from_numpy(a) for a in upscaling.data()["evaluation"])
    plain = F.interpolate(small, scale_factor=2, mode="bicubic")
    assert score(upscaling, "psnr", 2000) > upscaling.psnr(plain.numpy(), large.numpy()).mean() + 0.8


def test_training_starts() -> None:
    """A few steps of every task, on random pictures."""
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (50, 32, 32, 3), dtype="uint8"), rng.integers(0, 10, 50)
    for task in (detection, keypoints, segmentation, upscaling):
        net = train_tasks.train(task, pictures, labels, steps=2, rate=1e-3, seed=0)
        assert all(p.isfinite().all() for p in net.parameters())
