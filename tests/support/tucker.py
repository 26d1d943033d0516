"""Checks and material that the tests of Tucker-2, block terms and their ranks share."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tvm_lowrank import example
from tvm_lowrank.methods import ConvSpec, compose
from tvm_lowrank.methods.moments import grouped


def convolve(x: torch.Tensor, spec: ConvSpec, weight: np.ndarray) -> torch.Tensor:
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, torch.from_numpy(weight), None, spec.strides, 0, spec.dilation, spec.groups)


def check_chain_computes_its_kernel(
    spec: ConvSpec, specs: tuple[ConvSpec, ...], weights: tuple[np.ndarray, ...]
) -> None:
    """The convolutions, run by torch one after the other, do what the one that they compose to does."""
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((2, spec.in_channels, 11, 14)))
    expected, y = convolve(x, spec, compose(specs, weights, spec.groups)), x
    for part, weight in zip(specs, weights, strict=True):
        assert weight.shape == part.weight_shape
        y = convolve(y, part, weight)
    torch.testing.assert_close(y, expected)


def centred_error(spec: ConvSpec, missing: np.ndarray, x: np.ndarray) -> float:
    """Mean squared output error of an OIHW kernel error over (g, count, D) columns, its mean taken back by a bias."""
    errors = x @ grouped(missing, spec).transpose(0, 2, 1)
    return float(np.sum((errors - errors.mean(axis=1, keepdims=True)) ** 2) / x.shape[1])


def conv6() -> np.ndarray:
    """A trained layer: 256 to 256 channels, 3 x 3."""
    return dict(example.model().named_parameters())["conv6.weight"].detach().numpy()
