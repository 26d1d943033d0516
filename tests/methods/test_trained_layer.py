"""Every decomposition on a layer of the bundled example, with the inputs that real images give it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from support.factors import distance
from support.samples import moments_of
from tvm_lowrank import example
from tvm_lowrank.bridge.calibrate import sample_columns, sample_positions
from tvm_lowrank.methods import METHODS, ConvSpec, Moments, Rank, chain_macs, compose, decompose
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.methods.moments import grouped, output_power

LAYER, SPEC = "conv4", ConvSpec(128, 128, (3, 3), padding=(1, 1, 1, 1))
POINTWISE = ConvSpec(9 * 128, 128, (1, 1))  # the same layer, as it multiplies its columns
# (method, a rank that leaves less than half of the MACs, the share of the outputs' power that it may lose)
CASES: dict[str, tuple[Rank, float]] = {
    "channel": (48, 0.095),
    "channel_in": (48, 0.03),
    "spatial": (64, 0.04),
    "spatial_rows": (64, 0.04),
    "spatial_channel": ((96, 80), 0.04),
    "tucker2": ((64, 64), 0.06),
    "btd": ((64, 64, 4), 0.09),
    "cp4": (64, 0.125),
    "cp3": (64, 0.12),
    "dac": (3, 0.045),
    "dac_out": (3, 0.05),
    "svd": (48, 0.095),
}
# methods whose every rank is cheap, so that the highest can be tried here too
CLOSED = ("channel", "channel_in", "dac", "dac_out", "spatial", "spatial_channel", "spatial_rows", "svd")


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
            positions = sample_positions(LAYER, 0, len(x), (x.shape[2], x.shape[3]), draws=32)
            moments.append(moments_of(sample_columns(x, SPEC, *positions).double().numpy()))
    return weight, moments[0], moments[1]


def site(method: str, weight: np.ndarray) -> tuple[ConvSpec, np.ndarray]:
    """The layer in the form that a method applies to; its columns, and so the moments, are the same."""
    spec = SPEC if METHODS[method].applies(SPEC) else POINTWISE
    return spec, weight.reshape(spec.weight_shape)


def test_every_method_has_a_case() -> None:
    assert set(CASES) == set(METHODS)


@pytest.mark.parametrize("method", CASES)
def test_data_norm_on_held_out_images(method: str, layer: tuple[np.ndarray, Moments, Moments]) -> None:
    """A refit of the last factor lowers the error of the weights' decomposition, and the data's norm does further."""
    kernel, known, unknown = layer
    (spec, weight), (rank, most) = site(method, kernel), CASES[method]
    plain = decompose(weight, spec, method=method, rank=rank)
    normed = decompose(weight, spec, method=method, rank=rank, moments=known)
    weights = [conv.weight for conv in plain.convs]
    assert chain_macs(plain.specs, (16, 16)) < 0.5 * spec.macs((16, 16))

    def lost(weights: Sequence[np.ndarray]) -> float:
        return distance(spec, weight, compose(plain.specs, weights, spec.groups), unknown)

    refitted = refit_last(weight, spec, plain.specs, weights, known)
    assert lost([conv.weight for conv in normed.convs]) < lost(refitted) < lost(weights)
    assert lost([conv.weight for conv in normed.convs]) < most * output_power(grouped(weight, spec), unknown)


@pytest.mark.parametrize("method", CLOSED)
def test_predicted_errors_are_the_true_ones(method: str, layer: tuple[np.ndarray, Moments, Moments]) -> None:
    kernel, known, _ = layer
    (spec, weight), (rank, _), recipe = site(method, kernel), CASES[method], METHODS[method]
    factors = recipe.factorise(weight, spec, known)
    composed = compose(recipe.chain_specs(spec, rank), factors.weights(rank), spec.groups)
    assert distance(spec, weight, composed, known) == pytest.approx(factors.error(rank), rel=1e-3)
    assert factors.error(recipe.max_rank(spec)) <= 1e-5 * output_power(grouped(weight, spec), known)
