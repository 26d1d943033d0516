"""Reconstruction: nearer to the dense network on images that it did not see, and kept only then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tvm.ir import IRModule

from support.models import ResNet20, randomised
from tvm_lowrank import example
from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.grids import calibrated
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import grids_of, with_formats, with_grids
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.searching.fit import reconstruct as module
from tvm_lowrank.searching.fit.reconstruct import affordable, reconstruct, reconstruct_if_better, varied
from tvm_lowrank.searching.fit.refit import refit
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.searching.fit.training import Learner, balanced
from tvm_lowrank.transform import replace_sites

PLAN = Plan({"conv4": Choice("channel", 16), "conv5": Choice("spatial", 16), "conv6": Choice("tucker2", (32, 32))})


@pytest.fixture(scope="module")
def networks() -> tuple[IRModule, IRModule, np.ndarray, np.ndarray]:
    """The bundled network, a refitted one, the images that it was fitted to, and others."""
    mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    data = example.data()
    images, others = data["calibration"][:200], data["selection"][0][:300]
    sites = [site for site in find_sites(mod) if site.id in PLAN]
    chains = refit(mod, sites, PLAN, images, dense_outputs(TorchBridge(mod), sites, images))
    return mod, replace_sites(mod, chains), images, others


def damage(dense: IRModule, network: IRModule, images: np.ndarray) -> float:
    return divergence(Answers(), predict(TorchBridge(dense), images), predict(TorchBridge(network), images))


@pytest.mark.slow
def test_comes_closer_on_other_images(networks: tuple[IRModule, IRModule, np.ndarray, np.ndarray]) -> None:
    dense, refitted, images, others = networks
    done: list[float] = []
    found = reconstruct(dense, refitted, images, passes=4, advance=done.append)
    assert sum(done) == 4 * len(images)
    assert damage(dense, found, others) < 0.9 * damage(dense, refitted, others)
    assert [site.spec for site in find_sites(found)] == [site.spec for site in find_sites(refitted)]
    again = reconstruct(dense, refitted, images, passes=4)
    np.testing.assert_array_equal(predict(TorchBridge(again), others[:10]), predict(TorchBridge(found), others[:10]))


@pytest.mark.slow
def test_in_small_parts_and_in_little_time(
    networks: tuple[IRModule, IRModule, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches may be computed in parts; a limit shortens the passes, at least to one step; a deadline ends them."""
    dense, refitted, images, others = networks
    monkeypatch.setattr(module, "trained_at_once", lambda bridge: 16)
    found = reconstruct(dense, refitted, images, passes=2)
    assert damage(dense, found, others) < damage(dense, refitted, others)
    done: list[float] = []
    reconstruct(dense, refitted, images, passes=10_000, limit=0.0, advance=done.append)
    assert done == [10_000 * len(images)]

    def check() -> None:
        raise TimeUp

    with pytest.raises(TimeUp):
        reconstruct_if_better(dense, refitted, images, others, check=check)


@pytest.mark.slow
def test_what_does_not_help_is_not_kept(
    networks: tuple[IRModule, IRModule, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, refitted, images, others = networks
    monkeypatch.setattr(module, "PASSES", 2)
    for rate in (0.1, 1e30):  # a bad network, and one that is not finite
        monkeypatch.setattr(module, "RATE", rate)
        assert reconstruct_if_better(dense, refitted, images[:100], others) is refitted


def test_balanced_factors_compute_the_same(networks: tuple[IRModule, IRModule, np.ndarray, np.ndarray]) -> None:
    _, refitted, _, others = networks
    learner = Learner(refitted, learns=True)
    norms = [float(learner.bridge.site_parameters(f"conv4.factor{i}").weight.detach().norm()) for i in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    expected = predict(TorchBridge(refitted), others[:20])
    np.testing.assert_allclose(predict(TorchBridge(learner.network()), others[:20]), expected, atol=1e-3)


def test_varied_images_are_mirrored_and_shifted_ones() -> None:
    images = torch.randn(6, 2, 16, 8)
    made = varied(images, torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    padded = torch.nn.functional.pad(images, (1, 1, 2, 2), mode="reflect")
    for image, wide in zip(made, padded, strict=True):
        origins = [kind[:, i : i + 16, j : j + 8] for kind in (wide, wide.flip(2)) for i in range(5) for j in range(3)]
        assert sum(torch.equal(image, origin) for origin in origins) == 1
    assert len({float(image[0, 0, 0]) for image in made}) == 6


def test_what_would_take_too_long_is_not_begun() -> None:
    small = import_model(randomised(ResNet20()), input_shape=(1, 3, 32, 32))
    large = import_model(randomised(ResNet20()), input_shape=(1, 3, 320, 320))
    assert affordable(small, 10**6) and not affordable(large, 1000) and affordable(large, 100)


@pytest.mark.slow
def test_comes_closer_in_int8(networks: tuple[IRModule, IRModule, np.ndarray, np.ndarray]) -> None:
    """With the rounding in the loop, from factors that are not balanced; nearer than one that did not see it."""
    dense, refitted, images, others = networks
    formats = {site.id: "int8" for site in find_sites(dense)}
    dense = calibrated(dense, images, names=list(formats))
    uneven = TorchBridge(refitted)
    with torch.no_grad():
        uneven.site_parameters("conv5.factor1").weight.mul_(30)
        uneven.site_parameters("conv5.factor2").weight.div_(30)
    grids = grids_of(dense["main"])
    network = with_grids(with_formats(uneven.to_relax(), formats), grids)
    network = calibrated(balanced(network), images)
    found = reconstruct(dense, network, images, passes=4)
    assert damage(dense, found, others) < 0.9 * damage(dense, network, others)
    blind = reconstruct(dense, with_formats(network, dict.fromkeys(formats, "float32")), images, passes=4)
    rounded = calibrated(with_grids(with_formats(blind, formats), grids), images)
    assert damage(dense, found, others) < 1.05 * damage(dense, rounded, others)
