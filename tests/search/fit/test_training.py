"""Training in bfloat16 is what it is in float32, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tvm_lowrank.bridge.half import has_bfloat16
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.searching.fit.training import Learner

CPU = torch.device("cpu")
UNIT = 2.0**-8  # between neighbouring bfloat16 numbers near 1; rounding errs by half of it
X = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("float32"))


def network(*, absolute: bool = False) -> TorchBridge:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    if absolute:
        for values in net.parameters():
            values.data = values.data.abs()
    return TorchBridge(import_model(net, input_shape=(1, 3, 8, 8)))


def test_what_the_environment_says_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, known in (("1", True), ("0", False)):
        monkeypatch.setenv("TVM_LOWRANK_BFLOAT16", said)
        assert has_bfloat16(CPU) is known


def test_bfloat16_errs_by_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer rounds its input, weights, bias and output, by at most half a unit each; products are summed in float32.

    To first order the error of a whole network is then 4 halves for each rounded layer (three with parameters, the
    pooling) of what it computes with the absolute values of everything (Higham, Accuracy and Stability, ch. 3; ReLU
    changes no error for the worse). 10 % more cover the second order.
    """
    monkeypatch.setenv("TVM_LOWRANK_BFLOAT16", "0")
    exact = Learner(network())(X)
    monkeypatch.setenv("TVM_LOWRANK_BFLOAT16", "1")
    rounded = Learner(network())(X)
    assert rounded.dtype == torch.float32
    bound = 1.1 * 4 * 4 * UNIT / 2 * network(absolute=True)(X.abs())
    error = (rounded - exact).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-3 * exact.abs().max()  # float32 would err by a ten-thousandth of that


def test_gradients_in_bfloat16_point_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding errs by 1 part in 256 at most a step, in random directions: 1 - cosine is of the order of its square."""
    gradients = []
    for said in "01":
        monkeypatch.setenv("TVM_LOWRANK_BFLOAT16", said)
        learner = Learner(network(), learns=True)
        learner(X).square().sum().backward()
        gradients.append(torch.cat([values.grad.flatten() for values in learner.parameters if values.grad is not None]))
        assert gradients[-1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 1 - 16 * UNIT**2
