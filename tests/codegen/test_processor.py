"""What compiled code needs of a processor: found, written into libraries, and looked for by Python and by C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import te

from tvm_lowrank.bundle.package import SOURCES
from tvm_lowrank.codegen import processor
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.processor import FEATURES, Needs, needs_of_target
from tvm_lowrank.errors import UserError
from tvm_lowrank.searching.measure.worker import Session
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.targets.toolchain import cross_compiler, host_arch, triple_of

TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "armv7": "armv7-linux-gnueabihf"}
AVX2 = "pni ssse3 sse4_1 sse4_2 popcnt movbe abm bmi1 bmi2 avx avx2 fma f16c"
VFP4 = ["neon", "vfpv4", "idiva", "idivt", "vfpd32"]
AVX512 = ("avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl")
HASWELL = f"processor\t: 0\nmodel name\t: Haswell\nflags\t\t: fpu sse sse2 {AVX2} lahf_lm\n"
CORTEX_A72 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"
HALF = {"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72", "mattr": ["+neon", "+fullfp16"]}
A72 = {**HALF, "mattr": ["+neon"]}
SMALL_PROGRAM = """
#include <cstdio>
#include "needs.h"
int main(int, char** arguments) { std::puts(tlr::WhyNot(arguments[1]).c_str()); }
"""


def target(**attributes: Any) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", **attributes})


def sum_of_vectors(path: Path, goal: tvm.target.Target, cc: str | None = None) -> Path:
    """A library for a target."""
    a, b = (te.placeholder((64,), name=name) for name in "ab")
    func = te.create_prim_func([a, b, te.compute((64,), lambda i: a[i] + b[i])]).with_attr("global_symbol", "main")
    export_library(tvm.tirx.build(tvm.IRModule({"main": func}), target=goal), path, cc=cc)
    return path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes this machine another, by its architecture and its /proc/cpuinfo (None: it has none)."""

    def become(name: str, cpuinfo: str | None) -> None:
        monkeypatch.setattr(processor.platform, "machine", lambda: name)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)

    return become


@pytest.mark.parametrize("arch", FEATURES)
def test_names_are_those_of_llvm(arch: str) -> None:
    for name, (word, place) in FEATURES[arch].items():
        goal = target(mtriple=TRIPLES[arch], mattr=[f"+{name}"])
        assert name in map(str, tvm.target.codegen.llvm_get_cpu_features(goal)), name
        assert " " not in word + place and ":" not in word
        assert word in needs_of_target(goal).features
    assert len(dict(FEATURES[arch].values())) == len(FEATURES[arch])


@pytest.mark.parametrize(
    ("attributes", "arch", "features"),
    [
        ({"mcpu": "x86-64", "mtriple": TRIPLES["x86_64"]}, "x86_64", []),
        ({"mcpu": "haswell", "mtriple": TRIPLES["x86_64"]}, "x86_64", AVX2.split()),
        ({"mcpu": "skylake-avx512", "mtriple": TRIPLES["x86_64"]}, "x86_64", [*AVX2.split(), *AVX512]),
        (A72, "aarch64", []),
        (HALF, "aarch64", ["asimdhp"]),
        ({"mtriple": "aarch64-linux-android24", "mattr": ["+neon"]}, "aarch64", []),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, "aarch64", ["asimdhp", "asimdrdm", "asimddp"]),
        ({"mtriple": "arm-linux-gnueabihf", "mcpu": "cortex-a7"}, "armv7", VFP4),
        ({"mtriple": "riscv64-linux-gnu"}, "riscv64", []),
    ],
)
def test_needs_of_targets(attributes: dict[str, Any], arch: str, features: list[str]) -> None:
    needs = needs_of_target(target(**attributes))
    assert (needs.arch, sorted(needs.features)) == (arch, sorted(features))


@pytest.mark.skipif(host_arch() != "x86_64", reason="needs a compiler for x86-64")
def test_a_library_says_what_it_needs(machine: Any, tmp_path: Path) -> None:
    path = sum_of_vectors(tmp_path / "sum.so", target(mcpu="skylake-avx512"))
    needs = processor.read(path)
    assert needs is not None and set(AVX512) < set(needs.features)
    machine("x86_64", HASWELL)
    with pytest.raises(UserError) as error:
        processor.check(path)
    assert str(error.value) == (
        f"{path} needs a processor with avx512f, avx512dq, avx512cd, avx512bw, avx512vl, which this one does not have; "
        "build it for this processor, or use another"
    )
    processor.check(sum_of_vectors(tmp_path / "older.so", target(mcpu="haswell")))


def test_so_do_kernels_that_are_sent_to_boards(tmp_path: Path) -> None:
    a = te.placeholder((64,), name="a")
    func = te.create_prim_func([a, te.compute((64,), lambda i: a[i] + 1.0)]).with_attr("global_symbol", "main")
    compiler = cross_compiler(triple_of(host_arch()))
    goal = tvm.ir.save_json(target())
    source = tvm.ir.save_json(tvm.IRModule({"main": func}))
    assert Session().export(str(tmp_path / "0.so"), source, None, goal, 1, compiler, ()) == [([64], "float32")] * 2
    assert processor.read(tmp_path / "0.so") == needs_of_target(target())


def test_what_says_nothing_is_not_refused(machine: Any, tmp_path: Path) -> None:
    machine("x86_64", HASWELL)
    for name, content in (("empty.so", b""), ("older.so", b"\x7fELF, and no word of what it needs")):
        (tmp_path / name).write_bytes(content)
        processor.check(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        processor.check(tmp_path / "none.so")


def test_only_what_is_known_to_be_missing_counts(machine: Any) -> None:
    half = Needs("aarch64", ("asimdhp",))
    machine("aarch64", CORTEX_A72)
    assert processor.missing(half) == ("asimdhp",)
    assert processor.missing(Needs("aarch64")) == ()
    assert processor.missing(Needs("x86_64", ("avx",))) == ()  # cannot be loaded, which the loader says
    machine("aarch64", CORTEX_A72.replace("crc32", "crc32 asimdhp"))
    assert processor.missing(half) == ()
    machine("armv7l", CORTEX_A72)
    assert processor.missing(Needs("armv7", ("crc32", "neon"))) == ("neon",)
    machine("aarch64", "processor\t: 0\n")
    assert processor.missing(half) == ()


def test_a_machine_without_cpuinfo_is_trusted(machine: Any) -> None:
    machine("x86_64", None)
    assert processor.missing(Needs("x86_64", AVX512)) == ()


@pytest.mark.skipif(host_arch() != "x86_64", reason="needs this machine to be x86-64")
def test_code_for_this_machine_leaves_out_what_it_hides(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest may have the name of a processor without all of its features."""
    monkeypatch.delenv("TVM_LOWRANK_HOST_CPU", raising=False)
    monkeypatch.setattr("tvm_lowrank.targets.profile.codegen.llvm_get_system_cpu", lambda: "skylake-avx512")
    machine("x86_64", HASWELL)
    profile = load_profile("x86")
    assert "-avx512f" in profile.target["mattr"] and profile.lanes == 8
    assert processor.missing(needs_of_target(profile.tvm_target())) == ()
    machine("x86_64", HASWELL.replace("lahf_lm", " ".join(AVX512)))
    assert "mattr" not in load_profile("x86").target and load_profile("x86").lanes == 16


def test_tiles_are_asked_for_where_they_are_needed(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("x86_64", HASWELL.replace("lahf_lm", "amx_tile amx_bf16"))
    asked = []
    monkeypatch.setattr(processor, "_refused_tiles", lambda: asked.append(1))
    processor.require(Needs("x86_64", ("avx2",)), "this")
    assert not asked
    processor.require(Needs("x86_64", ("amx_tile", "amx_bf16")), "this")
    assert asked
    monkeypatch.setattr(processor, "_refused_tiles", lambda: "Operation not permitted")
    with pytest.raises(UserError, match=r"this needs amx_tile, which Linux refuses .* \(Operation not permitted\); "):
        processor.require(Needs("x86_64", ("amx_tile",)), "this")


@pytest.mark.skipif(host_arch() != "x86_64", reason="AMX is of x86-64")
def test_linux_answers_the_request_for_tiles() -> None:
    reason = processor._refused_tiles()
    assert reason is None or ("amx_tile" not in processor.CPUINFO.read_text() and reason)


def why_not(folder: Path, arch: str, cpu: str, library: Path) -> str:
    """What a C++ program says of a library on an emulated processor."""
    program, source = folder / f"why-{arch}", folder / "why.cc"
    compiler = cross_compiler(triple_of(arch))
    source.write_text(SMALL_PROGRAM)
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-std=c++17", *warnings, f"-I{SOURCES}", source, "-o", program, "-ldl"]
    subprocess.run(command, check=True)
    qemu = shutil.which(f"qemu-{arch.replace('armv7', 'arm')}-static")
    assert qemu is not None
    root = [] if arch == host_arch() else ["-L", f"/usr/{triple_of(arch)}"]
    done = subprocess.run([qemu, *root, "-cpu", cpu, program, library], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.needs("qemu-x86_64-static")
@pytest.mark.skipif(host_arch() != "x86_64", reason="needs a compiler for x86-64")
@pytest.mark.parametrize(
    ("model", "cpu", "missing"),
    [
        ("skylake-avx512", "Haswell", ", ".join(AVX512)),
        ("haswell", "Haswell", ""),
        ("haswell", "IvyBridge", "movbe, abm, bmi1, bmi2, avx2, fma"),
        ("sapphirerapids", "Haswell", "gfni, avx_vnni, avx512f"),
        ("x86-64", "qemu64", ""),
    ],
)
def test_cpp_on_another_x86_processor(tmp_path: Path, model: str, cpu: str, missing: str) -> None:
    library = sum_of_vectors(tmp_path / "sum.so", target(mcpu=model))
    said = why_not(tmp_path, "x86_64", cpu, library)
    assert said.startswith(f"needs a processor with {missing}") if missing else said == ""


@pytest.mark.needs("qemu-aarch64-static", "aarch64-linux-gnu-g++")
@pytest.mark.skipif(host_arch() != "x86_64", reason="the processor must be emulated")
@pytest.mark.parametrize(
    ("attributes", "cpu", "missing"),
    [(HALF, "cortex-a72", "asimdhp"), (HALF, "cortex-a76", ""), (A72, "cortex-a72", "")],
)
def test_cpp_on_another_arm_processor(tmp_path: Path, attributes: dict[str, Any], cpu: str, missing: str) -> None:
    library = sum_of_vectors(tmp_path / "sum.so", target(**attributes), cc="aarch64-linux-gnu-g++")
    said = why_not(tmp_path, "aarch64", cpu, library)
    assert said == (f"needs a processor with {missing}, which this one does not have" if missing else "")


@pytest.mark.needs("qemu-arm-static", "arm-linux-gnueabihf-g++")
@pytest.mark.parametrize(
    ("cpu", "missing"), [("cortex-a7", ""), ("cortex-a8", "vfpv4, idiva, idivt"), ("cortex-a9", "vfpv4, idiva, idivt")]
)
def test_cpp_on_another_32_bit_arm_processor(tmp_path: Path, cpu: str, missing: str) -> None:
    goal = target(**{"mtriple": "arm-linux-gnueabihf", "mcpu": "cortex-a7", "mfloat-abi": "hard"})
    library = sum_of_vectors(tmp_path / "sum.so", goal, cc="arm-linux-gnueabihf-g++")
    said = why_not(tmp_path, "armv7", cpu, library)
    assert said.startswith(f"needs a processor with {missing}") if missing else said == ""
