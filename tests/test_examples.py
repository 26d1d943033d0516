"""The networks in `examples/` are what their docstrings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_lowrank import example
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model

CIFAR10 = Path(__file__).parents[1] / "examples" / "cifar10"


def test_trained_resnet20() -> None:
    mod = import_model(f"{CIFAR10 / 'networks.py'}:trained_resnet20", input_shape=example.INPUT_SHAPE)
    sites = find_sites(mod)
    assert len(sites) == 1 + 18 + 2 + 1  # stem, blocks, projections, classifier
    assert sum(site.macs for site in sites) == pytest.approx(41e6, rel=0.01)
    images, labels = example.data()["evaluation"]
    assert 100 * np.mean(predict(TorchBridge(mod), images).argmax(axis=1) == labels) == pytest.approx(90.05, abs=0.2)
