"""Builds the RPC server that runs on a device (its C++ sources are in ``device/``)."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tvm_lowrank import console
from tvm_lowrank.errors import MeasurementError
from tvm_lowrank.files import copy
from tvm_lowrank.targets.toolchain import (
    cross_compiler,
    include_folder,
    published,
    runtime_folder,
    triple_of,
    tvm_versions,
)

SOURCES = Path(__file__).parent / "device"
SHARED = Path(__file__).parent.parent / "bundle" / "runtime" / "needs.h"  # with the C interface of bundles
PROGRAM = "server"
FLAGS = ("-std=c++17", "-O1")
# the static registration of functions in TVM's libraries is all that is used of them: no symbol asks for them
LINK = ("-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_runtime_extra", "-ltvm_ffi", "-ldl")
# next to the program, whatever the folder is called on the device
LOAD = ("-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined")


def build_server(arch: str, *, cache_dir: Path) -> Path:
    """A folder with the program ``server`` and TVM's runtime libraries, to be copied to a device as it is.

    It is compiled once for every version of the sources, of TVM and of the compiler. The device needs a C library that
    is not older than the compiler's: Debian 12's compilers make programs for Raspberry Pi OS 12 and later.

    Raises
    ------
    UserError
        If there is no compiler or no runtime for the architecture.
    MeasurementError
        If the compiler fails.
    """
    compiler = cross_compiler(triple_of(arch))
    libraries = runtime_folder(arch, cache_dir=cache_dir)
    folder = cache_dir / "device" / f"{arch}-{_digest(compiler)}"
    if not folder.is_dir():
        console.phase(f"compiling the device server for {arch}")
        with published(folder) as made:
            for library in libraries.iterdir():
                copy(library, made / library.name)
            _compile(compiler, made)
    return folder


def _compile(compiler: str, folder: Path) -> None:
    definition = f'-DTVM_VERSION="{tvm_versions()["apache-tvm"]}"'
    sources = [str(path) for path in sorted(SOURCES.glob("*.cc"))]
    include = [f"-I{include_folder()}", f"-I{SHARED.parent}"]
    command = [compiler, *FLAGS, definition, *include, *sources, "-o", str(folder / PROGRAM)]
    done = subprocess.run([*command, f"-L{folder}", *LINK, *LOAD], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise MeasurementError(f"{compiler} cannot compile the device server: {lines[0]}")


def _digest(compiler: str) -> str:
    """Names everything that the program is made of."""
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr([compiler, about, FLAGS, LINK, LOAD, tvm_versions()]).encode())
    for path in (*sorted(SOURCES.iterdir()), SHARED):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
