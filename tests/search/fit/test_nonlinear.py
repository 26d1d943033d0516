"""The refit through the activation: its two steps, and what it gains over the linear refit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tvm.ir import IRModule

from support.epilogues import ACTIVATIONS, Block, imported
from tvm_lowrank import example
from tvm_lowrank.bridge.calibrate import collect_moments, predict
from tvm_lowrank.bridge.epilogue import epilogue
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS, compose, decompose
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.fit.nonlinear import Response, chain_outputs
from tvm_lowrank.searching.fit.refit import refit, site_columns
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.transform import replace_sites


def response(name: str, floor: Tensor | None) -> Response:
    if name == "identity":
        return Response(None, floor)
    mod = imported(nn.Conv2d(3, 8, 1), ACTIVATIONS[name](), nn.Conv2d(8, 2, 1))
    return Response(epilogue(mod["main"], "0").activation, floor)


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("name", ["identity", *ACTIVATIONS])
def test_z_step(name: str, floored: bool, penalty: float) -> None:
    """It never raises the objective, and comes near the best of a fine grid."""
    generator = torch.Generator().manual_seed(0)
    p, u, floor = (scale * torch.randn(200, 8, generator=generator) for scale in (3, 3, 1))
    respond = response(name, floor if floored else None)

    def objective(z: Tensor) -> Tensor:
        return (respond(u) - respond(z)).square() + penalty * (z - p).square()

    reached = objective(respond.solve(p, u, penalty))
    assert (reached <= objective(p) + 1e-6).all()
    grid = torch.stack([objective(torch.lerp(p, u, t)) for t in torch.linspace(-0.5, 1.5, 401).tolist()])
    best = grid.min(dim=0).values
    if name in ("identity", "relu"):
        assert (reached <= best + 1e-5).all()
    gained, possible = (objective(p) - reached).mean(), (objective(p) - best).mean()
    assert gained >= 0.95 * possible


def test_infinite_floor_leaves_elements_alone() -> None:
    p, u = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for name in ("identity", "relu", "silu"):
        assert torch.equal(response(name, torch.full_like(p, torch.inf)).solve(p, u, 0.1), p)


@pytest.mark.parametrize("method", ["channel", "channel_in", "dac", "spatial", "spatial_channel", "spatial_rows"])
@pytest.mark.parametrize("groups", [1, 2])
def test_chain_outputs_are_those_of_the_composed_kernel(method: str, groups: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=1, groups=groups)
    mod = import_model(convolution, input_shape=(1, 8, 12, 12))
    (site,) = find_sites(mod)
    images = np.random.default_rng(0).standard_normal((20, 8, 12, 12)).astype("float32")
    bridge = TorchBridge(mod)
    rank = METHODS[method].max_rank(site.spec)
    rank = tuple(max(1, r // 2) for r in rank) if isinstance(rank, tuple) else max(1, rank // 2)
    moments = collect_moments(bridge, [site], images)[site.id]
    chain = decompose(site.weight, site.spec, method=method, rank=rank, moments=moments)
    columns, _ = site_columns(bridge, site, images)
    kernel = torch.from_numpy(compose(chain.specs, [c.weight for c in chain.convs], groups))
    assert chain.bias_correction is not None
    each = columns @ kernel.float().reshape(groups, 12 // groups, -1).mT
    expected = each.transpose(0, 1).flatten(1) + torch.from_numpy(chain.bias_correction)
    torch.testing.assert_close(chain_outputs(chain, columns), expected, rtol=1e-4, atol=1e-4)


def smooth_images(count: int, channels: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=12, mode="bilinear").numpy()


def errors(mod: IRModule, plan: Plan, images: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Relative errors of the network's output on other images, after the linear and the nonlinear refit."""
    sites, bridge = find_sites(mod), TorchBridge(mod)
    targets, dense = dense_outputs(bridge, sites, images), predict(bridge, others)
    changed = [
        predict(TorchBridge(replace_sites(mod, refit(mod, sites, plan, images, targets, nonlinear=nonlinear))), others)
        for nonlinear in (False, True)
    ]
    linear, nonlinear = (float(np.mean((c - dense) ** 2) / np.var(dense)) for c in changed)
    return linear, nonlinear


@pytest.mark.parametrize("activation", ["relu", "leaky", "silu", "hardswish"])
def test_beats_the_linear_refit(activation: str) -> None:
    torch.manual_seed(0)
    r = ACTIVATIONS[activation]()
    mod = imported(nn.Conv2d(8, 16, 3), r, nn.Conv2d(16, 16, 3), r, nn.Conv2d(16, 24, 3), r, nn.Flatten(), channels=8)
    images = 4 * smooth_images(500, 8)  # far into the bends of the smooth ones
    plan = Plan({site.id: Choice("channel", 5) for site in find_sites(mod)})
    linear, nonlinear = errors(mod, plan, images[:300], images[300:])
    assert nonlinear < linear


def test_max_pool_tells_what_matters() -> None:
    torch.manual_seed(0)
    mod = imported(nn.Conv2d(8, 32, 3, padding=1), nn.MaxPool2d(4), nn.ReLU(), nn.Flatten(), channels=8)
    images = torch.randn(1000, 8, 12, 12).numpy()  # white, so that the elements of a window differ
    plan = Plan({"0": Choice("channel", 20)})
    linear, nonlinear = errors(mod, plan, images[:700], images[700:])
    assert nonlinear < 0.95 * linear


@pytest.mark.parametrize("late", [False, True])
def test_residual_blocks(late: bool) -> None:
    torch.manual_seed(0)
    blocks = [Block(nn.ReLU(), project=project, late=late) for project in (True, False, True)]
    mod = imported(*blocks)
    images = smooth_images(500, 3)
    plan = Plan({site.id: Choice("spatial", 4) for site in find_sites(mod) if min(site.spec.kernel) > 1})
    linear, nonlinear = errors(mod, plan, images[:300], images[300:])
    assert nonlinear < linear


@pytest.mark.slow
def test_example_network() -> None:
    """Inputs from a network of which several layers are compressed: the last one's response comes closer."""
    mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    data = example.data()
    images, (others, _) = data["calibration"][:300], data["selection"]
    ranks = {"conv2": 16, "conv3": 32, "conv4": 48, "conv5": 80}
    choices = {name: Choice("channel" if name == "conv4" else "spatial", rank) for name, rank in ranks.items()}
    linear, nonlinear = errors(mod, Plan(choices), images, others[:200])
    assert nonlinear < linear
