"""Peaks of heat maps, as detectors of centres and networks of key points have them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def peaks(heat: np.ndarray, least: float, limit: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Positions (k, 3), as map, row and column, and heights (k,) of the peaks of heat maps (maps, h, w), highest first.

    A peak is above `least` and no lower than its eight neighbours.
    """
    heat = np.ascontiguousarray(heat, "float32")
    highest = F.max_pool2d(torch.from_numpy(heat)[None], 3, stride=1, padding=1)[0].numpy()
    at = np.argwhere((heat == highest) & (heat > least))
    heights = heat[tuple(at.T)]
    order = np.argsort(-heights, kind="stable")[:limit]
    return at[order], heights[order]


def between(heat: np.ndarray, row: int, column: int) -> np.ndarray:
    """x and y of the peak of a map (h, w) near a position, between positions: of parabolas through the logarithms."""
    logs = np.log(np.maximum(heat, 1e-6))
    return np.array([vertex(logs[row], column), vertex(logs[:, column], row)])


def vertex(values: np.ndarray, at: int) -> float:
    """Where a parabola through three of the values has its vertex, at most half a position from their highest."""
    middle = min(max(at, 1), len(values) - 2)
    before, here, after = values[middle - 1 : middle + 2]
    bend = before - 2 * here + after
    shift = (before - after) / (2 * bend) if bend < 0 else 0.0
    return float(np.clip(middle + shift, at - 0.5, at + 0.5))


def bumps(at: np.ndarray, spread: np.ndarray, size: int) -> Tensor:
    """The highest of Gaussians around positions (k, 2), x before y, with standard deviations (k,): (size, size)."""
    steps = np.arange(size)
    across = np.exp(-((steps - at[:, :1]) ** 2) / (2 * spread[:, None] ** 2))
    along = np.exp(-((steps - at[:, 1:]) ** 2) / (2 * spread[:, None] ** 2))
    heat = (along[:, :, None] * across[:, None, :]).max(0, initial=0)
    return torch.from_numpy(heat.astype("float32"))
