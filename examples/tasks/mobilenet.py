"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) and V3 (Howard et al. 2019, arXiv 1905.02244), untrained.

Depthwise convolutions between two 1x1 convolutions, of which the first widens and the second narrows.
"""

from __future__ import annotations

from blocks import conv
from torch import Tensor, nn

# how much wider, channels, blocks, stride of the first
V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
RE, HS = nn.ReLU, nn.Hardswish
# kernel, channels inside, channels, whether squeezed, activation, stride
V3_LARGE = (
    (3, 16, 16, False, RE, 1),
    (3, 64, 24, False, RE, 2),
    (3, 72, 24, False, RE, 1),
    (5, 72, 40, True, RE, 2),
    (5, 120, 40, True, RE, 1),
    (5, 120, 40, True, RE, 1),
    (3, 240, 80, False, HS, 2),
    (3, 200, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1),
    (3, 480, 112, True, HS, 1),
    (3, 672, 112, True, HS, 1),
    (5, 672, 160, True, HS, 2),
    (5, 960, 160, True, HS, 1),
    (5, 960, 160, True, HS, 1),
)
V3_SMALL = (
    (3, 16, 16, True, RE, 2),
    (3, 72, 24, False, RE, 2),
    (3, 88, 24, False, RE, 1),
    (5, 96, 40, True, HS, 2),
    (5, 240, 40, True, HS, 1),
    (5, 240, 40, True, HS, 1),
    (5, 120, 48, True, HS, 1),
    (5, 144, 48, True, HS, 1),
    (5, 288, 96, True, HS, 2),
    (5, 576, 96, True, HS, 1),
    (5, 576, 96, True, HS, 1),
)


class Squeeze(nn.Module):
    """Scales each channel by a number from 0 to 1 that depends on the means of all (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = multiple_of_8(channels / 4)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *(nn.Conv2d(channels, narrow, 1), nn.ReLU()),
            *(nn.Conv2d(narrow, channels, 1), nn.Hardsigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class Bottleneck(nn.Module):
    """1x1 to `wide` channels where that is more, depthwise, 1x1 without activation; a shortcut where shapes allow."""

    def __init__(
        self,
        inside: int,
        wide: int,
        outside: int,
        kernel: int,
        stride: int,
        activation: type[nn.Module],
        squeezed: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if wide == inside else [conv(inside, wide, 1, activation=activation)]
        layers.append(conv(wide, wide, kernel, stride, groups=wide, activation=activation))
        if squeezed:
            layers.append(Squeeze(wide))
        self.layers = nn.Sequential(*layers, conv(wide, outside, 1, activation=None))
        self.shortcut = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def multiple_of_8(number: float) -> int:
    """The nearest multiple of 8, but not below 90 % of the number."""
    nearest = max(8, int(number + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * number else nearest + 8


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """3.5 M parameters, 301 M MACs at 224x224."""
    layers: list[nn.Module] = [conv(3, 32, stride=2, activation=nn.ReLU6)]
    inside = 32
    for wider, outside, blocks, stride in V2:
        for i in range(blocks):
            layers.append(Bottleneck(inside, wider * inside, outside, 3, 1 if i else stride, nn.ReLU6))
            inside = outside
    ends = (conv(inside, 1280, 1, activation=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(*layers, *ends, nn.Linear(1280, classes))


def mobilenet_v3_large() -> nn.Sequential:
    """5.5 M parameters, 217 M MACs at 224x224."""
    return mobilenet_v3(V3_LARGE, 960, 1280)


def mobilenet_v3_small() -> nn.Sequential:
    """2.5 M parameters, 57 M MACs at 224x224."""
    return mobilenet_v3(V3_SMALL, 576, 1024)


def mobilenet_v3(blocks: tuple[tuple, ...], wide: int, hidden: int, classes: int = 1000) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, 16, stride=2, activation=HS)]
    inside = 16
    for kernel, expanded, outside, squeezed, activation, stride in blocks:
        layers.append(Bottleneck(inside, expanded, outside, kernel, stride, activation, squeezed))
        inside = outside
    ends = (conv(inside, wide, 1, activation=HS), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *ends, nn.Linear(wide, hidden), HS(), nn.Dropout(0.2), nn.Linear(hidden, classes))
