"""Convolutions in half precision: the compiled code against PyTorch, whose operands are rounded."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import te
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from support.lowering_networks import LAYERS, canonical, expected, network, run, sample
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.codegen import schedule
from tvm_lowrank.codegen.kept import as_kept, narrowed, widened
from tvm_lowrank.codegen.lower import build, kernels, kernels_of, lower
from tvm_lowrank.codegen.schedule import workload
from tvm_lowrank.codegen.units import UNITS, Unit, formats_of, rounding_of, tensor_intrin, units_of
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.graph import find_sites
from tvm_lowrank.precision import with_formats
from tvm_lowrank.searching.latency.tiles import register_tiles, variants
from tvm_lowrank.targets.profile import load_profile

TARGET = load_profile("x86").tvm_target()


class Residual(nn.Module):
    """A tensor that convolutions and an addition read, and a pooling of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.third = nn.Conv2d(16, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.third(nn.functional.max_pool2d(x, 2)).mean((2, 3)) + self.third(x).mean((2, 3))


def half(net: nn.Module, shape: tuple[int, ...], format: str = "bfloat16") -> tvm.IRModule:
    mod = canonical(net, shape)
    return with_formats(mod, {site.id: format for site in find_sites(mod)})


def reference(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    return TorchBridge(mod)(torch.from_numpy(x)).detach().numpy()


def close(found: np.ndarray, wanted: np.ndarray, bound: float = 1e-6) -> bool:
    return bool(np.abs(found - wanted).max() <= bound * np.abs(wanted).max())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cpu", ["", "haswell"])
@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_a_convolution_is_that_of_rounded_operands(name: str, cpu: str, format: str) -> None:
    """With the processor's dot products and half-precision arithmetic, and where it has none."""
    net = network(LAYERS[name], nn.ReLU())
    shape = (LAYERS[name].in_channels, 9, 8)
    mod, x = half(net, shape, format), sample(2, *shape)
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu}) if cpu else TARGET
    found = run(build(lower(mod, batch=2, target=target), {}, target), x)
    # products that are added up in float16: each sum of so many is rounded as often
    bound = 1e-6 if format == "bfloat16" else FORMATS[format].roundoff * 144**0.5
    assert close(found, reference(mod, x), bound)
    assert 1e-4 < np.abs(found - expected(net, x)).max() / np.abs(found).max() < 1e-2


@pytest.mark.parametrize("threads", [1, 2])
def test_every_schedule_of_sums_in_float16_is_correct(threads: int) -> None:
    net = network(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU())
    mod, x = half(net, (32, 8, 8), "float16"), sample(1, 32, 8, 8)
    lowered = lower(mod, batch=1, target=TARGET)
    (kernel,) = [k for k in kernels(lowered) if k.is_conv]
    space = workload(kernel.func)
    assert space is not None and (space.format, space.reduction) == ("float16", (3, 3, 32))
    best = register_tiles(space, lanes=4, registers=32)[0]
    for tiling in [best, *variants(best, space)]:
        library = build(lowered, {kernel.key: tiling}, TARGET, threads=threads)
        assert close(run(library, x), reference(mod, x), FORMATS["float16"].roundoff * 96**0.5), tiling


def test_float16_on_arm_is_computed_with_as_many_lanes_and_nothing_is_converted_in_the_loop() -> None:
    """Twice the lanes of float32, for as many multiplications of vectors: the code is for a Cortex-A76, not run."""
    target = load_profile("rpi5").tvm_target()
    counts = {}
    for format, lanes in (("float32", 4), ("float16", 8)):
        net = network(nn.Conv2d(64, 64, 3, padding=1))
        lowered = lower(half(net, (64, 8, 8), format), batch=1, target=target)
        (kernel,) = [k for k in kernels(lowered) if k.is_conv]
        tiling = register_tiles(workload(kernel.func), lanes=4, registers=32)[0]  # type: ignore[arg-type]
        assert tiling.vector == lanes
        func = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(
            schedule.apply(kernel.func, tiling, target=target, threads=1)
        )
        library = tvm.tirx.build(func, target=target)
        code = [*library.imports, library][0].inspect_source("asm")
        counts[format] = {kind: len(re.findall(rf"fmla\s+v\d+\.{kind}", code)) for kind in ("4s", "8h")}
    assert counts["float32"]["8h"] == 0 < counts["float32"]["4s"]
    assert counts["float16"]["4s"] == 0 < counts["float16"]["8h"]


@pytest.mark.parametrize("name", LAYERS)
def test_every_schedule_of_a_dot_product_is_correct(name: str) -> None:
    if not units_of(TARGET):
        pytest.skip("this processor has no dot products of half-precision numbers")
    shape = (LAYERS[name].in_channels, 8, 8)
    mod, x = half(network(LAYERS[name], nn.ReLU()), shape), sample(1, *shape)
    lowered = lower(mod, batch=1, target=TARGET)
    (kernel,) = [k for k in kernels(lowered) if k.is_conv]
    space = workload(kernel.func)
    assert space is not None and space.format == "bfloat16"
    best = register_tiles(space, lanes=16, registers=32)[0]
    assert bool(best.unit) == (name not in ("odd groups", "depthwise"))
    for tiling in [best, *variants(best, space), replace(best, unit="")]:
        library = build(lowered, {kernel.key: tiling}, TARGET)
        assert close(run(library, x), reference(mod, x)), tiling


def test_the_instruction_is_in_the_code() -> None:
    if not units_of(TARGET):
        pytest.skip("this processor has no dot products of half-precision numbers")
    lowered = lower(half(network(LAYERS["padded"]), (16, 8, 8)), batch=1, target=TARGET)
    library = build(lowered, {}, TARGET)
    code = library.mod.imports[0].inspect_source("asm")
    assert "vdpbf16ps" in code and not re.search(r"call\S*\s+\S*tvm_lowrank", code), "the function is inlined"


class Ends(nn.Module):
    """Its result is a convolution, or what one reads."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return x + torch.relu(self.second(x)).mean() if self.read else self.second(x)


@pytest.mark.parametrize("read", [False, True])
def test_the_last_of_a_network_is_a_convolution(read: bool) -> None:
    mod, x = half(network(Ends(read=read)), (16, 8, 8)), sample(2, 16, 8, 8)
    assert close(run(build(lower(mod, batch=2, target=TARGET), {}, TARGET), x), reference(mod, x), 2**-8)


@pytest.mark.parametrize("channels", [32, 24])
@pytest.mark.parametrize("cpu", ["", "haswell"])
def test_results_are_rounded_to_the_nearest(channels: int, cpu: str) -> None:
    """Any bit pattern, by the processor's instruction where it has one and the channels fill its vectors."""
    bits = np.random.default_rng(0).integers(0, 2**32, channels, dtype=np.uint64).astype("uint32")
    bits[: channels // 2] = bits[: channels // 2] & 0xFFFF0000 | 0x8000  # half way between two
    bias = bits.view("float32").copy()
    bias[~np.isfinite(bias) | (np.abs(bias) < 1e-30) | (np.abs(bias) > 1e30)] = 1.00390625
    first, second = nn.Conv2d(16, channels, 1), nn.Conv2d(channels, channels, 1, bias=False)
    with torch.no_grad():
        first.bias.copy_(torch.from_numpy(bias))  # type: ignore[union-attr]
        second.weight.copy_(torch.eye(channels)[:, :, None, None])
    mod, x = half(nn.Sequential(first, second), (16, 4, 4)), np.zeros((1, 16, 4, 4), "float32")
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu}) if cpu else TARGET
    lowered = lower(mod, batch=1, target=target)
    library = build(lowered, {}, target)
    found = run(library, x)[0, :, 0, 0]
    np.testing.assert_array_equal(found, FORMATS["bfloat16"].rounded(bias))
    code = library.mod.imports[0].inspect_source("asm")
    assert ("vcvtneps2bf16" in code) == (rounding_of(target, "bfloat16", 16) is not None and channels == 32)


def test_what_convolutions_read_is_kept_in_half_precision_and_others_read_it_too() -> None:
    mod, x = half(network(Residual()), (16, 8, 8)), sample(2, 16, 8, 8)
    lowered = lower(mod, batch=2, target=TARGET)
    # half of the time an addition of equally large numbers rounds another way than PyTorch's
    assert close(run(build(lowered, {}, TARGET), x), reference(mod, x), 2**-8)
    operands = [str(p.dtype) for kernel in kernels(lowered) if kernel.is_conv for p in kernel.func["main"].params[:1]]
    assert operands == ["uint16"] * 4


def test_kernels_of_sites_in_different_formats_are_told_apart() -> None:
    mod = canonical(network(Residual()), (16, 8, 8))
    names = [site.id for site in find_sites(mod)]
    found = kernels_of(with_formats(mod, {names[1]: "bfloat16"}), batch=1, target=TARGET)
    spaces = {name: workload(kernel.func) for kernel, name in found if name is not None}
    assert {name: space.format for name, space in spaces.items() if space} == {
        name: "bfloat16" if name == names[1] else "float32" for name in names
    }


@pytest.mark.parametrize("lanes", [1, 16])
def test_rounding_is_that_of_the_format(lanes: int) -> None:
    """Ties, the largest numbers, subnormal ones, infinities and what is no number."""
    bits = np.arange(0, 2**32, 65521 * 4, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0x3F808000, 0x3F818000, 1, 0x80000001], "uint32"
    )
    values = np.concatenate([bits, special]).view("float32")
    values = values[: len(values) // 16 * 16]
    x = te.placeholder((len(values),), "float32", name="x")
    y = te.compute(x.shape, lambda i: narrowed(x[i], "bfloat16"), name="y")
    z = te.compute(x.shape, lambda i: widened(y[i], "bfloat16"), name="z")
    sch = tvm.s_tir.Schedule(te.create_prim_func([x, y, z]))
    for block in "yz":
        _, lane = sch.split(sch.get_loops(sch.get_sblock(block))[0], [None, lanes])
        sch.vectorize(lane)
    library = tvm.compile(sch.mod, TARGET)
    arguments = [tvm.runtime.tensor(a) for a in (values, np.zeros(len(values), "uint16"), np.zeros_like(values))]
    library["main"](*arguments)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arguments[1].numpy()[wanted == wanted], wanted[wanted == wanted].view("uint16"))
    np.testing.assert_array_equal(arguments[2].numpy(), wanted.astype("float32"))
    np.testing.assert_array_equal(as_kept(values[wanted == wanted], "uint16"), wanted[wanted == wanted].view("uint16"))


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_intrinsics_are_what_they_are_described_as(unit: Unit) -> None:
    """Everywhere: the description that TVM matches is the dot product; the instruction runs where there is one."""
    from tvm.s_tir import TensorIntrin

    intrinsic = TensorIntrin.get(tensor_intrin(unit.name))
    generator = np.random.default_rng(0)
    whole = FORMATS[unit.format].whole

    def numbers(type: str, *shape: int) -> np.ndarray:
        if whole:
            return generator.integers(np.iinfo(type).min, np.iinfo(type).max, shape, type, endpoint=True)
        return as_kept(generator.standard_normal(shape).astype("float32"), type)

    def wide(array: np.ndarray) -> np.ndarray:
        return array.astype("int32") if whole else (array.astype("uint32") << 16).view("float32")

    a, b = numbers(unit.left, unit.depth), numbers(unit.right, unit.lanes, unit.depth)
    c = numbers("int16", unit.lanes).astype("int32") if whole else numbers("float32", unit.lanes)
    library = tvm.compile(tvm.IRModule({"main": intrinsic.desc.with_attr("global_symbol", "main")}), TARGET)
    arguments = [tvm.runtime.tensor(v) for v in (a, b, c)]
    library["main"](*arguments)
    np.testing.assert_allclose(arguments[2].numpy(), c + wide(b) @ wide(a), rtol=0 if whole else 1e-6)


def test_formats_of_targets() -> None:
    def names(target: dict[str, object]) -> list[str]:
        return [format.name for format in formats_of(tvm.target.Target(target))]

    assert names({"kind": "llvm", "mcpu": "haswell"}) == ["float32"]
    assert names({"kind": "llvm", "mcpu": "znver4"}) == ["float32", "bfloat16", "int8"]
    assert names({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}) == ["float32"]
    for name in ("rpi5", "android-v8.2"):
        assert set(load_profile(name).formats) == {"float32", "float16", "int8"}
    assert [load_profile(name).formats for name in ("arm", "rpi3", "rpi4", "android")] == [("float32",)] * 4
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+bf16", "+neon"]}
    assert "bfloat16" in names(arm)
