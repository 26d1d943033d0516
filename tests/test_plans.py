"""The papers' rank tables, shipped as plans: their MAC ratios are the published or derived ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvm_lowrank.methods import METHODS, ConvSpec, chain_macs
from tvm_lowrank.plan import Plan

PLANS = Path(__file__).parents[1] / "plans"
# torchvision's VGG-16: index in `features`, input channels, output channels, size
VGG16 = (
    (0, 3, 64, 224),
    (2, 64, 64, 224),
    (5, 64, 128, 112),
    (7, 128, 128, 112),
    (10, 128, 256, 56),
    (12, 256, 256, 56),
    (14, 256, 256, 56),
    (17, 256, 512, 28),
    (19, 512, 512, 28),
    (21, 512, 512, 28),
    (24, 512, 512, 14),
    (26, 512, 512, 14),
    (28, 512, 512, 14),
)
OTHERS = {
    "alexnet_lebedev": {"features.3": ConvSpec(64, 192, (5, 5), padding=(2, 2, 2, 2))},
    "cifar10_nin_tai": {"conv2": ConvSpec(96, 192, (5, 5)), "conv3": ConvSpec(192, 192, (3, 3))},
    "charnet_lebedev": {"conv2": ConvSpec(48, 128, (9, 9)), "conv3": ConvSpec(64, 512, (8, 8))},
}


def vgg16() -> dict[str, tuple[ConvSpec, int]]:
    return {f"features.{i}": (ConvSpec(c, n, (3, 3), padding=(1, 1, 1, 1)), size) for i, c, n, size in VGG16}


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("vgg16_wang_cheng", 12.0), ("vgg16_zhang_4x", 4.04), ("vgg16_tai", 3.10), ("vgg16_dac_r4", 1 / (1 - 0.531))],
)
def test_mac_ratio_of_the_convolutions(name: str, ratio: float) -> None:
    plan = Plan.read(PLANS / f"{name}.json")
    dense = compressed = 0
    for site, (spec, size) in vgg16().items():
        dense += spec.macs((size, size))
        if site in plan:
            choice = plan[site]
            assert choice.rank is not None
            METHODS[choice.method].check(spec, choice.rank)
            compressed += chain_macs(METHODS[choice.method].chain_specs(spec, choice.rank), (size, size))
        else:
            compressed += spec.macs((size, size))
    assert dense / compressed == pytest.approx(ratio, rel=0.005)
    assert set(plan) <= set(vgg16())


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_ranks_are_possible(name: str) -> None:
    plan = Plan.read(PLANS / f"{name}.json")
    assert set(plan) == set(OTHERS[name])
    for site, spec in OTHERS[name].items():
        choice = plan[site]
        assert choice.rank is not None
        METHODS[choice.method].check(spec, choice.rank)


def test_every_plan_is_tested() -> None:
    tested = {"vgg16_wang_cheng", "vgg16_zhang_4x", "vgg16_tai", "vgg16_dac_r4", "example_kim", *OTHERS}
    assert {path.stem for path in PLANS.glob("*.json")} == tested
