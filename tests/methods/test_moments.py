"""Statistics of columns that are too long for a covariance."""

from __future__ import annotations

import numpy as np
import pytest

from support.samples import columns, moments_of
from tvm_lowrank.methods import ConvSpec, Moments, SampledMoments, channel, compose, cut, decompose, factorise
from tvm_lowrank.methods.chain import response

SPEC = ConvSpec(20, 12, (3, 2), groups=2)


def explicit(sampled: SampledMoments) -> Moments:
    """The same with its covariance."""
    count, size = sampled.samples.shape[1:]
    seen = sampled.samples.transpose(0, 2, 1).astype(float) @ sampled.samples / count
    unit = np.trace(seen, axis1=1, axis2=2)[:, None, None] / size * np.eye(size)
    share = sampled.shrinkage[:, None, None]
    return Moments(sampled.mean, (1 - share) * seen + share * unit)


def test_they_stand_for_a_covariance() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SPEC.weight_shape).astype("float32")
    sampled = SampledMoments.of(columns(SPEC, rng, 25).astype("float32"))
    known = explicit(sampled)
    matrices = weight.reshape(2, 6, -1)
    np.testing.assert_allclose(sampled.between(matrices), known.between(matrices), rtol=1e-4, atol=1e-5)
    ours, theirs = (channel.factorise(weight, SPEC, found) for found in (sampled, known))
    np.testing.assert_allclose(ours.errors, theirs.errors, rtol=1e-4, atol=1e-3)
    one, other = (decompose(weight, SPEC, method="channel", rank=3, moments=found) for found in (sampled, known))
    kernels = [compose(chain.specs, [conv.weight for conv in chain.convs], 2) for chain in (one, other)]
    np.testing.assert_allclose(*kernels, atol=1e-3)
    assert one.bias_correction is not None and other.bias_correction is not None
    np.testing.assert_allclose(one.bias_correction, other.bias_correction, atol=1e-3)


def test_shrinkage_brings_them_nearer_to_the_truth() -> None:
    """Of Gaussians of a known covariance; with many samples little is shrunk, and with equal variances all."""
    rng = np.random.default_rng(0)
    root = np.diag(np.geomspace(1, 0.03, 60))
    truth = root @ root

    def apart(count: int, share: float | None = None) -> tuple[float, float]:
        sampled = SampledMoments.of((rng.standard_normal((1, count, 60)) @ root).astype("float32"))
        own = sampled.shrinkage if share is None else np.array([share])
        found = explicit(SampledMoments(sampled.mean, sampled.samples, own))
        return float(np.linalg.norm(found.covariance[0] - truth)), float(own[0])

    few, many = [np.mean([apart(count) for _ in range(20)], axis=0) for count in (20, 5000)]
    for share in (0.0, 0.9):
        assert few[0] < np.mean([apart(20, share)[0] for _ in range(20)])
    assert few[1] > 0.1 > 0.01 > many[1]
    assert SampledMoments.of(rng.standard_normal((1, 20, 400)).astype("float32")).shrinkage[0] > 0.9


def test_methods_that_need_more_go_by_the_weights() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SPEC.weight_shape).astype("float32")
    sampled = SampledMoments.of(columns(SPEC, rng, 25).astype("float32"))
    ours = factorise(weight, SPEC, method="spatial", moments=sampled)
    plain = factorise(weight, SPEC, method="spatial")
    for own, other in zip(ours.weights(4), plain.weights(4), strict=True):
        np.testing.assert_array_equal(own, other)
    assert cut("spatial", ours, 4, weight, sampled).bias_correction is not None


@pytest.mark.parametrize("method", ["channel", "spatial", "channel_in"])
def test_what_a_chain_makes_of_one_column(method: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(SPEC.weight_shape)
    chain = decompose(weight, SPEC, method=method, rank=4, moments=moments_of(columns(SPEC, rng)))
    weights = [conv.weight for conv in chain.convs]
    column = rng.standard_normal((20, 3, 2))
    kernel = compose(chain.specs, weights, SPEC.groups).reshape(2, 6, -1)
    np.testing.assert_allclose(
        response(chain.specs, weights, column), (kernel @ column.reshape(2, -1, 1)).reshape(-1), atol=1e-5
    )
