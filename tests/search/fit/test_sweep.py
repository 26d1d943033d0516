"""On the way from site to site a network computes what it computes from the beginning, and little of it twice."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.models import Bottleneck, DenseNet, randomised
from tvm_lowrank.bridge.epilogue import epilogue
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bridge.torch_nn import chain
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import Chain, decompose
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.candidates import skipped
from tvm_lowrank.searching.fit import sweep as module
from tvm_lowrank.searching.fit import waiting
from tvm_lowrank.searching.fit.refit import refit, site_columns
from tvm_lowrank.searching.fit.sweep import Sweep
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.transform import replace_sites


class Blocks(nn.Sequential):
    """Residual blocks whose other branch is computed later than the site that it is added to."""

    def __init__(self) -> None:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)]
        super().__init__(nn.Conv2d(3, 24, 3, padding=1), Bottleneck(24, 8, 2), Bottleneck(32, 12, 2), *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": Blocks, "dense": DenseNet}
IMAGES = np.random.default_rng(0).normal(size=(120, 3, 16, 16)).astype("float32")


def halved(site: Site) -> Chain:
    method = "channel" if max(site.spec.kernel) > 1 else "svd"
    return decompose(site.weight, site.spec, method=method, rank=max(1, min(site.weight.shape[:2]) // 2))


@pytest.mark.parametrize("in_memory", [2**30, 0], ids=["memory", "files"])
@pytest.mark.parametrize("repeated", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_columns_are_those_of_the_network_so_far(
    name: str, repeated: float, in_memory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(waiting, "IN_MEMORY", in_memory)
    monkeypatch.setattr(module, "MOST_REPEATED", repeated)
    mod = import_model(randomised(NETWORKS[name]()), input_shape=(1, 3, 16, 16))
    bridge, sites = TorchBridge(mod), find_sites(mod)
    chains: dict[str, Chain] = {}
    sweep = Sweep(bridge, sites, IMAGES, folder=tmp_path)
    for site in (site for site in sites if not skipped(site)):
        columns, addend = sweep.columns(site, epilogue(bridge.function, site.id).residual)
        sofar = TorchBridge(replace_sites(mod, chains))
        residual = epilogue(sofar.function, site.id).residual
        expected, expected_addend = site_columns(sofar, site, IMAGES, residual=residual)
        torch.testing.assert_close(columns, expected, atol=1e-4, rtol=1e-4)
        assert (addend is None) == (expected_addend is None)
        if addend is not None and expected_addend is not None:
            torch.testing.assert_close(addend, expected_addend, atol=1e-4, rtol=1e-4)
        chains[site.id] = halved(site)
        sweep.replace(site.id, chain(chains[site.id].convs, chains[site.id].bias_correction))
    del sweep
    assert not list(tmp_path.iterdir())


def test_little_is_computed_twice() -> None:
    """Of a network of equal layers each is computed twice or three times, where from the beginning it would be 20."""
    layers = [layer for _ in range(40) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    mod = import_model(randomised(nn.Sequential(*layers)), input_shape=(1, 8, 6, 6))
    sites, calls = find_sites(mod), Counter[str]()
    images = np.zeros((100, 8, 6, 6), np.float32)  # one batch
    sweep = Sweep(TorchBridge(mod), sites, images)
    for site in sites:
        sweep.columns(site)

        def compute(x: Tensor, site: Site = site) -> Tensor:
            calls[site.id] += 1
            return x

        sweep.replace(site.id, compute)
    assert max(calls.values()) <= 2 and len(calls) == len(sites) - 1


def test_a_deadline_ends_a_refit_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "IN_MEMORY", 0)
    mod = import_model(randomised(Blocks()), input_shape=(1, 3, 16, 16))
    sites = find_sites(mod)
    targets = dense_outputs(TorchBridge(mod), sites, IMAGES)
    asked: list[None] = []

    def check() -> None:
        asked.append(None)
        if len(asked) > 5:
            raise TimeUp

    plan = {site.id: Choice("svd", 4) for site in sites if site.spec.kernel == (1, 1)}
    with pytest.raises(TimeUp):
        refit(mod, sites, plan, IMAGES, targets, folder=tmp_path, check=check)
    gc.collect()  # the error held what was in use
    assert not list(tmp_path.iterdir())
