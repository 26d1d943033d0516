"""The asymmetric refit: nothing is lost at full rank, and truncated networks come closer to the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from tvm.ir import IRModule

from tvm_lowrank.bridge.calibrate import collect_moments, predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS, Chain, SampledMoments, decompose, moments
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.candidates import candidates
from tvm_lowrank.searching.fit.refit import refit
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.transform import replace_sites


@pytest.fixture(scope="module")
def network() -> tuple[IRModule, np.ndarray, np.ndarray]:
    """(module, calibration images, other images): four convolutions, strides, groups, and smooth images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 8, 3, bias=False),
        nn.Flatten(),
    )
    images = nn.functional.interpolate(torch.randn(300, 8, 4, 4), size=12, mode="bilinear").numpy()
    return import_model(net, input_shape=(1, 8, 12, 12)), images[:200], images[200:]


def error(mod: IRModule, changed: IRModule, images: np.ndarray) -> float:
    dense = predict(TorchBridge(mod), images)
    return float(np.mean((predict(TorchBridge(changed), images) - dense) ** 2) / np.var(dense))


@pytest.mark.parametrize("method", ("channel", "channel_in", "dac", "spatial", "spatial_rows"))
def test_full_rank_is_exact(method: str, network: tuple[IRModule, np.ndarray, np.ndarray]) -> None:
    mod, images, others = network
    sites = find_sites(mod)
    plan = {site.id: Choice(method, METHODS[method].max_rank(site.spec)) for site in sites}
    targets = dense_outputs(TorchBridge(mod), sites, images)
    assert error(mod, replace_sites(mod, refit(mod, sites, plan, images, targets)), others) < 1e-6


@pytest.mark.parametrize("method", ("channel", "channel_in", "dac", "spatial", "spatial_rows"))
def test_comes_closer_than_independent_chains(method: str, network: tuple[IRModule, np.ndarray, np.ndarray]) -> None:
    mod, images, others = network
    sites = find_sites(mod)
    bridge = TorchBridge(mod)
    plan = {site.id: Choice(method, 5) for site in sites}
    moments = collect_moments(bridge, sites, images)
    alone = {
        site.id: decompose(site.weight, site.spec, method=method, rank=5, moments=moments[site.id]) for site in sites
    }
    plain = {site.id: decompose(site.weight, site.spec, method=method, rank=5) for site in sites}
    refitted = refit(mod, sites, plan, images, dense_outputs(bridge, sites, images))
    errors = [error(mod, replace_sites(mod, chains), others) for chains in (refitted, alone, plain)]
    assert errors[0] < errors[1] < errors[2]


def test_dense_sites_are_left_alone(network: tuple[IRModule, np.ndarray, np.ndarray]) -> None:
    mod, images, _ = network
    sites = find_sites(mod)
    targets = dense_outputs(TorchBridge(mod), sites, images[:50])
    chains = refit(mod, sites, {sites[2].id: Choice("channel", 8)}, images[:50], targets)
    assert list(chains) == [sites[2].id]


def test_the_last_factors_alone(network: tuple[IRModule, np.ndarray, np.ndarray]) -> None:
    """Chains keep their other factors, and come nearer to the dense network; only sites of the plan are asked for."""
    mod, images, others = network
    sites = {site.id: site for site in find_sites(mod)}
    bridge = TorchBridge(mod)
    targets = dense_outputs(bridge, list(sites.values()), images)
    known = collect_moments(bridge, list(sites.values()), images)
    plan = {name: Choice("channel", 4) for name in list(sites)[1:3]}

    def start(name: str, choice: Choice) -> Chain:
        assert choice == plan[name] and choice.rank is not None
        return decompose(sites[name].weight, sites[name].spec, method="channel", rank=choice.rank, moments=known[name])

    before = {name: start(name, choice) for name, choice in plan.items()}
    after = refit(mod, list(sites.values()), plan, images, targets, start=start)
    assert list(after) == list(plan)
    for name, chain in after.items():
        np.testing.assert_array_equal(chain.convs[0].weight, before[name].convs[0].weight)
    lost = [error(mod, replace_sites(mod, chains), others) for chains in (after, before)]
    assert lost[0] < lost[1]


def test_linear_layers_however_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two factors of a linear layer; of a wide one in the norm of its samples, with the last factor refit to them."""
    torch.manual_seed(0)
    front = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()]
    net = nn.Sequential(*front, nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 5))
    mod = import_model(net, input_shape=(1, 8, 12, 12))
    images = nn.functional.interpolate(torch.randn(600, 8, 4, 4), size=12, mode="bilinear").numpy()
    sites, known, others = find_sites(mod), images[:500], images[500:]
    site, choice = sites[1], Choice("svd", 8)
    targets = dense_outputs(TorchBridge(mod), sites, known)

    def fitted() -> float:
        return error(mod, replace_sites(mod, refit(mod, sites, {site.id: choice}, known, targets)), others)

    regressed = fitted()
    monkeypatch.setattr(moments, "WIDEST", 100)
    assert {own.method for own in candidates(site, methods=METHODS, lanes=8)} == {"svd"}
    plain = decompose(site.weight, site.spec, method="svd", rank=8)
    by_weights = error(mod, replace_sites(mod, {site.id: plain}), others)
    found = collect_moments(TorchBridge(mod), [site], known)[site.id]
    assert isinstance(found, SampledMoments)
    in_norm = decompose(site.weight, site.spec, method="svd", rank=8, moments=found)
    by_samples = error(mod, replace_sites(mod, {site.id: in_norm}), others)
    assert regressed < 1.2 * fitted() and fitted() < by_samples < 0.9 * by_weights
