"""The pass computes what the convolution with the composed kernel computes, over random geometries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import from_numpy
from torch.nn import functional as F
from tvm import relax

from support.samples import LAYOUTS, module
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.methods import METHODS, ConvSpec, Method, Moments, Rank, compose
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.transform import DecomposeConv2D


def reference(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, spec: ConvSpec) -> np.ndarray:
    top, left, bottom, right = spec.padding
    padded = F.pad(from_numpy(x), (left, right, top, bottom))
    options = {"stride": spec.strides, "dilation": spec.dilation, "groups": spec.groups}
    return F.conv2d(padded, from_numpy(kernel), from_numpy(bias), **options).numpy()


def run(mod: tvm.IRModule, x: np.ndarray, layout: str) -> np.ndarray:
    """Result in NCHW of the module built by a plain TVM pipeline."""
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    given = np.ascontiguousarray(x.transpose(["NCHW".index(axis) for axis in layout]))
    return vm["main"](tvm.runtime.tensor(given)).numpy().transpose([layout.index(axis) for axis in "NCHW"])


@st.composite
def ranks(draw: st.DrawFn, method: Method, spec: ConvSpec) -> Rank:
    """Any rank that the method takes for a geometry."""
    limits = method.max_rank(spec)
    if not isinstance(limits, tuple):
        return draw(st.integers(1, limits))
    rank = tuple(draw(st.integers(1, limit)) for limit in limits)
    try:
        method.chain_specs(spec, rank)
    except ValueError:  # some combinations of numbers are no rank
        reject()
    return rank


@st.composite
def geometries(draw: st.DrawFn) -> ConvSpec:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    return ConvSpec(
        in_channels=groups * draw(st.integers(2, 4)),
        out_channels=groups * draw(st.integers(1, 4)),
        kernel=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        strides=draw(pair),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=draw(pair),
        groups=groups,
    )


def random_moments(spec: ConvSpec, rng: np.random.Generator) -> Moments:
    depth = int(np.prod(spec.weight_shape[1:]))
    columns = rng.standard_normal((spec.groups, 3 * depth, depth)) @ rng.standard_normal((spec.groups, depth, depth))
    columns += rng.standard_normal((spec.groups, 1, depth))
    mean = columns.mean(axis=1)
    centred = columns - mean[:, None]
    return Moments(mean, centred.transpose(0, 2, 1) @ centred / columns.shape[1])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    geometries(),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_equals_convolution_with_composed_kernel(
    spec: ConvSpec, method: str, layout: str, biased: bool, whitened: bool, data: st.DataObject
) -> None:
    recipe = METHODS[method]
    if not recipe.applies(spec):
        with pytest.raises(ValueError, match="does not apply"):
            recipe.check(spec, 1)
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rank = data.draw(ranks(recipe, spec))
    weight = rng.standard_normal(spec.weight_shape).astype("float32")
    bias = rng.standard_normal(spec.out_channels).astype("float32") if biased else None
    moments = random_moments(spec, rng) if whitened else None
    size = (11, 10)
    x = rng.standard_normal((2, spec.in_channels, *size)).astype("float32")

    mod = module(spec, weight, bias, size, layout)
    pipeline = tvm.transform.Sequential(
        [DecomposeConv2D(Plan({"layer1.conv": Choice(method, rank)}), moments=moments and {"layer1.conv": moments})]
    )
    got = run(pipeline(mod), x, layout)

    factors = recipe.factorise(weight, spec, moments)
    kernel = compose(recipe.chain_specs(spec, rank), factors.weights(rank), spec.groups)
    total = np.zeros(spec.out_channels) if bias is None else bias.astype("float64")
    if moments is not None:
        missing = (weight - kernel).reshape(spec.groups, spec.out_channels // spec.groups, -1)
        total = total + np.einsum("gnd,gd->gn", missing, moments.mean).reshape(-1)
    expected = np.maximum(reference(x.astype("float64"), kernel, total, spec), 0)
    np.testing.assert_allclose(got, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.slow
def test_full_rank_keeps_the_function_and_names_stay() -> None:
    rng = np.random.default_rng(0)
    spec = ConvSpec(4, 6, (3, 3), strides=(2, 1), padding=(0, 1, 1, 0))
    weight, bias = rng.standard_normal(spec.weight_shape).astype("float32"), rng.standard_normal(6).astype("float32")
    mod = module(spec, weight, bias, (9, 9), "NCHW")
    x = rng.standard_normal((1, 4, 9, 9)).astype("float32")
    assert [site.id for site in find_sites(mod)] == ["layer1.conv"]
    for name, method in METHODS.items():
        if not method.applies(spec):
            continue
        full = method.max_rank(spec)
        if name == "btd":
            full = (*full[:2], 1)  # one block
        plan = Plan({"layer1.conv": Choice(name, full)})
        rewritten = DecomposeConv2D(plan)(mod)
        np.testing.assert_allclose(run(rewritten, x, "NCHW"), run(mod, x, "NCHW"), atol=2e-5)
        length = len(method.chain_specs(spec, full))
        assert [site.id for site in find_sites(rewritten)] == [f"layer1.conv.factor{i + 1}" for i in range(length)]


def test_errors_name_the_site_and_the_range() -> None:
    spec = ConvSpec(4, 6, (3, 3))
    mod = module(spec, np.ones(spec.weight_shape, "float32"), None, (9, 9), "NCHW")
    with pytest.raises(ValueError, match=r"'layer1\.conv': rank 7 of channel is outside 1\.\.6"):
        DecomposeConv2D(Plan({"layer1.conv": Choice("channel", 7)})).transform_module(mod, None)
    with pytest.raises(ValueError, match=r"no site 'conv9'; sites are layer1\.conv"):
        DecomposeConv2D(Plan({"conv9": Choice("channel", 1)})).transform_module(mod, None)
    with pytest.raises(ValueError, match="unknown method 'cp'"):
        DecomposeConv2D(Plan({"layer1.conv": Choice("cp", 1)})).transform_module(mod, None)


@pytest.mark.slow
def test_tvm_knows_the_pipeline_by_its_name(tmp_path: Path) -> None:
    spec = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    mod = module(spec, rng.normal(size=spec.weight_shape).astype("float32"), None, (6, 6), "NCHW")
    plan = Plan({"layer1.conv": Choice("spatial", 4)})
    (tmp_path / "plan.json").write_text(plan.to_json())
    x = rng.normal(size=(1, 8, 6, 6)).astype("float32")
    expected = run(DecomposeConv2D(plan)(mod), x, "NCHW")
    for form in (plan, tmp_path / "plan.json"):
        library = tvm.compile(mod, "llvm", relax_pipeline=relax.get_pipeline("tvm_lowrank", plan=form))
        got = relax.VirtualMachine(library, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="cannot read plan"):
        relax.get_pipeline("tvm_lowrank", plan=tmp_path / "absent.json")
