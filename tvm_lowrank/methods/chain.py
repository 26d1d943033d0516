"""The vocabulary of decomposition: the shape of a convolution, and the chain that replaces one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Pair = tuple[int, int]
Rank = int | tuple[int, ...]


def as_int(rank: Rank) -> int:
    """The rank of a method that has one number for it."""
    if isinstance(rank, tuple):
        raise ValueError(f"rank {rank} has {len(rank)} numbers; this method takes one")
    return int(rank)


@dataclass(frozen=True)
class ConvSpec:
    """Everything about a 2-D convolution but its weights and the size of its input."""

    in_channels: int
    out_channels: int
    kernel: Pair
    strides: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"channels {self.in_channels}->{self.out_channels} do not divide into {self.groups} groups"
            )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """OIHW: (out_channels, in_channels / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def output_size(self, size: Pair) -> Pair:
        """(height, width) of the output for an input of (height, width)."""
        top, left, bottom, right = self.padding
        height, width = (
            (extent + pads - dilation * (kernel - 1) - 1) // stride + 1
            for extent, pads, kernel, stride, dilation in zip(
                size, (top + bottom, left + right), self.kernel, self.strides, self.dilation, strict=True
            )
        )
        return height, width

    def macs(self, size: Pair) -> int:
        """Multiply-accumulates for one image whose input is (height, width)."""
        return int(np.prod(self.output_size(size)) * np.prod(self.weight_shape))

    def columns(self) -> ConvSpec:
        """The same convolution along the kernel's height only: the kh x 1 factor's geometry."""
        top, _, bottom, _ = self.padding
        return replace(
            self,
            kernel=(self.kernel[0], 1),
            strides=(self.strides[0], 1),
            padding=(top, 0, bottom, 0),
            dilation=(self.dilation[0], 1),
        )

    def rows(self) -> ConvSpec:
        """The same convolution along the kernel's width only: the 1 x kw factor's geometry."""
        _, left, _, right = self.padding
        return replace(
            self,
            kernel=(1, self.kernel[1]),
            strides=(1, self.strides[1]),
            padding=(0, left, 0, right),
            dilation=(1, self.dilation[1]),
        )

    def pointwise(self) -> ConvSpec:
        """A 1 x 1 convolution with the same channels and groups."""
        return ConvSpec(self.in_channels, self.out_channels, (1, 1), groups=self.groups)


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with its weights (float32, OIHW)."""

    spec: ConvSpec
    weight: np.ndarray

    def __post_init__(self) -> None:
        if self.weight.shape != self.spec.weight_shape:
            raise ValueError(f"weight {self.weight.shape} does not fit {self.spec}")


@dataclass(frozen=True, eq=False)
class Chain:
    """The convolutions that replace a site, in order, and what to add to the site's bias (shape (N,)) after the last.

    Only the last convolution has a bias: one further in front would be wrong at zero-padded borders.
    """

    convs: tuple[Conv, ...]
    bias_correction: np.ndarray | None = None

    @property
    def specs(self) -> tuple[ConvSpec, ...]:
        return tuple(conv.spec for conv in self.convs)


def chain_macs(specs: Iterable[ConvSpec], size: Pair) -> int:
    """Multiply-accumulates of a chain for one image whose input is (height, width)."""
    total = 0
    for spec in specs:
        total += spec.macs(size)
        size = spec.output_size(size)
    return total


def compose(specs: Sequence[ConvSpec], weights: Sequence[np.ndarray], groups: int = 1) -> np.ndarray:
    """The OIHW kernel of the one convolution, of `groups` groups, that a chain of OIHW weights computes.

    Along each axis at most one of the convolutions may be larger than 1, as in all chains here: then strides,
    dilation and padding are the composed convolution's, and taps multiply.
    """
    composed = ungrouped(weights[0], specs[0].groups)
    for spec, weight in zip(specs[1:], weights[1:], strict=True):
        taps = np.einsum("nrab,rcij->ncaibj", ungrouped(weight, spec.groups), composed, optimize=True)
        n, c, a, i, b, j = taps.shape
        if min(a, i) > 1 or min(b, j) > 1:
            raise ValueError("two convolutions of the chain extend along the same axis")
        composed = taps.reshape(n, c, a * i, b * j)
    n, c, height, width = composed.shape
    blocks = composed.reshape(groups, n // groups, groups, c // groups, height, width)
    return np.concatenate([blocks[g, :, g] for g in range(groups)])


def response(specs: Sequence[ConvSpec], weights: Sequence[np.ndarray], column: np.ndarray) -> np.ndarray:
    """What a chain of OIHW weights makes of one column of its site, (C, kh, kw) with all groups: (N,)."""
    values = column
    for spec, weight in zip(specs, weights, strict=True):
        windows = sliding_window_view(values, spec.kernel, axis=(1, 2))  # strides and padding are already in a column
        windows = windows.reshape(spec.groups, -1, *windows.shape[1:])
        filters = weight.reshape(spec.groups, -1, *weight.shape[1:])
        values = np.einsum("gchwab,gncab->gnhw", windows, filters, optimize=True).reshape(-1, *windows.shape[2:4])
    return values.reshape(-1)


def ungrouped(weight: np.ndarray, groups: int) -> np.ndarray:
    """The OIHW weight of the same convolution without groups: zeros where a group does not look."""
    if groups == 1:
        return weight
    out, inner, *kernel = weight.shape
    dense = np.zeros((groups, out // groups, groups, inner, *kernel), weight.dtype)
    for g, block in enumerate(weight.reshape(groups, out // groups, inner, *kernel)):
        dense[g, :, g] = block
    return dense.reshape(out, groups * inner, *kernel)


def as_numbers(rank: Rank, count: int) -> tuple[int, ...]:
    """The rank of a method that has `count` numbers for it."""
    if not isinstance(rank, tuple) or len(rank) != count:
        raise ValueError(f"rank {rank!r} is not a tuple of {count} numbers")
    return tuple(int(number) for number in rank)
