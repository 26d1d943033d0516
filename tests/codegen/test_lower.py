import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support.lowering_networks import canonical, expected, network, run, sample
from tvm_lowrank.codegen.lower import build, kernels, kernels_of, lower
from tvm_lowrank.codegen.schedule import Tiling, default_tiling, workload
from tvm_lowrank.codegen.vectors import computed_channels
from tvm_lowrank.graph import find_sites
from tvm_lowrank.searching.latency.tiles import register_tiles, variants
from tvm_lowrank.targets.profile import load_profile

TARGET = load_profile("x86").tvm_target()

LAYERS = {
    "padded": nn.Conv2d(16, 32, 3, padding=1),
    "pointwise": nn.Conv2d(16, 48, 1),
    "column": nn.Conv2d(16, 16, (3, 1), padding=(1, 0), bias=False),
    "row": nn.Conv2d(16, 32, (1, 3), padding=(0, 1)),
    "strided": nn.Conv2d(16, 16, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(16, 16, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(16, 64, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "expanding depthwise": nn.Conv2d(16, 64, 3, padding=1, groups=16),
    "odd channels": nn.Conv2d(16, 29, 3, padding=1),
    "odd channels, then more": nn.Sequential(nn.Conv2d(16, 37, (3, 1), padding=(1, 0)), nn.Conv2d(37, 19, 1)),
    "depthwise, then pointwise": nn.Sequential(
        nn.Conv2d(16, 48, 3, padding=1, groups=16, bias=False), nn.Conv2d(48, 32, 1)
    ),
    "strided depthwise, then pointwise": nn.Sequential(
        nn.Conv2d(16, 32, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1), groups=16, bias=False), nn.Conv2d(32, 8, 1)
    ),
    "pointwise, then filtered and added": nn.Sequential(
        nn.Conv2d(16, 96, 1, bias=False), nn.Conv2d(96, 32, 3, stride=(1, 2), padding=1, groups=32)
    ),
    "odd channels per group": nn.Conv2d(16, 58, 3, padding=1, groups=2),
    "average": nn.AvgPool2d(3, stride=1, padding=1),
    "maximum": nn.MaxPool2d(3, stride=2, padding=1),
    "transposed": nn.ConvTranspose2d(16, 8, 2, stride=2),
    "softmax": nn.Softmax(dim=1),
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 10)),
}


class Shared(nn.Module):
    """A depthwise convolution whose channels something else sees as well as the pointwise one behind it."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(16, 48, 3, padding=1, groups=16, bias=False)
        self.pointwise = nn.Conv2d(48, 32, 1)

    def forward(self, x):
        inner = self.depthwise(x)
        return torch.cat([self.pointwise(inner), inner], dim=1)


def test_channels_that_something_else_sees_stay_in_order():
    net, x = network(Shared()), sample(2, 16, 8, 8)
    lowered = lower(canonical(net, x.shape[1:]), batch=2, target=TARGET)
    np.testing.assert_allclose(run(build(lowered, {}, TARGET), x), expected(net, x), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.relu(self.second(nn.functional.relu6(self.first(x))) + x)


@pytest.mark.parametrize("name", LAYERS)
def test_untuned_library_computes_what_torch_does(name):
    net = network(LAYERS[name], nn.ReLU())
    x = sample(2, 16, 8, 8)
    lowered = lower(canonical(net, x.shape[1:]), batch=2, target=TARGET)
    np.testing.assert_allclose(run(build(lowered, {}, TARGET), x), expected(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["padded", "pointwise", "grouped", "depthwise", "row", "maximum", "odd channels"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_kind_of_schedule_is_correct(name, threads):
    net = network(LAYERS[name], nn.ReLU())
    x = sample(1, 16, 8, 8)
    lowered = lower(canonical(net, x.shape[1:]), batch=1, target=TARGET)
    (kernel,) = [k for k in kernels(lowered) if workload(k.func)]
    space = workload(kernel.func)
    best = register_tiles(space, lanes=8, registers=16)[0]
    for tiling in [best, *variants(best, space)]:
        library = build(lowered, {kernel.key: tiling}, TARGET, threads=threads)
        np.testing.assert_allclose(run(library, x), expected(net, x), rtol=1e-4, atol=1e-5, err_msg=str(tiling))


def test_convolutions_come_once_each_and_in_order():
    net = network(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        Residual(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    convs = [k for k in kernels(lower(canonical(net, (3, 16, 16)), batch=1, target=TARGET)) if k.is_conv]
    spaces = [workload(k.func) for k in convs]
    assert [(s.spatial[-1], s.reduction) for s in spaces] == [
        (8, (3, 3, 3)),
        (8, (3, 3, 1)),
        (16, (1, 1, 8)),
        (16, (3, 3, 8)),
        (16, (3, 3, 16)),
        (16, (3, 3, 16)),
    ]
    assert spaces[3].group == 8


class Projected(nn.Module):
    """A residual block whose shortcut is a convolution, as a ResNet's that halve the image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def test_every_kernel_is_found_with_its_convolution():
    grouped, multiplied = nn.Conv2d(32, 64, 3, groups=4), nn.Conv2d(64, 128, 3, groups=64)
    net = network(Projected(), grouped, multiplied, nn.Conv2d(128, 29, 1))
    mod = canonical(net, (16, 24, 24))
    specs = {site.id: site.spec for site in find_sites(mod)}
    found = kernels_of(mod, batch=1, target=TARGET)
    assert [kernel.key for kernel, _ in found] == [k.key for k in kernels(lower(mod, batch=1, target=TARGET))]
    names = [name for _, name in found if name is not None]
    assert sorted(names) == sorted(specs) and names != list(specs), "the shortcut comes before what it is added to"
    for kernel, name in found:
        if name is not None:
            _, inner, *taps = specs[name].weight_shape
            assert workload(kernel.func).reduction == (*taps, inner), name


def test_activation_and_residual_are_part_of_the_convolution():
    lowered = lower(canonical(network(Residual()), (16, 8, 8)), batch=1, target=TARGET)
    others = [k.name for k in kernels(lowered) if not k.is_conv]
    assert all("transpose" in name for name in others)
    assert len(others) <= 2


def test_equal_shapes_have_equal_keys_and_others_do_not():
    net = network(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)), nn.Conv2d(16, 32, 3, padding=1))
    keys = [k.key for k in kernels(lower(canonical(net, (16, 8, 8)), batch=1, target=TARGET)) if k.is_conv]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.slow
def test_keys_are_the_same_in_another_process():
    script = (
        "from support.lowering_networks import *; from tvm_lowrank.codegen.lower import *\n"
        "from tvm_lowrank.targets.profile import load_profile\n"
        "net = network(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))\n"
        "low = lower(canonical(net, (16, 8, 8)), batch=1, target=load_profile('x86').tvm_target())\n"
        "print(*[k.key for k in kernels(low)])"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    there = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    net = network(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    here = kernels(lower(canonical(net, (16, 8, 8)), batch=1, target=TARGET))
    assert there.split() == [k.key for k in here]


def test_tiling_that_does_not_divide_is_refused():
    net = network(nn.Conv2d(16, 24, 1))
    lowered = lower(canonical(net, (16, 8, 8)), batch=1, target=TARGET)
    kernel = next(k for k in kernels(lowered) if k.is_conv)
    with pytest.raises(ValueError, match="does not divide"):
        build(lowered, {kernel.key: Tiling((1, 1, 3, 16), 16)}, TARGET)


def test_default_tile_divides_any_channel_count():
    for channels in (1, 10, 29, 48, 64):
        lowered = lower(canonical(network(nn.Conv2d(16, channels, 1)), (16, 8, 8)), batch=1, target=TARGET)
        space = next(workload(k.func) for k in kernels(lowered) if k.is_conv)
        tiling = default_tiling(space, 16)
        assert space.spatial[-1] % tiling.tile[-1] == 0
        assert tiling.tile[-1] % tiling.vector == 0


def test_channels_of_few_members_are_interleaved_where_nothing_else_sees_their_order():
    def groups(net):
        found = kernels(lower(canonical(network(net), (16, 8, 8)), batch=1, target=TARGET))
        return [workload(kernel.func).group for kernel in found if kernel.is_conv]

    depthwise, pointwise = nn.Conv2d(16, 64, 3, padding=1, groups=16, bias=False), nn.Conv2d(64, 32, 1)
    assert groups(nn.Sequential(depthwise, pointwise)) == [16, 32]
    assert groups(nn.Sequential(depthwise, nn.ReLU(), pointwise)) == [4, 32]
    assert groups(depthwise) == [4]


@pytest.mark.parametrize(
    ("channels", "computed"), [(29, 32), (40, 48), (24, 24), (8, 8), (64, 64), (178, 192), (10, 10)]
)
def test_channels_are_padded_where_that_fills_the_vectors(channels, computed):
    assert computed_channels(channels, 1, 16) == computed
    assert computed_channels(channels, 2, 16) == channels
