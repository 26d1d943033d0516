"""A bundle with everything that an application needs to run it: one folder, to be copied to a clean device.

model.so, dense.so, plan.json, manifest.json    the bundle, and its folders for other levels
include/tlr.h, tlr.hpp                           the interface for C and C++
lib/libtlr.so                                    its library, which finds TVM's beside itself
lib/libtvm_runtime.so, lib/libtvm_ffi.so         TVM's runtime
SHA256SUMS                                       for `sha256sum --check`
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tvm_lowrank import console
from tvm_lowrank.bundle.library import described
from tvm_lowrank.bundle.manifest import MANIFEST, PORTABLE, prepare_out, read_manifest, sha256
from tvm_lowrank.codegen.processor import arch_of
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.files import copy, write_text

SOURCES = Path(__file__).parent / "runtime"
HEADERS = ("tlr.h", "tlr.hpp")
RUNTIME = ("libtvm_runtime.so", "libtvm_ffi.so")
SUMS = "SHA256SUMS"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall")
# nothing names a symbol of TVM's runtime: it is there for the functions that it registers when it is loaded
LINK = ("-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-ldl", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined")


def package(bundle: Path, out: Path, *, with_runtime: bool, cache_dir: Path, force: bool = False) -> Path:
    """Copy a bundle to ``out``, with the libraries to run it if `with_runtime`.

    Raises
    ------
    UserError
        If the bundle is not whole, `out` cannot be written, or there is no compiler or runtime for its target.
    MeasurementError
        If the compiler fails.
    """
    manifest = read_manifest(bundle)
    present = (name for name in (*manifest["files"], MANIFEST) if (bundle / name).is_file())
    names = [name for name in present if name not in PORTABLE]  # those are for other tools
    for name in names:
        if name.endswith(".so"):
            described(bundle, manifest, name)
    if out.resolve() == bundle.resolve():
        raise UserError("--out is the bundle itself; choose another folder")
    prepare_out(out, force=force)
    try:
        for name in names:
            copy(bundle / name, out / name)
        if with_runtime:
            _add_runtime(out, _arch_of(manifest), cache_dir)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; make room or choose another --out") from error
    own = (out / SUMS, *(path for path in out.rglob("*") if path.name.startswith(".")))
    files = sorted(path for path in out.rglob("*") if path.is_file() and path not in own)
    write_text(out / SUMS, "".join(f"{sha256(path)}  {path.relative_to(out)}\n" for path in files))
    return out


def _arch_of(manifest: dict[str, object]) -> str:
    from tvm_lowrank.targets.toolchain import host_arch

    target = manifest["target"]
    triple = target.get("mtriple") if isinstance(target, dict) else None
    if triple is None:
        return host_arch()
    if "android" in triple:
        raise UserError("the runtime for Android is built with the NDK (see docs/android.md); leave --with-runtime out")
    return arch_of(str(triple))


def _add_runtime(out: Path, arch: str, cache_dir: Path) -> None:
    from tvm_lowrank.targets.toolchain import runtime_folder

    libraries = runtime_folder(arch, cache_dir=cache_dir)
    for folder in ("include", "lib"):
        (out / folder).mkdir(exist_ok=True)
    for name in HEADERS:
        copy(SOURCES / name, out / "include" / name)
    for name in RUNTIME:
        copy(libraries / name, out / "lib" / name)
    console.phase(f"compiling libtlr.so for {arch}")
    compile_library(arch, out / "lib")


def compile_library(arch: str, folder: Path) -> None:
    """Make ``libtlr.so`` in a folder that has TVM's runtime libraries for the architecture."""
    from tvm_lowrank.targets.toolchain import cross_compiler, include_folder, triple_of

    compiler = cross_compiler(triple_of(arch))
    sources = [str(path) for path in sorted(SOURCES.glob("*.cc"))]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".libtlr.so-") as temporary:
        made = Path(temporary) / "libtlr.so"
        command = [compiler, *FLAGS, f"-I{include_folder()}", *sources, "-o", str(made), f"-L{folder}"]
        done = subprocess.run([*command, *LINK], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise MeasurementError(f"{compiler} cannot compile libtlr.so: {lines[0]}")
        os.replace(made, folder / made.name)
