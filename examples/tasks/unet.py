"""U-Net, for a class at each pixel (Ronneberger et al. 2015, arXiv 1505.04597), untrained.

Convolutions are padded, so that the output is as large as the input; the paper's are not, and lose the border.
"""

from __future__ import annotations

import torch
from blocks import conv
from torch import Tensor, nn


class UNet(nn.Module):
    """Takes images (n, channels, h, w) with sides that are multiples of 16 and outputs scores (n, classes, h, w).

    The multiple is 2 for each of the widths but the first. With `norm` each 3x3 convolution has a batch-norm, which the
    paper's have not.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 2,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(pair(a, b, norm) for a, b in zip((channels, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (1024, 512), (512, 256), ...
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in steps)
        self.up = nn.ModuleList(pair(2 * b, b, norm) for _, b in steps)
        self.last = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, down in enumerate(self.down):
            x = down(self.pool(x) if i else x)
            levels.append(x)
        for enlarge, up, level in zip(self.enlarge, self.up, levels[-2::-1], strict=True):
            x = up(torch.cat([level, enlarge(x)], 1))
        return self.last(x)


def pair(inside: int, outside: int, norm: bool) -> nn.Sequential:
    return nn.Sequential(conv(inside, outside, norm=norm), conv(outside, outside, norm=norm))


def unet() -> UNet:
    """Of the paper's widths, for grey images and two classes: 31.0 M parameters, 48 G MACs at 256x256."""
    return UNet()
