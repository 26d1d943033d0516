"""Fitted networks are found again on disk, each under its plan and the way it was fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tvm.ir import IRModule

from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import decompose
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.choose.fitted import FittedNetworks
from tvm_lowrank.transform import replace_sites

X = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype("float32")


@pytest.fixture(scope="module")
def dense() -> IRModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(128, 5))
    return import_model(net, input_shape=(1, 4, 8, 8))


def fit(dense: IRModule, plan: Plan) -> IRModule:
    """Chains with some bias correction, as every fit gives."""
    chains = {}
    for site in find_sites(dense):
        if site.id in plan:
            chain = decompose(site.weight, site.spec, method="channel", rank=plan[site.id].rank)  # type: ignore[arg-type]
            chains[site.id] = type(chain)(chain.convs, np.full(site.spec.out_channels, 0.5, "float32"))
    return replace_sites(dense, chains)


def answers(mod: IRModule) -> np.ndarray:
    return predict(TorchBridge(mod), X)


def never() -> IRModule:
    raise AssertionError("it is on disk")


def test_found_again(dense: IRModule, tmp_path: Path) -> None:
    sites = [site.id for site in find_sites(dense)]
    plans = [Plan({sites[0]: Choice("channel", 2)}), Plan({name: Choice("channel", 2) for name in sites[:2]})]
    made = [FittedNetworks(dense, tmp_path).once(plan, "decomposed", lambda p=plan: fit(dense, p)) for plan in plans]
    known = FittedNetworks(dense, tmp_path)
    for plan, network in zip(plans, made, strict=True):
        np.testing.assert_array_equal(answers(known.once(plan, "decomposed", never)), answers(network))
    with pytest.raises(AssertionError, match="on disk"):
        known.once(plans[0], "finetuned", never)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_what_is_torn_is_fitted_again(keep: int, dense: IRModule, tmp_path: Path) -> None:
    plan = Plan({find_sites(dense)[0].id: Choice("channel", 2)})
    network = FittedNetworks(dense, tmp_path).once(plan, "decomposed", lambda: fit(dense, plan))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    again = FittedNetworks(dense, tmp_path).once(plan, "decomposed", lambda: fit(dense, plan))
    np.testing.assert_array_equal(answers(again), answers(network))
    FittedNetworks(dense, tmp_path).once(plan, "decomposed", never)


def test_no_place(dense: IRModule, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        FittedNetworks(dense, tmp_path / "file" / "in").once(Plan(), "decomposed", lambda: dense)
