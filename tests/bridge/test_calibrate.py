"""Moments against the columns that torch's unfold makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.models import randomised
from support.samples import module
from tvm_lowrank.bridge import calibrate
from tvm_lowrank.bridge.calibrate import (
    collect_moments,
    positions_of,
    predict,
    predict_each,
    sample_columns,
    sample_positions,
)
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import ConvSpec, decompose
from tvm_lowrank.transform import replace_sites

SPEC = ConvSpec(4, 6, (3, 2), strides=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2)


class Forked(nn.Module):
    """A network in which the input of a site is needed again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.grouped(x))
        return self.fc(torch.relu(self.strided(x)).mean((2, 3)))


def unfolded(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """All columns of a convolution: (n, g, D, positions)."""
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(padded, spec.kernel, dilation=spec.dilation, stride=spec.strides)
    return columns.reshape(len(x), spec.groups, -1, columns.shape[2])


def test_sampled_columns_are_those_of_unfold() -> None:
    x = torch.randn(5, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    height, width = SPEC.output_size((9, 8))
    rows, cols = sample_positions("conv", 0, 5, (height, width), draws=32)
    got = sample_columns(x, SPEC, rows, cols)
    flat = rows * width + cols
    expected = torch.stack([unfolded(x, SPEC)[i][:, :, flat[i]] for i in range(5)])  # n, g, D, k
    torch.testing.assert_close(got, expected.permute(1, 0, 3, 2).flatten(1, 2))


def test_positions_are_distinct_and_repeatable() -> None:
    rows, cols = sample_positions("conv", 100, 7, (8, 9), draws=32)
    assert all(len(set(zip(r.tolist(), c.tolist(), strict=True))) == 32 for r, c in zip(rows, cols, strict=True))
    again = sample_positions("conv", 100, 7, (8, 9), draws=32)
    assert torch.equal(rows, again[0]) and torch.equal(cols, again[1])
    assert not torch.equal(rows, sample_positions("conv", 107, 7, (8, 9), draws=32)[0])


@pytest.mark.parametrize("block", [5, calibrate.BLOCK])
def test_moments_of_all_positions_are_exact(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BLOCK", block)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SPEC.weight_shape).astype("float32")
    mod = module(SPEC, weight, None, (6, 7), "NCHW")  # fewer positions than are sampled
    images = rng.standard_normal((23, 4, 6, 7)).astype("float32") + 0.5
    bridge = TorchBridge(mod)
    moments = collect_moments(bridge, find_sites(mod), images)["layer1.conv"]
    columns = unfolded(torch.from_numpy(images), SPEC).permute(1, 0, 3, 2).flatten(1, 2).numpy().astype("float64")
    np.testing.assert_allclose(moments.mean, columns.mean(axis=1), atol=1e-5)
    for group in range(SPEC.groups):
        np.testing.assert_allclose(moments.covariance[group], np.cov(columns[group].T, bias=True), atol=1e-5)


def test_predict_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mod = module(SPEC, rng.standard_normal(SPEC.weight_shape).astype("float32"), None, (6, 7), "NCHW")
    images = rng.standard_normal((7, 4, 6, 7)).astype("float32")
    whole = predict(TorchBridge(mod), images)
    monkeypatch.setattr(calibrate, "batch_of", lambda images: 3)
    np.testing.assert_allclose(predict(TorchBridge(mod), images), whole, atol=1e-5)


def test_large_images_come_in_smaller_batches() -> None:
    sizes = {size: calibrate.batch_of(np.empty((1000, 1, size, size))) for size in (32, 126, 224, 1024)}
    assert sizes == {32: 100, 126: 6, 224: 2, 1024: 2}
    starts = [(start, len(chunk)) for start, chunk in calibrate.batches(np.zeros((250, 1, 2, 2), "float32"))]
    assert starts == [(0, 100), (100, 100), (200, 50)]


@pytest.mark.parametrize("site", ["grouped", "strided", "fc"])
def test_a_site_replaced_without_rebuilding_the_network(site: str) -> None:
    mod = import_model(randomised(Forked()).eval(), input_shape=(1, 3, 8, 8))
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype("float32")
    methods = {"grouped": ("spatial", (1, 3)), "strided": ("spatial_rows", (2, 4)), "fc": ("svd", (2, 3))}
    method, tried = methods[site]
    own = next(each for each in find_sites(mod) if each.id == site)
    moments = collect_moments(TorchBridge(mod), [own], images)[site]
    chains = [decompose(own.weight, own.spec, method=method, rank=rank, moments=moments) for rank in tried]
    assert any(chain.bias_correction is not None for chain in chains)
    found = predict_each(TorchBridge(mod), images, site, chains)
    for chain, outputs in zip(chains, found, strict=True):
        expected = predict(TorchBridge(replace_sites(mod, {site: chain})), images)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
    with pytest.raises(KeyError):
        predict_each(TorchBridge(mod), images, "absent", chains)


def test_samples_do_not_outgrow_memory() -> None:
    wide, narrow = ConvSpec(512, 512, (3, 3)), ConvSpec(16, 16, (3, 3))
    assert [positions_of(narrow, (14, 14), images) for images in (10, 400, 1000, 5000)] == [96, 80, 32, 32]
    assert positions_of(narrow, (2, 3), 10) == 6
    for spec in (wide, ConvSpec(64, 2048, (1, 1)), ConvSpec(1024, 1024, (3, 3), groups=4)):
        for images in (100, 1000, 5000):
            samples = images * positions_of(spec, (14, 14), images)
            columns = samples * int(np.prod(spec.weight_shape[1:])) * spec.groups
            assert max(columns, 4 * samples * spec.out_channels) <= calibrate.SAMPLED_NUMBERS
    assert 1000 * positions_of(wide, (7, 7), 1000) >= 3 * 4608
    assert positions_of(wide, (7, 7), 10**6) == 1  # of each image at least one
