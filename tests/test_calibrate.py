"""Moments against the columns that torch's unfold makes."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from support.samples import module
from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.calibrate import collect_moments, predict, sample_columns, sample_positions
from tvm_lowrank.graph import find_sites
from tvm_lowrank.methods import ConvSpec

SPEC = ConvSpec(4, 6, (3, 2), strides=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2)


def unfolded(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """All columns of a convolution: (n, g, D, positions)."""
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(padded, spec.kernel, dilation=spec.dilation, stride=spec.strides)
    return columns.reshape(len(x), spec.groups, -1, columns.shape[2])


def test_sampled_columns_are_those_of_unfold() -> None:
    x = torch.randn(5, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    height, width = SPEC.output_size((9, 8))
    rows, cols = sample_positions("conv", 0, 5, (height, width))
    got = sample_columns(x, SPEC, rows, cols)
    flat = rows * width + cols
    expected = torch.stack([unfolded(x, SPEC)[i][:, :, flat[i]] for i in range(5)])  # n, g, D, k
    torch.testing.assert_close(got, expected.permute(1, 0, 3, 2).flatten(1, 2))


def test_positions_are_distinct_and_repeatable() -> None:
    rows, cols = sample_positions("conv", 100, 7, (8, 9))
    assert all(len(set(zip(r.tolist(), c.tolist(), strict=True))) == 32 for r, c in zip(rows, cols, strict=True))
    again = sample_positions("conv", 100, 7, (8, 9))
    assert torch.equal(rows, again[0]) and torch.equal(cols, again[1])
    assert not torch.equal(rows, sample_positions("conv", 107, 7, (8, 9))[0])


def test_moments_of_all_positions_are_exact() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SPEC.weight_shape).astype("float32")
    mod = module(SPEC, weight, None, (6, 7), "NCHW")  # fewer positions than are sampled
    images = rng.standard_normal((23, 4, 6, 7)).astype("float32") + 0.5
    bridge = TorchBridge(mod)
    moments = collect_moments(bridge, find_sites(mod), images, batch=10)["layer1.conv"]
    columns = unfolded(torch.from_numpy(images), SPEC).permute(1, 0, 3, 2).flatten(1, 2).numpy().astype("float64")
    np.testing.assert_allclose(moments.mean, columns.mean(axis=1), atol=1e-5)
    for group in range(SPEC.groups):
        np.testing.assert_allclose(moments.covariance[group], np.cov(columns[group].T, bias=True), atol=1e-5)


def test_predict_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    mod = module(SPEC, rng.standard_normal(SPEC.weight_shape).astype("float32"), None, (6, 7), "NCHW")
    images = rng.standard_normal((7, 4, 6, 7)).astype("float32")
    np.testing.assert_allclose(predict(TorchBridge(mod), images, batch=3), predict(TorchBridge(mod), images), atol=1e-5)
