"""What the networks here are made of, and how their weights are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn


def conv(
    inside: int,
    outside: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    norm: bool = True,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """A padded convolution, batch-norm in place of a bias where `norm`, and an activation, if any."""
    layers: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=not norm),
    ]
    if norm:
        layers.append(nn.BatchNorm2d(outside))
    if activation:
        layers.append(activation())
    return nn.Sequential(*layers)


def save_weights(net: nn.Module, path: Path) -> None:
    """Weights in float16."""
    state = {k: v.float().cpu().numpy().astype("float16") for k, v in net.state_dict().items() if v.is_floating_point()}
    np.savez_compressed(path, allow_pickle=False, **state)


def with_weights(net: nn.Module, path: Path) -> nn.Module:
    """The network with what `save_weights` wrote, in evaluation mode."""
    with np.load(path, allow_pickle=False) as stored:
        weights = {name: torch.from_numpy(stored[name].astype("float32")) for name in stored.files}
    net.load_state_dict(weights, strict=False)  # the batch-norms' counters are not stored
    return net.eval()
