"""The largest operands of convolutions, and the formats that hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from support.models import randomised
from tvm_lowrank.bridge.ranges import MOST, largest_operands
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.precision import possible

IMAGES = np.random.default_rng(0).normal(size=(300, 3, 6, 6)).astype("float32")


def network(scale: float) -> nn.Module:
    """Two convolutions, the first of which makes large numbers."""
    net = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)))
    with torch.no_grad():
        net[0].weight.mul_(scale)
    return net


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_the_largest_of_all_images_counts(scale: float) -> None:
    net = network(scale)
    mod = import_model(net, input_shape=(1, 3, 6, 6))
    sites = find_sites(mod)
    found = largest_operands(TorchBridge(mod), sites, IMAGES)
    hidden = torch.relu(net[0](torch.from_numpy(IMAGES))).abs().max()
    expected = {"0": max(np.abs(IMAGES).max(), float(net[0].weight.abs().max())), "2": float(hidden)}
    assert found == pytest.approx(expected, rel=1e-5)
    wide = ("float32", "bfloat16", "float16")
    assert tuple(possible(sites[1].spec, wide, found["2"])) == (wide if scale == 1 else wide[:2])
    assert tuple(possible(sites[1].spec, ("float16",), found["2"])) == (("float16",) if scale == 1 else ("float32",))


def test_what_is_no_number_fits_no_short_format() -> None:
    mod = import_model(network(1e36), input_shape=(1, 3, 6, 6))
    sites = find_sites(mod)
    found = largest_operands(TorchBridge(mod), sites, 1e3 * IMAGES)
    assert found["2"] == MOST
    assert tuple(possible(sites[1].spec, ("float32", "float16"), found["2"])) == ("float32",)


def test_short_formats() -> None:
    assert [name for name, format in FORMATS.items() if format.short] == ["float16"]
