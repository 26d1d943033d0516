"""Kernels that multiply tiles: their results with emulated instructions, and the real ones in the code."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from support.asked import marked
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.grids import calibrated
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.codegen import lower as lowering
from tvm_lowrank.codegen import processor, schedule, tiles, units
from tvm_lowrank.codegen.processor import needs_of_target
from tvm_lowrank.codegen.schedule import Tiling, Workload
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.precision import with_formats
from tvm_lowrank.searching.latency.peaks import _products
from tvm_lowrank.searching.latency.tiles import first_candidates, register_tiles, variants
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.targets.toolchain import cross_compiler, host_arch, triple_of

AMX = {"bfloat16": "amx_bf16", "int8": "amx_int8"}
SAPPHIRE = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids"}
SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The instructions in software, where compiled code finds them."""
    library = tmp_path_factory.mktemp("tiles") / "libtiles.so"
    compiler = cross_compiler(triple_of(host_arch()))
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SUPPORT / "tiles.cc"], check=True)
    found = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    found.emulated_products.restype = ctypes.c_int64
    return found


@pytest.fixture
def emulated(emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Every target has tiles, and nothing else for bfloat16 and int8; some products are made with them."""
    real = tiles.functions

    def functions(*arguments: object, **options: object) -> str:
        text = real(*arguments, **options)  # type: ignore[arg-type]
        return text.replace("llvm.x86.", "emulated_").replace(" immarg", "")

    monkeypatch.setattr(tiles, "functions", functions)
    for name in units.UNITS:
        monkeypatch.setitem(units.UNITS, name, replace(units.UNITS[name], features=frozenset({"none"})))
    for name in AMX.values():
        monkeypatch.setitem(units.UNITS, name, replace(units.UNITS[name], features=frozenset()))
    before = emulator.emulated_products()
    yield emulator
    assert emulator.emulated_products() > before


class Network(nn.Module):
    """A convolution with an activation and a residual, behind another one."""

    def __init__(self, inside: int, outside: int, kernel: int, **options: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, inside, 1)
        self.second = nn.Conv2d(inside, outside, kernel, **options)
        self.beside = nn.Conv2d(3, outside, kernel, **{**options, "groups": 1})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.beside(x))


def lowered(
    network: nn.Module, size: int, batch: int = 1, format: str = "bfloat16"
) -> tuple[tvm.IRModule, tvm.IRModule]:
    """The canonical module with its second convolution in a format, and what it is lowered to."""
    mod = import_model(network.eval(), input_shape=(1, 3, size, size))
    name = next(site.id for site in find_sites(mod) if "second" in site.id)
    images = np.random.default_rng(1).standard_normal((batch, 3, size, size)).astype("float32")
    mod = calibrated(with_formats(mod, {name: format}), images)
    return mod, lowering.lower(mod, batch=batch, target=TARGET)


PROFILE = load_profile("x86" if host_arch() == "x86_64" else "arm")
TARGET = PROFILE.tvm_target()


def kernel_of(low: tvm.IRModule) -> tuple[lowering.Kernel, Workload]:
    """The one with tiles."""
    spaces = [(kernel, schedule.workload(kernel.func)) for kernel in lowering.kernels(low)]
    [(kernel, space)] = [(kernel, space) for kernel, space in spaces if space is not None and space.units]
    return kernel, space


# channels in and out, kernel, size, options, images and threads; one of each kind of rest
CASES = [
    (64, 32, 1, 14, {}, 1, 1),
    (32, 64, 3, 12, {"padding": 1}, 1, 2),
    (48, 32, 3, 16, {"padding": 1, "stride": 2}, 1, 2),  # steps of 12
    (80, 48, 3, 14, {"padding": 2, "dilation": 2}, 1, 1),  # steps of 10
    (33, 31, 3, 9, {"padding": 1}, 1, 1),  # channels are added on both sides
    (64, 64, 3, 7, {"padding": 1, "groups": 2}, 1, 1),
    (16, 16, 5, 34, {"padding": 2}, 3, 2),  # several images
]


@pytest.mark.parametrize("format", AMX)
@pytest.mark.parametrize(("inside", "outside", "kernel", "size", "options", "batch", "threads"), CASES)
def test_what_is_computed(
    emulated: ctypes.CDLL,
    inside: int,
    outside: int,
    kernel: int,
    size: int,
    options: dict[str, int],
    batch: int,
    threads: int,
    format: str,
) -> None:
    torch.manual_seed(0)
    mod, low = lowered(Network(inside, outside, kernel, **options), size, batch, format)
    found, space = kernel_of(low)
    candidates = register_tiles(space, lanes=PROFILE.lanes, registers=PROFILE.registers)
    assert candidates and all(tiling.unit == AMX[format] for tiling in candidates)
    x = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype("float32")
    expected = predict(TorchBridge(mod), x)
    # the best with all its variants, and some of the others
    tried = [candidates[0], *variants(candidates[0], space), *candidates[1 :: max(1, len(candidates) // 4)]]
    for tiling in tried:
        library = lowering.build(low, {found.key: tiling}, TARGET, threads=threads)
        result = relax.VirtualMachine(library, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4, err_msg=str(tiling))


@pytest.mark.parametrize(("size", "threads"), [(14, 1), (28, 2)])
def test_weights_are_fetched_ahead(emulated: ctypes.CDLL, size: int, threads: int) -> None:
    """Each line of the next tile of channels, be there more or fewer positions than lines a step."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((1, 64, size, size), "float32"))
    weights = relax.const(np.zeros((64, 64, 3, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            made = builder.emit_output(builder.emit(relax.op.nn.conv2d(x, weights, padding=1), name_hint="conv"))
        builder.emit_func_output(made)
    low = lowering.lower(with_formats(builder.get(), {"conv": "bfloat16"}), batch=1, target=TARGET)
    kernel, space = kernel_of(low)
    tilings = register_tiles(space, lanes=PROFILE.lanes, registers=PROFILE.registers)
    tiling = next(own for own in tilings if own.channels_first and not own.stripe and own.tile[-1] == 32)
    memory, whole = marked(kernel.func, tiling, threads)
    lines = np.flatnonzero(memory)
    assert set(range(whole // 2, whole, 64)) <= set(lines) and lines[0] == whole // 2 and not np.any(lines % 64)


def test_peaks_are_measured_with_tiles(emulated: ctypes.CDLL) -> None:
    for job in _products(32, PROFILE, "bfloat16"):
        assert job.tiling is not None and job.tiling.unit == AMX["bfloat16"]
        func = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(
            schedule.apply(job.func, job.tiling, target=TARGET, threads=1)
        )
        built = tvm.compile(func, target=TARGET)
        shapes = [tuple(int(extent) for extent in param.shape) for param in func["main"].params]
        a, b = (np.random.default_rng(0).standard_normal(shape).astype("float32") for shape in shapes[:2])
        a, b = (array.astype("bfloat16").view("uint16") for array in (a, b))
        result = tvm.runtime.tensor(np.zeros(shapes[2], "float32"))
        built["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), result)
        assert np.isfinite(result.numpy()).all() and result.numpy().std() > 1


def test_more_accumulators_than_registers_are_refused(emulated: ctypes.CDLL) -> None:
    _, low = lowered(Network(32, 32, 3, padding=1), 12)
    kernel, space = kernel_of(low)
    with pytest.raises(ValueError, match="accumulators, but 4 registers"):
        schedule.apply(kernel.func, Tiling((1, 6, 12, 32), 16, unit=AMX["bfloat16"]), target=TARGET, threads=1)
    good = register_tiles(space, lanes=16, registers=32)[0]
    built = lowering.build(low, {kernel.key: good}, TARGET, threads=1)
    relax.VirtualMachine(built, tvm.cpu())["main"](tvm.runtime.tensor(np.zeros((1, 3, 12, 12), "float32")))


@pytest.mark.skipif(host_arch() != "x86_64", reason="LLVM may lack the other architecture")
@pytest.mark.parametrize("threads", [1, 4])
def test_the_instructions_are_in_the_code(threads: int) -> None:
    target = tvm.target.Target(SAPPHIRE)
    # few enough positions for all of them to fetch weights ahead
    mod = import_model(Network(64, 64, 3, padding=1).eval(), input_shape=(1, 3, 14, 14))
    name = next(site.id for site in find_sites(mod) if "second" in site.id)
    low = lowering.lower(with_formats(mod, {name: "bfloat16"}), batch=1, target=target)
    kernel, space = kernel_of(low)
    assert set(space.units) == {"avx512_bf16", AMX["bfloat16"]}
    best, *_ = first_candidates(space, lanes=16, registers=32, limit=12)
    assert best is not None and best.unit == AMX["bfloat16"]
    scheduled = schedule.apply(kernel.func, best, target=target, threads=threads)
    code = tvm.compile(scheduled, target).mod.inspect_source("asm")
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilezero", "tilerelease"):
        assert instruction in code
    assert best.channels_first and "prefetch" in code
    # all is inlined, two by two accumulators stay in registers, and the shape of these is said once
    assert "call" not in [line.split()[0] for line in code.splitlines() if "tvm_lowrank_amx" in line and line.split()]
    counts = {what: code.count(f"\t{what}") for what in ("tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg")}
    assert counts["tdpbf16ps"] % 4 == 0 and counts["tileloadd"] == counts["tdpbf16ps"]
    assert counts["tilestored"] == 4 and counts["ldtilecfg"] == 1


def test_the_other_instructions_compete() -> None:
    space = Workload((1, 14, 14, 256), (3, 3, 256), 256, True, "bfloat16", ("avx512_bf16", AMX["bfloat16"]))
    found = register_tiles(space, lanes=16, registers=32)
    assert {tiling.unit for tiling in found} == {"avx512_bf16", AMX["bfloat16"]}
    assert found[0].unit == AMX["bfloat16"] and found[0].tile[-2] == 14
    # tiles of few rows are not worth it
    narrow = replace(space, spatial=(1, 1, 1, 256), reduction=(1, 1, 2), padded=False)
    assert register_tiles(narrow, lanes=16, registers=32)[0].unit == "avx512_bf16"


def test_libraries_say_that_they_need_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needs_of_target(tvm.target.Target(SAPPHIRE)).features
    assert {"amx_tile", "amx_bf16"} <= set(needed)
    if host_arch() != "x86_64":
        return
    # a machine that has them, and a Linux that refuses them
    monkeypatch.setattr(processor, "_present", lambda: set(needed))
    monkeypatch.setattr(processor, "_refused_tiles", lambda: "Operation not permitted")
    without = processor.without_missing(SAPPHIRE)
    assert set(without["mattr"]) == {"-amx-tile", "-amx-bf16", "-amx-int8"}
    assert AMX["bfloat16"] not in [unit.name for unit in units.units_of(tvm.target.Target(without))]
    monkeypatch.setattr(processor, "_refused_tiles", lambda: None)
    assert processor.without_missing(SAPPHIRE) == SAPPHIRE
