"""SSD300, a detector on VGG-16 (Liu et al. 2016, "SSD: Single shot multibox detector"), untrained.

It takes images of 3x300x300. 8,732 boxes: on feature maps of 38, 19, 10, 5, 3 and 1 positions a side, four boxes of
different size and shape at each position, or six.
"""

from __future__ import annotations

import torch
from blocks import conv
from torch import Tensor, nn
from torch.nn import functional as F

FRONT = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "ceil", 512, 512, 512)  # to conv4_3, 38x38
BOXES = (4, 6, 6, 6, 4, 4)  # at each position of a feature map
EXTRAS = ((256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1))  # widths of 1x1 and 3x3, stride


def plain(inside: int, outside: int, kernel: int = 3) -> nn.Sequential:
    return conv(inside, outside, kernel, norm=False)


class L2Norm(nn.Module):
    """Scales the channels at each position to length 1, then by a learned factor each (Liu et al. 2015, "ParseNet")."""

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) * self.scale.view(1, -1, 1, 1)


class SSD300(nn.Module):
    """Outputs box offsets (n, 8732, 4), relative to the default boxes, and class scores (n, 8732, classes).

    Class 0 is the background. `boxes.py` has the default boxes and what to do with the outputs.
    """

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in FRONT:
            if isinstance(width, int):
                layers.append(plain(channels, width))
                channels = width
            else:
                layers.append(nn.MaxPool2d(2, ceil_mode=width == "ceil"))
        self.front = nn.Sequential(*layers)
        self.norm = L2Norm(512)
        self.fc7 = nn.Sequential(
            nn.MaxPool2d(2),
            *(plain(512, 512) for _ in range(3)),
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.ReLU(),
            plain(1024, 1024, 1),
        )
        maps = [512, 1024]
        self.extras = nn.ModuleList()
        for narrow, wide, stride in EXTRAS:
            last = nn.Conv2d(narrow, wide, 3, stride, padding=stride - 1)
            self.extras.append(nn.Sequential(plain(maps[-1], narrow, 1), last, nn.ReLU()))
            maps.append(wide)
        self.offsets = nn.ModuleList(nn.Conv2d(c, b * 4, 3, padding=1) for c, b in zip(maps, BOXES, strict=True))
        self.scores = nn.ModuleList(nn.Conv2d(c, b * classes, 3, padding=1) for c, b in zip(maps, BOXES, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.front(x)
        maps = [self.norm(x), self.fc7(x)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return joined(self.offsets, maps, 4), joined(self.scores, maps, self.scores[0].out_channels // BOXES[0])


def joined(heads: nn.ModuleList, maps: list[Tensor], numbers: int) -> Tensor:
    """The heads' outputs (n, boxes x numbers, h, w) as one list of boxes (n, boxes, numbers)."""
    outputs = (head(x).permute(0, 2, 3, 1).flatten(1) for head, x in zip(heads, maps, strict=True))
    return torch.cat(list(outputs), 1).unflatten(1, (-1, numbers))


def ssd300() -> SSD300:
    """For the 20 classes of Pascal VOC: 26.3 M parameters, 31.4 G MACs."""
    return SSD300()
