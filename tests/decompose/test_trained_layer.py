"""The decompositions on a layer of the bundled example, with the inputs that real images give it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.factors import Recipe, distance
from support.samples import moments_of
from tvm_lowrank import example
from tvm_lowrank.calibrate import sample_columns, sample_positions
from tvm_lowrank.decompose import ConvSpec, Moments, Rank, channel_in, dac, spatial, spatial_channel
from tvm_lowrank.decompose.moments import grouped, output_power

LAYER, SPEC = "conv4", ConvSpec(128, 128, (3, 3), padding=(1, 1, 1, 1))
# (method, a rank that leaves less than 60 % of the MACs, the share of the outputs' power that it may lose)
CASES: dict[str, tuple[Recipe, Rank, float]] = {
    "channel_in": (Recipe(channel_in.max_rank, channel_in.chain_specs, channel_in.factorise), 64, 0.02),
    "spatial": (Recipe(spatial.max_rank, spatial.chain_specs, spatial.factorise), 96, 0.025),
    "spatial_rows": (Recipe(spatial.max_rank_rows, spatial.chain_specs_rows, spatial.factorise_rows), 96, 0.025),
    "spatial_channel": (
        Recipe(spatial_channel.max_rank, spatial_channel.chain_specs, spatial_channel.factorise),
        (96, 80),
        0.05,
    ),
    "dac": (Recipe(dac.max_rank, dac.chain_specs, dac.factorise), 3, 0.06),
    "dac_out": (Recipe(dac.max_rank_out, dac.chain_specs_out, dac.factorise_out), 3, 0.1),
}


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, Moments, Moments]:
    """The layer's weight, and its input's moments over two sets of images."""
    net = example.model()
    assert isinstance(net, torch.nn.Sequential)
    weight = net.get_parameter(f"{LAYER}.weight").detach().numpy()
    moments = []
    with torch.no_grad():
        for images in np.split(example.data()["calibration"][:240], [160]):
            x = net[: [name for name, _ in net.named_children()].index(LAYER)](torch.from_numpy(images))
            positions = sample_positions(LAYER, 0, len(x), (x.shape[2], x.shape[3]))
            moments.append(moments_of(sample_columns(x, SPEC, *positions).double().numpy()))
    return weight, moments[0], moments[1]


@pytest.mark.parametrize("name", sorted(CASES))
def test_data_norm_on_held_out_images(name: str, layer: tuple[np.ndarray, Moments, Moments]) -> None:
    weight, known, unknown = layer
    recipe, rank, most = CASES[name]
    factors, plain = recipe.factorise(weight, SPEC, known), recipe.factorise(weight, SPEC, None)
    power = output_power(grouped(weight, SPEC), unknown)
    lost = distance(SPEC, weight, recipe.kernel(factors, rank), unknown)
    assert lost < 0.75 * distance(SPEC, weight, recipe.kernel(plain, rank), unknown)
    assert lost < most * power
    assert distance(SPEC, weight, recipe.kernel(factors, rank), known) == pytest.approx(factors.error(rank), rel=1e-3)
    assert factors.error(recipe.max_rank(SPEC)) <= 1e-5 * power
