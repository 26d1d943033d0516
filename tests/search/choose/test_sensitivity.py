"""What is known of a site is worked out once."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from support.models import randomised
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import cp
from tvm_lowrank.searching.choose.sensitivity import Sensitivity


def test_what_was_solved_for_a_chain_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    mod = import_model(randomised(net), input_shape=(1, 16, 6, 6))
    images = np.random.default_rng(0).normal(size=(60, 16, 6, 6)).astype("float32")
    sensitivity = Sensitivity(mod, images, methods=("cp3",), lanes=8, share=0.01)
    choice = sensitivity.candidates["0"][0]
    first = sensitivity.weights("0", choice)

    def solve(*_: object, **__: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(cp, "solve", solve)
    for before, again in zip(first, sensitivity.weights("0", choice), strict=True):
        np.testing.assert_array_equal(before, again)
