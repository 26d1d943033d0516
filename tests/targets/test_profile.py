import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tvm_lowrank.codegen.schedule import target_lanes
from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.probe import SAMPLE_LIBRARY, export_libraries
from tvm_lowrank.targets.profile import known_profiles, load_profile
from tvm_lowrank.targets.toolchain import host_arch

VECTOR = "[vector]\nlanes = 4\nregisters = 32\n"
ARM = '[target]\nkind = "llvm"\nmtriple = "aarch64-linux-gnu"\n'
MACHINES = {"aarch64": "AArch64", "armv7": "ARM", "x86_64": "Advanced Micro Devices X86-64"}


def write(folder, text):
    path = folder / "board.toml"
    path.write_text(text)
    return str(path)


def test_bundled_profile_describes_this_machine():
    profile = load_profile("x86")
    assert profile.target["mcpu"] != "host"
    assert (profile.lanes, profile.registers) in {(16, 32), (8, 16), (4, 16)}
    assert int(profile.tvm_target(3).attrs["num-cores"]) == 3
    assert profile.is_host and profile.arch == host_arch() and profile.cores == os.cpu_count()


@pytest.mark.parametrize(
    ("name", "triple", "arch", "registers", "cores"),
    [
        ("arm", "aarch64-linux-gnu", "aarch64", 32, 4),
        ("rpi3", "aarch64-linux-gnu", "aarch64", 32, 4),
        ("rpi4", "aarch64-linux-gnu", "aarch64", 32, 4),
        ("rpi5", "aarch64-linux-gnu", "aarch64", 32, 4),
        ("rpi4-32", "arm-linux-gnueabihf", "armv7", 16, 4),
        ("android", "aarch64-linux-android24", "aarch64", 32, 8),
    ],
)
def test_boards_are_described(name, triple, arch, registers, cores):
    profile = load_profile(name)
    assert (profile.triple, profile.arch, profile.registers, profile.cores) == (triple, arch, registers, cores)
    assert profile.lanes == target_lanes(profile.tvm_target()) == 4
    assert profile.rpc_key == name and not profile.is_host


@pytest.mark.needs("aarch64-linux-gnu-g++", "arm-linux-gnueabihf-g++", "clang", "ld.lld")
@pytest.mark.parametrize("name", known_profiles())
def test_convolution_is_compiled_and_linked_for_every_target(name, tmp_path):
    profile = load_profile(name)
    try:
        profile.linker()
    except UserError:
        assert shutil.which("clang"), f"the compiler of {name} is not installed"  # the NDK is not needed for the tests
        options = (f"--target={profile.triple}", "-fuse-ld=lld", "-nostdlib")
        profile = replace(profile, compiler="clang", options=options)
    export_libraries(profile, tmp_path)
    header = subprocess.run(["readelf", "-hW", tmp_path / SAMPLE_LIBRARY], capture_output=True, text=True).stdout
    assert f"Machine:                           {MACHINES[profile.arch]}\n" in header
    assert ("hard-float ABI" in header) == (profile.arch == "armv7")


def test_vector_file_follows_the_processor(tmp_path):
    vector = '[vector]\nlanes = "detect"\nregisters = "detect"\n'
    sizes = {}
    for triple, cpu in (
        ("x86_64-linux-gnu", "haswell"),
        ("x86_64-linux-gnu", "skylake-avx512"),
        ("aarch64-linux-gnu", "cortex-a76"),
        ("arm-linux-gnueabihf", "cortex-a76"),
    ):
        path = write(tmp_path, f'[target]\nkind = "llvm"\nmtriple = "{triple}"\nmcpu = "{cpu}"\n{vector}')
        profile = load_profile(path)
        sizes[triple.split("-")[0], cpu] = (profile.lanes, profile.registers)
    assert list(sizes.values()) == [(8, 16), (16, 32), (4, 32), (4, 16)]


def test_key_is_stable_and_tells_processors_apart(tmp_path):
    text = '[target]\nkind = "llvm"\nmtriple = "x86_64-linux-gnu"\nmcpu = "{}"\n[vector]\nlanes = 8\nregisters = 16\n'
    one, same, other = (load_profile(write(tmp_path, text.format(cpu))) for cpu in ("haswell", "haswell", "znver3"))
    assert one.key == same.key == "board-llvm-x86_64-linux-gnu-haswell-8x16"
    assert other.key != one.key
    assert replace(one, emulated=True).key == f"{one.key}-emulated"


def test_profile_of_ones_own(tmp_path):
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    link = f'[link]\ncompiler = "{compiler}"\noptions = ["-lm"]\n'
    head = 'description = "mine"\ncores = 6\n'
    profile = load_profile(write(tmp_path, head + ARM + VECTOR + link + '[rpc]\nkey = "mine"\n'))
    assert (profile.name, profile.description, profile.cores, profile.rpc_key) == ("board", "mine", 6, "mine")
    assert profile.linker() == (str(compiler), ("-lm",))
    assert profile.code == "aarch64-linux-gnu"
    compiler.unlink()
    with pytest.raises(UserError, match=r"no compiler .*my-g\+\+ \(target board\); install it"):
        profile.linker()


def test_documented_profile_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    profile = load_profile(write(tmp_path, block))
    assert (profile.lanes, profile.registers, profile.options, profile.rpc_key) == (4, 32, ("-lm",), "rock5b")


def test_unknown_target_lists_the_known():
    assert "x86" in known_profiles()
    with pytest.raises(UserError, match=r"unknown target 'vax'.*x86"):
        load_profile("vax")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[target", "not TOML"),
        (ARM, "'vector' is missing"),
        (ARM + "[vector]\nlanes = 0\nregisters = 16\n", "'lanes' is a positive number or 'detect', not 0"),
        ("cores = -1\n" + ARM + VECTOR, "'cores' is a positive number or 'detect', not -1"),
        ('[target]\nkind = "vax"\n' + VECTOR, "'vax', but code is generated with 'llvm' only"),
        ("target = 3\n" + VECTOR, "'target' is a section, not 3"),
        # LLVM crashes on this one, and takes a generic processor for the next
        (
            '[target]\nkind = "llvm"\nmtriple = "vax-linux-gnu"\n' + VECTOR,
            "'vax-linux-gnu', which LLVM has no code for",
        ),
        (ARM + 'mcpu = "cortex-a7 2"\n' + VECTOR, "'cortex-a7 2', which is no processor of aarch64-linux-gnu"),
        (ARM + 'mcpu = "znver5"\n' + VECTOR, "'znver5', which is no processor of aarch64-linux-gnu"),
        (ARM + 'mattr = ["+neno"]\n' + VECTOR, "mattr' has 'neno', which is no feature of aarch64-linux-gnu"),
        (ARM + 'mattr = ["neon"]\n' + VECTOR, "mattr' has 'neon', which does not begin with"),
        (ARM + 'mattr = "+neon"\n' + VECTOR, "'mattr' is a list of texts, not '\\+neon'"),
        (ARM + "num_cores = 4\n" + VECTOR, "num_cores"),
        (ARM + VECTOR + "[link]\ncompiler = 3\n", "'compiler' is text, not 3"),
        (ARM + VECTOR + '[link]\ncc = "g++"\n', "'link.cc' is not known"),
        ('descripton = "x"\n' + ARM + VECTOR, "'descripton' is not known, only cores, description"),
    ],
)
def test_damaged_profile_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_profile(write(tmp_path, text))
    assert "board.toml" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("rpi4.toml is an example")
