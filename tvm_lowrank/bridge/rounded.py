"""What numbers become in another format, and convolutions of whole numbers, in PyTorch.

Gradients pass as if nothing were rounded; where a number is beyond a grid, its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_lowrank.formats import LARGEST, LEVELS, Format, Grid
from tvm_lowrank.precision import Kept

EXACT = 2**24  # float32 holds whole numbers up to this

Function = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


class _Rounded(torch.autograd.Function):
    """Numbers rounded to another type, with the gradient of the numbers themselves."""

    @staticmethod
    def forward(_context: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _OnGrid(torch.autograd.Function):
    """Numbers (N, C, H, W) on a grid, in float32 whatever their type is."""

    @staticmethod
    def forward(context: Any, x: Tensor, grid: Grid) -> Tensor:
        low, high = -grid.zero, LEVELS - grid.zero
        steps = (x.float() * _like(x, grid.inverses)).round_()
        if context.needs_input_grad[0]:
            context.save_for_backward((steps >= low) & (steps <= high))
        return steps.clamp_(low, high).mul_(_like(x, grid.scales)).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (within,) = context.saved_tensors
        return gradient * within, None


class _Weights(torch.autograd.Function):
    """Weights (OIHW) that are whole multiples of a scale for each output channel, once a grid's scales are in them."""

    @staticmethod
    def forward(_context: Any, weight: Tensor, by_input: Tensor) -> Tensor:
        whole, scales = quantised(weight.float() * by_input)
        return (whole * scales / by_input).to(weight.dtype)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _like(x: Tensor, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(x.device)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`tvm_lowrank.formats.quantised` of a tensor (OIHW): whole numbers, and scales (O, 1, 1, 1), in its type."""
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    scales = torch.where(largest > 0, largest, torch.full_like(largest, LARGEST)) / LARGEST
    return (weight / scales).round(), scales


def rounder(kept: Kept) -> Function:
    """What a value becomes that is kept so."""
    if kept.grid is not None:
        grid = kept.grid
        return lambda x: _OnGrid.apply(x, grid)
    dtype = type_of(kept.format)
    return lambda x: _Rounded.apply(x, dtype)


def weight_rounder(kept: Kept) -> Function:
    """What the weights (OIHW) of a convolution become that reads what is kept so; for int8 see `integer_product`."""
    if kept.format.whole:
        return lambda weight: weight
    dtype = type_of(kept.format)
    return lambda weight: _Rounded.apply(weight, dtype)


def type_of(format: Format) -> torch.dtype:
    """PyTorch's type of a floating-point format."""
    return getattr(torch, format.name)


def integer_product(product: Product, grid: Grid) -> Product:
    """A convolution of numbers on a grid with weights (OIHW), which it rounds, as processors compute it in integers.

    Without gradients the sums are exact. Where there are any, numbers and weights are what is multiplied, as they are
    after rounding.
    """

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        by_input = _like(weight, grid.by_input(weight.shape))
        if (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)) or x.dtype != torch.float32:
            return product(x, _Weights.apply(weight, by_input))
        whole, scales = quantised(weight * by_input)
        steps = (x * _like(x, grid.inverses)).round_()
        return _sums(product, steps, whole).mul_(scales.reshape(1, -1, 1, 1))

    return convolve


def _sums(product: Product, steps: Tensor, whole: Tensor) -> Tensor:
    """The convolution of whole numbers: in float32 where it holds any sum there may be, else in float64."""
    most = float(steps.abs().max()) * float(whole.abs().sum(dim=(1, 2, 3)).max())
    if most < EXACT:
        return product(steps, whole)
    return product(steps.double(), whole.double()).float()
