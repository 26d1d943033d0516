"""DenseNet-121 (Huang et al. 2017, arXiv 1608.06993), untrained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """Adds `growth` channels to its input's; batch-norm and ReLU come before each convolution."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def transition(inside: int) -> nn.Sequential:
    """Halves the channels and the resolution."""
    conv = nn.Conv2d(inside, inside // 2, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inside), nn.ReLU(), conv, nn.AvgPool2d(2))


def densenet121(classes: int = 1000, growth: int = 32) -> nn.Sequential:
    """8.0 M parameters, 2.8 G MACs at 224x224."""
    channels = 2 * growth
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
        *(nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)),
    ]
    for i, depth in enumerate((6, 12, 24, 16)):
        if i:
            layers.append(transition(channels))
            channels //= 2
        for _ in range(depth):
            layers.append(Layer(channels, growth))
            channels += growth
    ends = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *ends, nn.Linear(channels, classes))
