"""How long a search is expected to take."""

from __future__ import annotations

import numpy as np
import pytest

from support.models import ResNet20, randomised
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.searching.choose.forecast import (
    DAMAGE,
    DELIVERY,
    KERNELS,
    PLANS,
    Counts,
    left,
    needs,
    seconds_of_an_image,
)
from tvm_lowrank.searching.fit.reconstruct import AN_IMAGE, forward_passes

NEEDED = {DAMAGE: 100.0, KERNELS: 50.0, PLANS: 30.0, DELIVERY: 20.0}


@pytest.mark.parametrize(
    ("taken", "seconds"),
    [
        ({}, 200.0),
        ({DAMAGE: 40.0}, 160.0),
        ({DAMAGE: 140.0}, 100.0),
        ({DAMAGE: 40.0, KERNELS: 10.0}, 90.0),  # predicting ended early
        ({DAMAGE: 40.0, KERNELS: 20.0, PLANS: 10.0}, 70.0),  # what plans choose is still tuned
        ({DAMAGE: 40.0, KERNELS: 20.0, PLANS: 10.0, DELIVERY: 5.0}, 15.0),
        ({"fine-tuning plans": 7.0}, 200.0),
    ],
)
def test_what_is_left(taken: dict[str, float], seconds: float) -> None:
    assert left(NEEDED, taken) == pytest.approx(seconds)


def test_what_a_search_needs() -> None:
    """It grows with the images and with how long one takes, and depends on how plans are recovered."""
    mod = import_model(randomised(ResNet20()), input_shape=(1, 3, 32, 32))
    sites = find_sites(mod)
    images = np.zeros((150, 3, 32, 32), np.float32)
    image = seconds_of_an_image(TorchBridge(mod), images)
    assert 1e-6 < image < 1
    few = Counts(800, 800, 200, 1000, 1000, reconstructed=0)
    many = Counts(8000, 800, 500, 1000, 9000, reconstructed=forward_passes(mod, 8000))
    assert many.reconstructed >= 8000 * AN_IMAGE
    before, after = needs(sites, few, image), needs(sites, many, image)
    assert list(before) == list(after) == [DAMAGE, KERNELS, PLANS, DELIVERY]
    assert all(before[phase] < after[phase] for phase in (DAMAGE, PLANS, DELIVERY))
    slower = needs(sites, few, 2 * image)
    assert slower[DAMAGE] == pytest.approx(2 * before[DAMAGE]) and slower[KERNELS] == before[KERNELS]


def test_a_network_too_large_for_a_reconstruction() -> None:
    mod = import_model(randomised(ResNet20()), input_shape=(1, 3, 512, 512))
    assert forward_passes(mod, 1000) == 0
