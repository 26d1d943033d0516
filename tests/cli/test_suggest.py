"""`tvm_lowrank suggest`: planted ranks are found, and the shipped plan is what it finds on the bundled example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tvm_lowrank import example
from tvm_lowrank.cli.app import app
from tvm_lowrank.cli.suggest import suggest_plan
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import ConvSpec, compose
from tvm_lowrank.methods.tucker2 import chain_specs
from tvm_lowrank.plan import Choice, Plan

PLANS = Path(__file__).parents[2] / "plans"
# input and output channels, size, ranks: the front of a VGG-16
LAYERS = ((3, 64, 32, None), (64, 64, 32, (11, 18)), (64, 128, 16, (22, 34)), (128, 128, 16, (39, 36)))


def planted(spec: ConvSpec, rank: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A kernel of these Tucker-2 ranks, and noise."""
    specs = chain_specs(spec, rank)
    kernel = compose(specs, [rng.standard_normal(part.weight_shape) / part.in_channels**0.5 for part in specs])
    return (kernel / kernel.std() + 0.2 * rng.standard_normal(kernel.shape)).astype("float32")


def test_planted_ranks_are_found() -> None:
    rng = np.random.default_rng(0)
    sites = []
    for i, (inside, outside, size, rank) in enumerate(LAYERS):
        spec = ConvSpec(inside, outside, (3, 3), padding=(1, 1, 1, 1))
        weight = rng.standard_normal(spec.weight_shape) if rank is None else planted(spec, rank, rng)
        sites.append(Site(f"conv{i}", spec, (size, size), weight.astype("float32"), None))
    linear = ConvSpec(256, 192, (1, 1))
    low = rng.standard_normal((192, 20)) @ rng.standard_normal((20, 256)) / 20**0.5
    for name, noise in (("fc", 0.1), ("classifier", 0.0)):
        weight = (low + noise * rng.standard_normal(low.shape))[:, :, None, None].astype("float32")
        sites.append(Site(name, linear, (1, 1), weight, None))
    expected = {f"conv{i}": Choice("tucker2", rank) for i, (*_, rank) in enumerate(LAYERS) if rank is not None}
    assert dict(suggest_plan(sites)) == {**expected, "fc": Choice("svd", 20)}
    assert dict(suggest_plan(sites, weakening=1.0)) == {}
    with pytest.raises(ValueError, match="outside"):
        suggest_plan(sites, weakening=2.0)


@pytest.mark.slow
def test_shipped_plan_is_found_again(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["suggest", "--out", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    shipped = Plan.read(PLANS / "example_kim.json")
    assert Plan.read(tmp_path / "plan.json") == shipped
    sites = find_sites(import_model(example.model(), input_shape=example.INPUT_SHAPE))
    assert {site.id for site in sites[1:-1]} == set(shipped)
