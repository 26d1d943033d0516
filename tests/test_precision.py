"""What is computed in half precision, and what PyTorch makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import tvm
from torch import nn

from support.lowering_networks import canonical, network, sample
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.graph import find_sites
from tvm_lowrank.methods import ConvSpec
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import applies, formats_of, operand_formats, possible, stored, with_formats
from tvm_lowrank.transform import DecomposeConv2D, shaped

HALF = ["bfloat16", "float16"]


def three() -> tvm.IRModule:
    """An input layer, another one, and a depthwise one."""
    return canonical(
        network(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)),
        (3, 12, 12),
    )


def test_formats_are_kept_merged_and_taken_back() -> None:
    mod = three()
    a, b, c = (site.id for site in find_sites(mod))
    assert with_formats(mod, {}) is mod and with_formats(mod, {a: "float32"}) is mod
    some = with_formats(with_formats(mod, {a: "float16"}), {b: "bfloat16", c: "bfloat16"})
    assert formats_of(some["main"]) == {a: "float16", b: "bfloat16", c: "bfloat16"}
    assert formats_of(TorchBridge(some).to_relax()["main"]) == formats_of(some["main"])
    assert formats_of(with_formats(some, {a: "float32", b: "float32", c: "float32"})["main"]) == {}
    with pytest.raises(KeyError):
        with_formats(mod, {a: "int4"})


def test_all_but_narrow_groups_may_be_in_half_precision() -> None:
    mod = three()
    sites = find_sites(mod)
    assert all(applies(site.spec) for site in sites)
    function = with_formats(mod, {site.id: "bfloat16" for site in sites})["main"]
    assert set(operand_formats(function)) == {site.id for site in sites}
    # the image and what the first two make
    assert len(stored(function)) == 3
    narrow, multiplied = ConvSpec(16, 16, (3, 3), groups=4), ConvSpec(16, 32, (3, 3), groups=16)
    assert not applies(narrow) and not applies(multiplied) and applies(ConvSpec(32, 32, (3, 3), groups=4))
    assert possible(narrow, HALF) == ("float32",) and possible(sites[0].spec, HALF) == HALF


@pytest.mark.parametrize("format", HALF)
def test_pytorch_rounds_what_is_read(format: str) -> None:
    mod, x = three(), sample(2, 3, 12, 12)
    second = find_sites(mod)[1]
    plain, half = TorchBridge(mod), TorchBridge(with_formats(mod, {second.id: format}))
    seen: dict[str, list[np.ndarray]] = {}

    def tap(site: str, given: torch.Tensor, made: torch.Tensor) -> None:
        seen.setdefault(site, []).extend((given.detach().numpy(), made.detach().numpy()))

    plain(torch.from_numpy(x), tap)
    half(torch.from_numpy(x), tap)
    given, made, half_given, half_made = seen[second.id]
    assert FORMATS[format].rounded(given).tobytes() == half_given.tobytes() != given.tobytes()
    weight = torch.from_numpy(FORMATS[format].rounded(second.weight))
    wanted = nn.functional.conv2d(torch.from_numpy(half_given), weight).numpy()
    np.testing.assert_allclose(half_made, wanted, atol=1e-6)
    assert 1e-5 < np.abs(half_made - made).max() / np.abs(made).max() < 3 * FORMATS[format].roundoff


def test_gradients_pass_the_rounding() -> None:
    mod = three()
    second = find_sites(mod)[1].id
    bridge = TorchBridge(with_formats(mod, {second: "bfloat16"}))
    weight, x = bridge.site_parameters(second).weight.requires_grad_(), torch.from_numpy(sample(2, 3, 12, 12))
    (gradient,) = torch.autograd.grad(bridge(x.requires_grad_()).square().sum(), [weight])
    assert gradient.abs().min() > 0
    assert gradient.bfloat16().float().ne(gradient).any(), "the gradient itself is not rounded"


def test_a_plan_has_formats() -> None:
    plan = Plan({"a": Choice("svd", 8, "bfloat16"), "b": Choice(format="float16"), "c": Choice("btd", (8, 8, 2))})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.formats == {"a": "bfloat16", "b": "float16"}
    assert plan.decomposed == Plan({"a": Choice("svd", 8), "c": Choice("btd", (8, 8, 2))})
    assert str(plan["a"]) == "svd 8 in bfloat16" and str(plan["c"].float32) == "btd (8, 8, 2)"
    old = Plan.from_json(json.dumps({"schema": 1, "sites": {"a": {"method": "svd", "rank": 8}}}))
    assert old["a"] == Choice("svd", 8, "float32")
    with pytest.raises(UserError, match=r"'a' is malformed.*'int4' is not known; formats are float32, bfloat16"):
        Plan.from_json(json.dumps({"schema": 1, "sites": {"a": {"method": "dense", "format": "int4"}}}))


def test_factors_have_the_format_of_their_site() -> None:
    mod = three()
    second = find_sites(mod)[1].id
    plan = {second: Choice("spatial", 16, "bfloat16")}
    for changed in (shaped(mod, plan), tvm.transform.Sequential([DecomposeConv2D(plan)])(mod)):
        assert set(operand_formats(changed["main"])) == {f"{second}.factor1", f"{second}.factor2"}
        assert len(stored(changed["main"])) == 2
