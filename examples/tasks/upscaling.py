"""Pictures of 16x16 pixels enlarged to 32x32: an ESPCN, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import with_weights
from espcn import ESPCN
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_lowrank import example

SCALE = 2
LUMINANCE = np.array([0.299, 0.587, 0.114], "float32") / 255


def network() -> ESPCN:
    return ESPCN(SCALE)


def trained() -> nn.Module:
    """With the weights of `python train_tasks.py upscaling`."""
    return with_weights(network(), Path(__file__).with_suffix(".npz"))


def small_and_large(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The luminance, from 0 to 1, of pictures (n, 32, 32, 3): (n, 1, 16, 16), means of 2x2 pixels; (n, 1, 32, 32)."""
    large = (pictures @ LUMINANCE)[:, None]
    n, _, h, w = large.shape
    return large.reshape(n, 1, h // SCALE, SCALE, w // SCALE, SCALE).mean((3, 5)), large


def data() -> dict[str, Any]:
    with np.load(example.HERE / "images.npz", allow_pickle=False) as stored:
        parts = {part: small_and_large(stored[f"{part}_x"]) for part in ("calibration", "selection", "evaluation")}
    return {**parts, "calibration": parts["calibration"][0]}


def psnr(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each picture, (n,), in dB; 60 at most."""
    error = ((outputs.clip(0, 1) - targets) ** 2).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(error, 1e-6))


psnr.unit = "dB"


def batch(rng: np.random.Generator, pictures: np.ndarray, labels: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Pictures to train on: small and large."""
    small, large = small_and_large(pictures[rng.integers(len(pictures), size=count)])
    return torch.from_numpy(small), torch.from_numpy(large)


def loss(net: ESPCN, x: Tensor, large: Tensor) -> Tensor:
    return 100 * F.mse_loss(net(x).float(), large)
