"""A small detector without anchors (Zhou et al. 2019, "Objects as points", arXiv 1904.07850), untrained.

The backbone is made of plain 3x3 convolutions, with a feature pyramid (Lin et al. 2017, arXiv 1612.03144) that brings
its features back to a quarter of the resolution.
"""

from __future__ import annotations

from blocks import conv
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 4


class CenterNet(nn.Module):
    """Takes images (n, 3, h, w) with sides that are multiples of 16; outputs of h / 4 and w / 4 positions.

    Heat maps (n, classes, ...) from 0 to 1, sizes (n, 2, ...) and offsets of the centre from the position's corner
    (n, 2, ...), both x before y and in units of 4 pixels.
    """

    def __init__(self, classes: int = 2, widths: tuple[int, int, int, int] = (24, 48, 64, 96)) -> None:
        super().__init__()
        stem, *deeper = widths
        self.stem = conv(3, stem, stride=2)
        self.levels = nn.ModuleList(
            nn.Sequential(conv(a, b, stride=2), conv(b, b)) for a, b in zip(widths, deeper, strict=False)
        )
        pyramid = deeper[0]
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in deeper)
        self.smooth = conv(pyramid, pyramid)
        self.heat, self.size, self.offset = (
            nn.Sequential(conv(pyramid, pyramid), nn.Conv2d(pyramid, out, 1)) for out in (classes, 2, 2)
        )
        nn.init.constant_(self.heat[-1].bias, -2.2)  # nearly all positions are none: start with one in ten

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        levels = []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        x = self.lateral[-1](levels[-1])
        for level, lateral in zip(levels[-2::-1], list(self.lateral)[-2::-1], strict=True):
            x = lateral(level) + F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.smooth(x)
        return self.heat(x).sigmoid(), self.size(x), self.offset(x)


def centernet() -> CenterNet:
    """For two classes: 0.33 M parameters, 84 M MACs at 96x96."""
    return CenterNet()
