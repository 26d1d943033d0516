"""Compilers for other architectures, and TVM's runtime libraries that run there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tvm_lowrank import console
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import copy

TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "armv7": "arm-linux-gnueabihf"}
WHEELS = ("x86_64", "aarch64")  # what apache-tvm is published for
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_ffi.so")


def cache_folder(given: str | Path | None = None) -> Path:
    """Where measurements are kept: the given folder, else ``TVM_LOWRANK_CACHE``, else the user's cache folder."""
    chosen = given or os.environ.get("TVM_LOWRANK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "tvm_lowrank"


def host_arch() -> str:
    """The architecture of this machine, in the words of this module."""
    return platform.machine()


def tvm_versions() -> dict[str, str]:
    """The installed versions of TVM's packages, which a device must have, too."""
    return {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")}


def release(version: str) -> list[str]:
    """The numbers of a version without what says how the package was made: 0.27.0 of 0.27.0.post1."""
    return version.split(".")[:3]


def triple_of(arch: str) -> str:
    """The GNU triple of an architecture; UserError if the tool does not know it."""
    if arch not in TRIPLES:
        raise UserError(f"unknown architecture {arch!r}; use one of {', '.join(TRIPLES)}")
    return TRIPLES[arch]


def program_of(variable: str) -> str | None:
    """The path of the program that an environment variable names; None if it is not set.

    Raises
    ------
    UserError
        If there is no such program.
    """
    chosen = os.environ.get(variable)
    if not chosen:
        return None
    found = shutil.which(chosen)
    if found is None:
        raise UserError(f"{variable} is {chosen}, which is no program; correct it or unset it")
    return found


def cross_compiler(triple: str) -> str:
    """The C++ compiler that makes code for a triple: ``CXX_<triple with underscores>``, or the one of the distribution.

    Raises
    ------
    UserError
        If there is none; the message names the package to install.
    """
    variable = "CXX_" + triple.replace("-", "_")
    chosen = program_of(variable)
    if chosen is not None:
        return chosen
    native = triple == TRIPLES.get(host_arch())
    for name in (f"{triple}-g++", *(("g++", "clang++", "c++") if native else ())):
        found = shutil.which(name)
        if found is not None:
            return found
    package = "g++" if native else f"g++-{triple.replace('_', '-')}"
    raise UserError(f"no C++ compiler for {triple}; install one (Debian: apt install {package}) or set {variable}")


def include_folder() -> Path:
    """The headers of tvm-ffi, the only ones that programs on a device need."""
    from tvm_ffi import libinfo

    return Path(libinfo.find_include_path())


def runtime_folder(arch: str, *, cache_dir: Path) -> Path:
    """A folder with TVM's runtime libraries for an architecture, of exactly the installed versions.

    They come from the installed packages where this is the host's architecture; for another one its packages are
    downloaded once, by pip.

    Raises
    ------
    UserError
        If there are no packages for the architecture, or they cannot be downloaded.
    """
    triple_of(arch)
    if arch != host_arch() and arch not in WHEELS:
        raise UserError(
            f"apache-tvm has no packages for {arch}, only for {' and '.join(WHEELS)}; use a 64-bit system on the device"
        )
    folder = cache_dir / "runtime" / "-".join([arch, *tvm_versions().values()])
    if not folder.is_dir():
        with published(folder) as made:
            if arch == host_arch():
                _copy_installed(made)
            else:
                _download(arch, made)
    return folder


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """An empty folder to be filled, which gets its name when the block succeeds: nobody ever sees half of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder.parent}: {error.strerror}; choose another cache folder") from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same contents
                raise


def _copy_installed(folder: Path) -> None:
    import tvm
    import tvm_ffi

    for package in (tvm, tvm_ffi):
        for library in Path(package.__file__).parent.glob("lib/*.so"):
            if library.name in LIBRARIES:
                copy(library, folder / library.name)


def _download(arch: str, folder: Path) -> None:
    console.phase(f"fetching TVM's runtime libraries for {arch} (100 MB, once)")
    wanted = [f"{name}=={number}" for name, number in tvm_versions().items()]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", f"manylinux_2_28_{arch}", "--python-version", python, "--dest", wheels, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise UserError(
                f"cannot download {' and '.join(wanted)} for {arch}: {reason}; "
                "connect to a package index, or put the packages in a folder and name it in PIP_FIND_LINKS"
            )
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    name = Path(member).name
                    if name in LIBRARIES:
                        (folder / name).write_bytes(archive.read(member))
