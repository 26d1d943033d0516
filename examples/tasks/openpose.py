"""Key points of several people by part affinity fields (Cao et al. 2017, arXiv 1611.08050), untrained.

A front of VGG-19's first ten convolutions at an eighth of the resolution, then stages of two branches each: one for the
part affinity fields, of which a pair points along each limb, and one for the heat maps of each kind of point and of the
background. Each stage sees the front's features and what the stage before it said.
"""

from __future__ import annotations

import torch
from blocks import conv
from torch import Tensor, nn

FRONT = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 256, 128)


class PoseNetwork(nn.Module):
    """Outputs the last stage's fields (n, 2 limbs, h, w) and heat maps (n, points + 1, h, w).

    The width of the stages is that of the front's last convolution. With `norm` all convolutions but the branches' last
    have a batch-norm, which the paper's have not.
    """

    def __init__(
        self,
        limbs: int = 19,
        points: int = 18,
        *,
        stages: int = 6,
        front: tuple[int | str, ...] = FRONT,
        norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in front:
            if isinstance(width, int):
                layers.append(conv(channels, width, norm=norm))
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.front = nn.Sequential(*layers)
        outputs = (2 * limbs, points + 1)
        self.stages = nn.ModuleList(
            nn.ModuleList(branch(channels, 0, out, 3, 3, 4 * channels, norm=norm) for out in outputs)
            if i == 0
            else nn.ModuleList(branch(channels, sum(outputs), out, 7, 5, channels, norm=norm) for out in outputs)
            for i in range(stages)
        )

    def all_stages(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each stage says; training compares each with the truth."""
        features = x = self.front(x)
        said = []
        for fields, heat in self.stages:
            said.append((fields(x), heat(x)))
            x = torch.cat([features, *said[-1]], 1)
        return said

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.all_stages(x)[-1]


def branch(width: int, said: int, outside: int, kernel: int, depth: int, hidden: int, *, norm: bool) -> nn.Sequential:
    """Convolutions of one width on the features and what was said before, then two of 1x1."""
    layers = [conv(width if i else width + said, width, kernel, norm=norm) for i in range(depth)]
    return nn.Sequential(*layers, conv(width, hidden, 1, norm=norm), nn.Conv2d(hidden, outside, 1))


def openpose() -> PoseNetwork:
    """For COCO's people, 18 points and 19 limbs: 52.3 M parameters, 136 G MACs at 368x368."""
    return PoseNetwork()
