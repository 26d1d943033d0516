"""Networks for CIFAR-10 (float32 NCHW images of 3x32x32, 10 classes), untrained but for `trained_resnet20`."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# (name, output channels, kernel) of the convolutions of each block
NIN = (
    (("conv1", 192, 5), ("cccp1", 160, 1), ("cccp2", 96, 1)),
    (("conv2", 192, 5), ("cccp3", 192, 1), ("cccp4", 192, 1)),
    (("conv3", 192, 3), ("cccp5", 192, 1), ("cccp6", 10, 1)),
)


def nin(*, batch_norm: bool = True) -> nn.Sequential:
    """Network in Network (Lin et al. 2014): 0.97 M parameters, 222 M MACs, initialised as in He et al. 2015.

    With `batch_norm` each convolution but the last has one instead of a bias; the paper's network has none.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, block in enumerate(NIN, 1):
        for name, width, kernel in block:
            normed = batch_norm and name != "cccp6"
            layers[name] = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=not normed)
            nn.init.kaiming_normal_(layers[name].weight, nonlinearity="relu")
            if normed:
                layers[f"{name}_norm"] = nn.BatchNorm2d(width)
            if name != "cccp6":
                layers[f"{name}_relu"] = nn.ReLU()
            channels = width
        if i < len(NIN):
            pool = nn.MaxPool2d if i == 1 else nn.AvgPool2d
            layers[f"pool{i}"] = pool(3, 2, ceil_mode=True)
            layers[f"drop{i}"] = nn.Dropout(0.5)
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual networks of He et al. 2016, section 4.2, with 1x1 convolutions where the shape changes."""

    def __init__(self, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, inside = [], widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                layers.append(Block(inside, width, 2 if i and not j else 1))
                inside = width
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def resnet20() -> ResNet:
    """ResNet-20: 0.27 M parameters, 41 M MACs."""
    return ResNet()


def trained_resnet20() -> ResNet:
    """ResNet-20 with the weights of `python examples/cifar10/train.py --network resnet20`, in evaluation mode.

    It takes the images of the bundled example: `tvm_lowrank search --model networks.py:trained_resnet20 --input-shape
    1,3,32,32 --data example`.
    """
    net = resnet20()
    with np.load(Path(__file__).with_name("resnet20.npz"), allow_pickle=False) as stored:
        weights = {name: torch.from_numpy(stored[name].astype("float32")) for name in stored.files}
    net.load_state_dict(weights, strict=False)  # the batch-norms' counters are not stored
    return net.eval()
