"""Convolutions in int8: the compiled code against PyTorch, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn

from support.lowering_networks import LAYERS as KINDS
from support.lowering_networks import canonical, expected, network, run, sample
from tvm_lowrank.bridge.grids import calibrated, folded, least_error
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.lower import build, kernels, kernels_of, lower
from tvm_lowrank.codegen.schedule import workload
from tvm_lowrank.codegen.units import UNITS, formats_of, units_of
from tvm_lowrank.formats import LARGEST, LEVELS, Grid, quantised
from tvm_lowrank.graph import find_sites
from tvm_lowrank.methods import ConvSpec, Rank, decompose
from tvm_lowrank.options import ConnectionOptions
from tvm_lowrank.precision import grids_of, possible, with_formats, with_grids
from tvm_lowrank.searching.choose.allowed import Allowed
from tvm_lowrank.searching.latency.tiles import register_tiles, variants
from tvm_lowrank.searching.measure.device import open_device
from tvm_lowrank.targets.emulate import emulated
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.transform import replace_sites

TARGET = load_profile("x86").tvm_target()
# and one whose sums may be beyond what float32 holds exactly
LAYERS = {**KINDS, "long": nn.Conv2d(1024, 16, 3, padding=1)}


class Residual(nn.Module):
    """Additions, a pooling and a concatenation of what convolutions read, and numbers on both sides of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.third, self.fourth = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(40, 24, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.clamp(self.first(x), -1.0, 4.0)
        x = torch.relu(self.second(x) + x)
        x = nn.functional.max_pool2d(x, 2)
        return self.last(torch.cat([self.third(x), self.fourth(x)], 1))


def integers(net: nn.Module, shape: tuple[int, ...], x: np.ndarray) -> tvm.IRModule:
    mod = canonical(net, shape)
    return calibrated(with_formats(mod, {site.id: "int8" for site in find_sites(mod)}), x)


def reference(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return TorchBridge(mod)(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cpu", ["", "haswell", "x86-64"])
def test_a_convolution_is_exact(name: str, cpu: str) -> None:
    """With the processor's dot products, and where it has none."""
    net, shape = network(LAYERS[name], nn.ReLU()), (LAYERS[name].in_channels, 9, 8)
    x = sample(2, *shape)
    mod = integers(net, shape, x)
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu}) if cpu else TARGET
    found = run(build(lower(mod, batch=2, target=target), {}, target), x)
    assert np.array_equal(found, reference(mod, x))
    assert 1e-4 < np.abs(found - expected(net, x)).max() / np.abs(found).max() < 3e-2


@pytest.mark.parametrize("cpu", ["", "haswell"])
def test_a_network_is_exact(cpu: str) -> None:
    shape = (16, 12, 10)
    net, x = network(Residual()), sample(2, *shape)
    mod = integers(net, shape, x)
    zeros = {grid.zero for grid in grids_of(mod["main"]).values()}
    assert 0 in zeros and len(zeros) > 2
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu}) if cpu else TARGET
    lowered = lower(mod, batch=2, target=target)
    # values travel as bytes: all but the input of the first kernel and the output of the last one
    written = [str(kernel.func["main"].params[-1].dtype) for kernel in kernels(lowered)]
    assert written[-1] == "float32" and written.count("float32") <= 2, written  # the last is transposed
    assert np.array_equal(run(build(lowered, {}, target), x), reference(mod, x))


@pytest.mark.parametrize("name", LAYERS)
def test_every_schedule_is_exact(name: str) -> None:
    shape = (LAYERS[name].in_channels, 8, 8)
    x = sample(1, *shape)
    mod = integers(network(LAYERS[name], nn.ReLU()), shape, x)
    lowered = lower(mod, batch=1, target=TARGET)
    (kernel,) = [k for k in kernels(lowered) if k.is_conv]
    space = workload(kernel.func)
    assert space is not None and space.format == "int8"
    best = register_tiles(space, lanes=16, registers=32)[0]
    assert bool(best.unit) == (bool(units_of(TARGET)) and name not in ("odd groups", "depthwise"))
    for tiling in dict.fromkeys([best, *variants(best, space), replace(best, unit="")]):
        assert np.array_equal(run(build(lowered, {kernel.key: tiling}, TARGET), x), reference(mod, x)), tiling


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("zero", [0, 100, 254])
@pytest.mark.parametrize("cpu", ["", "haswell"])
def test_nothing_saturates_at_the_ends_of_the_ranges(sign: int, zero: int, cpu: str) -> None:
    """Products of 255 and 127, all of one sign, and numbers far beyond the grid."""
    net, shape = network(nn.Conv2d(64, 16, 3, padding=1, bias=False)), (64, 6, 6)
    with torch.no_grad():
        net[0].weight.fill_(sign * LARGEST)
    mod = canonical(net, shape)
    (site,) = find_sites(mod)
    mod = with_grids(with_formats(mod, {site.id: "int8"}), {site.id: Grid(1.0, zero)})
    x = np.full((1, *shape), 1e30, "float32")
    x[:, :, ::2] = -1e30
    held = np.where(x > 0, LEVELS - zero, -zero)
    with torch.no_grad():
        wanted = nn.functional.conv2d(torch.from_numpy(held).double(), net[0].weight.double(), padding=1)
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu}) if cpu else TARGET
    found = run(build(lower(mod, batch=1, target=target), {}, target), x)
    assert np.array_equal(found, wanted.float().numpy())
    assert np.array_equal(found, reference(mod, x))


def test_kernels_do_not_depend_on_numbers() -> None:
    """So that what was measured for one network is known of another one: weights, grids and zeros are operands."""
    shape = (16, 12, 10)
    x = sample(2, *shape)
    mod = integers(network(Residual()), shape, x)
    unknown = with_formats(canonical(network(Residual()), shape), {site.id: "int8" for site in find_sites(mod)})
    found = kernels_of(unknown, batch=2, target=TARGET)
    assert [kernel.key for kernel, _ in found] == [k.key for k in kernels(lower(mod, batch=2, target=TARGET))]
    assert [name for _, name in found if name] and {n for _, n in found if n} == {s.id for s in find_sites(mod)}
    with pytest.raises(ValueError, match="no grid for"):
        lower(unknown, batch=2, target=TARGET)


def test_grids_hold_zero_and_round_to_even() -> None:
    grid = Grid.over(-1.0, 4.1)
    assert Grid.parse(str(grid)) == grid and 0 < grid.zero < LEVELS
    assert grid.rounded(np.zeros(1, "float32")) == 0
    assert Grid(2.0, 10).rounded(np.array([1, 3, -1, -3, 1e9, -1e9], "float32")).tolist() == [0, 4, 0, -4, 490, -20]
    assert Grid.over(0.5, 3).zero == 0 and Grid.over(-3, -1).zero == LEVELS - 1
    assert Grid.over(0, 0).rounded(np.zeros(2, "float32")).tolist() == [0, 0]


def test_weights_are_whole_multiples_of_a_scale_for_each_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype("float32") * np.arange(5).reshape(5, 1, 1, 1)
    whole, scales = quantised(weight)
    assert np.abs(whole).reshape(5, -1).max(1).tolist() == [0, 127, 127, 127, 127]
    assert np.abs(whole * scales.reshape(-1, 1, 1, 1) - weight).max() <= 0.51 * scales.max()
    again, same = quantised((whole * scales.reshape(-1, 1, 1, 1)).astype("float32"))
    assert np.array_equal(again, whole) and np.allclose(same, scales, rtol=1e-6)


def test_a_grid_has_the_least_error() -> None:
    """Few numbers far out are cut off, if all others gain by it."""
    values = np.random.default_rng(0).exponential(size=200000).astype("float32")
    most = float(values.max())
    found = least_error(values, 0.0, most)
    assert found.zero == 0 and 0.5 * most < found.scale * LEVELS < 0.95 * most

    def error(grid: Grid) -> float:
        return float(np.square(grid.rounded(values) - values).mean())

    finest = min((Grid.over(0, high) for high in np.linspace(0.1 * most, most, 200)), key=error)
    assert error(found) < 1.02 * error(finest) < 0.9 * error(Grid.over(0, most))


def test_gradients_pass_what_is_held_and_not_what_is_cut_off() -> None:
    mod = canonical(network(nn.Conv2d(4, 8, 1, bias=False)), (4, 5, 5))
    (site,) = find_sites(mod)
    bridge = TorchBridge(with_grids(with_formats(mod, {site.id: "int8"}), {site.id: Grid(0.01, 100)}))
    x = torch.from_numpy(4 * sample(2, 4, 5, 5)).requires_grad_()
    parameters = bridge.site_parameters(site.id)
    parameters.weight.requires_grad_()
    bridge(x).sum().backward()
    assert x.grad is not None and parameters.weight.grad is not None
    within = (x >= -1.0) & (x <= 1.55)
    assert torch.equal(x.grad != 0, within) and 0.1 < within.float().mean() < 0.9
    assert parameters.weight.grad.abs().min() > 0


def test_what_a_target_offers() -> None:
    assert "int8" in [format.name for format in formats_of(load_profile("rpi5").tvm_target())]
    assert "int8" not in [format.name for format in formats_of(load_profile("rpi4").tvm_target())]
    sapphire = tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids"})
    assert {u.name for u in units_of(sapphire) if u.format == "int8"} == {"avx512_vnni", "amx_int8"}
    alder = tvm.target.Target({"kind": "llvm", "mcpu": "alderlake"})
    assert [u.name for u in units_of(alder)] == ["avx_vnni"] and UNITS["avx_vnni"].lanes == 8


@pytest.mark.parametrize(("method", "rank"), [("spatial", 12), ("cp3", 12), ("btd", (16, 16, 2))])
def test_channels_between_factors_have_scales_of_their_own(method: str, rank: Rank) -> None:
    """Channels of very different size inside of a chain: with one scale for all, the small ones would be lost."""
    net, shape = network(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()), (16, 10, 10)
    mod, x = canonical(net, shape), sample(8, 16, 10, 10)
    (site,) = find_sites(mod)
    chain = decompose(site.weight, site.spec, method=method, rank=rank)
    first, second = chain.convs[:2]
    uneven = np.geomspace(1, 50, len(first.weight)).astype("float32").reshape(-1, 1, 1, 1)
    inside, groups = second.weight.shape[1], second.spec.groups
    parts = second.weight.reshape(groups, -1, *second.weight.shape[1:]) / uneven.reshape(groups, 1, inside, 1, 1)
    changed = (first.weight * uneven, parts.reshape(second.weight.shape))
    convs = [replace(conv, weight=weight) for conv, weight in zip(chain.convs, changed, strict=False)]
    chain = replace(chain, convs=(*convs, *chain.convs[2:]))
    factored = replace_sites(mod, {site.id: chain}, formats={site.id: "int8"})
    found = calibrated(factored, x)
    grids = grids_of(found["main"])
    assert [bool(grid.channels) for grid in grids.values()] == [False, *[True] * (len(grids) - 1)]
    # the compiled library does what PyTorch does
    library = build(lower(found, batch=8, target=TARGET), {}, TARGET)
    assert np.array_equal(run(library, x), reference(found, x))
    # for other tools the scales can be in the weights
    one = folded(found)
    assert not any(grid.channels for grid in grids_of(one["main"]).values())
    step = float(np.abs(reference(found, x)).max()) / LEVELS
    assert np.abs(reference(one, x) - reference(found, x)).max() < step / 4
    plain = reference(with_formats(factored, {site.id: "float32"}), x)
    alike = with_grids(found, {name: replace(grid, channels=()) for name, grid in grids.items()})
    errors = [np.abs(reference(own, x) - plain).mean() for own in (alike, found)]
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static")
def test_a_network_is_exact_on_arm(tmp_path: Path) -> None:
    """With signed bytes, and the dot products of a Cortex-A76, emulated."""
    shape, profile = (16, 12, 10), load_profile("rpi5")
    net, x = network(Residual()), sample(2, *shape)
    mod = integers(net, shape, x)
    lowered = lower(mod, batch=2, target=profile.tvm_target())
    spaces = [workload(kernel.func) for kernel in kernels(lowered) if kernel.is_conv]
    assert all(space is not None and space.units == ("arm_dotprod",) for space in spaces)
    with emulated("aarch64", cache_dir=tmp_path / "cache") as boards:
        connection = ConnectionOptions(rpc_tracker=f"{boards.host}:{boards.port}", rpc_key=boards.key, emulate=True)
        with open_device(profile, connection, threads=1, cache_dir=tmp_path / "cache") as device:
            compiler, options = device.linker
            executable = build(lowered, {}, profile.tvm_target())
            export_library(executable, tmp_path / "model.so", cc=compiler, options=options)
            found = device.model(tmp_path / "model.so", (2, *shape))(x)
    assert np.array_equal(found, reference(mod, x))


def test_what_tells_no_range_stays_in_float32() -> None:
    """A layer that reads zeros only, or what is no number; and sums that int32 does not hold."""
    net = network(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))
    with torch.no_grad():
        net[0].bias.fill_(-1e6)
    mod, x = canonical(net, (3, 9, 9)), sample(4, 3, 9, 9)
    first, second, third = find_sites(mod)
    found = calibrated(mod, x, names=[site.id for site in (first, second, third)])
    assert set(grids_of(found["main"])) == {first.id, third.id}
    allowed = Allowed(("float32", "int8"), {}, grids_of(found["main"]))
    assert list(allowed(first)) == ["float32", "int8"] and list(allowed(second)) == ["float32"]
    assert "no range for int8" in allowed.reason(second) and not allowed.reason(first)
    assert not grids_of(calibrated(mod, np.full_like(x, np.nan), names=[first.id])["main"])
    long = ConvSpec(2**13, 16, (3, 3))
    assert list(possible(long, ("float32", "int8"))) == ["float32"]
    assert list(possible(replace(long, kernel=(1, 1)), ("int8",))) == ["int8"]


class Heads(nn.Module):
    """Two layers of one shape that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + torch.relu(self.second(x))


def test_layers_of_one_shape_that_read_the_same_are_told_apart() -> None:
    mod = canonical(network(Heads()), (16, 9, 9))
    names = [site.id for site in find_sites(mod)]
    found = kernels_of(with_formats(mod, dict.fromkeys(names, "int8")), batch=1, target=TARGET)
    assert sorted(name for _, name in found if name) == sorted(names)
