"""Linking for Android, with Debian's clang and lld in the place of the NDK's.

Android's own libraries are replaced by empty ones: what they are called is all that ends up in a library.
"""

import os
import re
import subprocess
from dataclasses import replace

import pytest

from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.android import ndk_compiler
from tvm_lowrank.targets.doctor import examine
from tvm_lowrank.targets.emulate import emulated
from tvm_lowrank.targets.probe import SAMPLE_LIBRARY, export_libraries
from tvm_lowrank.targets.profile import load_profile

pytestmark = pytest.mark.needs("clang", "ld.lld", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
VARIABLES = ("TVM_NDK_CC", "ANDROID_NDK_HOME", "ANDROID_NDK_ROOT")
CLANG = "toolchains/llvm/prebuilt/linux-x86_64/bin/clang"
TARGET = "--target=aarch64-linux-android24"


@pytest.fixture(autouse=True)
def no_ndk(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ndk(tmp_path):
    """A folder in the form of an NDK."""
    clang = tmp_path / "ndk" / CLANG
    clang.parent.mkdir(parents=True)
    for name in ("libm", "libc"):
        command = ["clang", TARGET, "-fuse-ld=lld", "-nostdlib", "-shared", "-xc", os.devnull]
        subprocess.run([*command, f"-Wl,-soname,{name}.so", "-o", clang.parent / f"{name}.so"], check=True)
    clang.write_text(f'#!/bin/sh\nexec clang -fuse-ld=lld -nostdlib -L{clang.parent} "$@" -lc\n')
    clang.chmod(0o755)
    return tmp_path / "ndk"


def readelf(*arguments):
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("variable", VARIABLES)
def test_library_is_one_that_android_loads(variable, ndk, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(ndk / CLANG if variable == "TVM_NDK_CC" else ndk))
    profile = load_profile("android")
    assert profile.linker()[0] == ndk_compiler() == str(ndk / CLANG)
    export_libraries(profile, tmp_path)
    library = tmp_path / SAMPLE_LIBRARY
    header = readelf("-h", library)
    assert re.search(r"Class:\s+ELF64", header) and re.search(r"Machine:\s+AArch64", header)
    assert re.findall(r"NEEDED.*\[(.*)\]", readelf("-d", library)) == ["libm.so", "libc.so"]
    assert "No version information" in readelf("-V", library)
    alignments = re.findall(r"^ +LOAD .* 0x([0-9a-f]+)$", readelf("-l", library), re.MULTILINE)
    assert alignments and all(int(alignment, 16) == 16384 for alignment in alignments)
    undefined = re.findall(r"UND (\S+)$", readelf("--dyn-syms", library), re.MULTILINE)
    # the first is TVM's runtime's, the others are in Android's libc
    assert set(undefined) <= {"TVMFFIErrorSetRaisedFromCStrParts", "memset", "memcpy", "memmove"}


def test_code_for_android_runs_on_an_emulated_board(tmp_path_factory):
    options = (*(o for o in load_profile("android").options if o != "-lm"), "-fuse-ld=lld", "-nostdlib")
    profile = replace(load_profile("android"), compiler="clang", options=options, emulated=True)
    with emulated("aarch64", cache_dir=tmp_path_factory.getbasetemp() / "devices") as board:
        steps = list(examine(profile, tracker=(board.host, board.port), key=board.key))
    assert [step.detail for step in steps if step.error] == []
    assert {"TVM versions", "round trip"} <= {step.name for step in steps}


def test_missing_ndk_is_explained(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"install the Android NDK .* set ANDROID_NDK_HOME .* or TVM_NDK_CC"):
        load_profile("android").linker()
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"ANDROID_NDK_HOME is {tmp_path}, which has no toolchains/llvm"):
        ndk_compiler()
    monkeypatch.setenv("TVM_NDK_CC", "no-such-clang")
    with pytest.raises(UserError, match="TVM_NDK_CC is no-such-clang, which is no program"):
        ndk_compiler()
