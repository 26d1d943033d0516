"""Decomposition weighted by the Fisher information: optimal in that norm, and worth it on the bundled example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from support.samples import columns, moments_of
from tvm_lowrank import example
from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.calibrate import TEMPERATURE, collect_fisher, collect_moments, predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.synthetic import dead_leaves, shrunk
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS, Chain, ConvSpec, Moments, compose, decompose, factorise, grouped
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.transform import replace_sites

SPEC = ConvSpec(6, 8, (3, 3), padding=(1, 1, 1, 1))


def problem(spec: ConvSpec) -> tuple[np.ndarray, Moments, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(spec.weight_shape).astype("float32")
    half = rng.standard_normal((spec.out_channels, spec.out_channels)) * np.geomspace(0.1, 3, spec.out_channels)
    return weight, moments_of(columns(spec, rng)), half @ half.T


def cost(weight: np.ndarray, chain: Chain, spec: ConvSpec, moments: Moments, fisher: np.ndarray) -> float:
    """tr(G E S E^T), by blocks of the site's groups."""
    missing = grouped(weight - compose(chain.specs, [conv.weight for conv in chain.convs], spec.groups), spec)
    spread = missing @ moments.covariance @ missing.transpose(0, 2, 1)
    size = spread.shape[1]
    return sum(
        float(np.sum(fisher[g * size : (g + 1) * size, g * size : (g + 1) * size] * spread[g]))
        for g in range(spec.groups)
    )


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker2", "dac", "dac_out"])
def test_error_is_that_of_the_chain_and_lower_than_without(method: str) -> None:
    weight, moments, fisher = problem(SPEC)
    lifted = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    rank = (3, 4) if method == "tucker2" else 2
    chains = [decompose(weight, SPEC, method=method, rank=rank, moments=moments, fisher=g) for g in (fisher, None)]
    blocks = METHODS[method].mixable(SPEC)
    norm = lifted if blocks == 1 else np.diag(np.diag(lifted))
    weighted, plain = (cost(weight, chain, SPEC, moments, norm) for chain in chains)
    assert weighted < plain * (1.001 if blocks == SPEC.out_channels else 1)  # then the outputs are independent
    factors = factorise(weight, SPEC, method=method, moments=moments, fisher=fisher)
    assert factors.error(rank) == pytest.approx(weighted, rel=0.02)


def test_channel_is_optimal_in_the_weighted_norm() -> None:
    spec = ConvSpec(3, 5, (1, 1))
    weight, moments, fisher = problem(spec)
    lifted = fisher + 0.1 * np.trace(fisher) / 5 * np.eye(5)
    factors = factorise(weight, spec, method="svd", moments=moments, fisher=fisher)

    def loss(flat: np.ndarray) -> float:
        missing = weight.reshape(5, 3) - flat[:10].reshape(5, 2) @ flat[10:].reshape(2, 3)
        return float(np.trace(lifted @ missing @ moments.covariance[0] @ missing.T))

    rng = np.random.default_rng(1)
    best = min(minimize(loss, rng.standard_normal(16)).fun for _ in range(5))
    assert factors.error(2) == pytest.approx(best, rel=1e-4)


def test_groups_keep_to_themselves() -> None:
    spec = ConvSpec(8, 8, (3, 3), groups=2)
    weight, moments, fisher = problem(spec)
    chain = decompose(weight, spec, method="channel", rank=4, moments=moments, fisher=fisher)
    np.testing.assert_allclose(compose(chain.specs, [c.weight for c in chain.convs], 2), weight, atol=1e-4)


class Classifier(nn.Module):
    """A softmax classifier whose scores are the mean of what its site makes at some positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize(("positions", "count", "off"), [(1, 60, 1e-3), (2, 4000, 0.02)])
def test_fisher_is_the_second_order_divergence(positions: int, count: int, off: float) -> None:
    """Of a linear softmax classifier, where both are known; nothing is drawn where the site makes the scores.

    It is that of a softened network, but of the same trace.
    """
    torch.manual_seed(0)
    model = Classifier().eval()
    mod = import_model(model, input_shape=(1, 3, positions, 1))
    images = torch.randn(count, 3, positions, 1)
    (found,) = collect_fisher(TorchBridge(mod), find_sites(mod), images.numpy()).values()

    def information(temperature: float) -> np.ndarray:
        with torch.no_grad():
            p = (model(images) / temperature).softmax(dim=1)
        return (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(dim=0).double().numpy() / positions

    soft = information(TEMPERATURE)
    np.testing.assert_allclose(found, soft * np.trace(information(1.0)) / np.trace(soft), atol=off)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["channel", "spatial_rows"])
def test_on_the_example_with_real_and_with_synthetic_images(method: str) -> None:
    """Real images beat synthetic ones, which beat the weights alone; Fisher information helps."""
    mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    bridge = TorchBridge(mod)
    site = next(site for site in find_sites(mod) if site.id == "conv4")
    data = example.data()
    judged = data["calibration"][300:600]
    dense = predict(bridge, judged)

    def damage(**norm: object) -> float:
        chain = decompose(site.weight, site.spec, method=method, rank=32, **norm)  # type: ignore[arg-type]
        return divergence(Answers(), dense, predict(TorchBridge(replace_sites(mod, {site.id: chain})), judged))

    def norms(images: np.ndarray) -> tuple[Moments, np.ndarray]:
        return (
            collect_moments(bridge, [site], images)[site.id],
            collect_fisher(bridge, [site], images)[site.id],
        )

    (moments, fisher), (guessed, weights) = norms(data["calibration"][:300]), norms(dead_leaves((3, 32, 32), 300))
    real, synthetic = damage(moments=moments, fisher=fisher), damage(moments=shrunk(guessed), fisher=weights)
    assert real < damage(moments=moments)
    assert real < synthetic < damage()
