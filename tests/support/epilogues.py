"""Small networks with what may follow a convolution: activations, residual additions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tvm.ir import IRModule

from tvm_lowrank.importers.importer import import_model

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "prelu": lambda: nn.PReLU(8),
    "tanh": nn.Tanh,
}


def imported(*layers: nn.Module, channels: int = 3) -> IRModule:
    """The canonical module of some layers on images of 12 x 12."""
    return import_model(nn.Sequential(*layers), input_shape=(1, channels, 12, 12))


class Block(nn.Module):
    """A residual block; the 1x1 convolution of its other branch comes after the main one if `late`."""

    def __init__(self, activation: nn.Module, *, project: bool = False, late: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.project = nn.Conv2d(3, 3, 1) if project else nn.Identity()
        self.activation, self.late = activation, late

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.late else self.project(x)
        main = self.second(torch.relu(self.first(x)))
        return self.activation(main + (self.project(x) if self.late else other))
