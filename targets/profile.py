"""Device profiles: what the search has to know about a target, read from a small TOML file."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

from tvm_lowrank.codegen.processor import Needs, arch_of, missing, needs_of_target, without_missing
from tvm_lowrank.codegen.schedule import target_lanes
from tvm_lowrank.codegen.units import formats_of
from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.android import ndk_compiler
from tvm_lowrank.targets.toolchain import TRIPLES, cross_compiler, host_arch

HERE = Path(__file__).parent
EXAMPLE = HERE / "rpi4.toml"
HOST = "host"
DETECT = "detect"
NDK = "ndk"
SECTIONS = ("target", "vector", "link", "rpc")
# everything that a profile may say, so that a misspelt name is noticed; the target's names are checked by TVM
NAMES = {
    "description",
    "cores",
    "target",
    "vector.lanes",
    "vector.registers",
    "link.compiler",
    "link.options",
    "rpc.key",
}


@dataclass(frozen=True)
class Profile:
    """One target.

    Attributes
    ----------
    target
        TVM's target dictionary without the number of cores.
    lanes, registers
        The number of float32 values in a vector register, and the number of vector registers.
    cores
        The number of cores of the device.
    compiler
        The program that links for the device: "ndk" stands for the Android NDK's, nothing for the distribution's.
    options
        What it is told beyond ``-shared -fPIC``.
    rpc_key
        What the boards are registered as at the RPC tracker; nothing for this machine.
    emulated
        Whether the code is to run on an emulator, whose times must not be mixed with those of a board.
    """

    name: str
    description: str
    target: Mapping[str, Any]
    lanes: int
    registers: int
    cores: int = 1
    compiler: str = ""
    options: tuple[str, ...] = ()
    rpc_key: str = ""
    emulated: bool = False

    @property
    def key(self) -> str:
        """Identifies the generated code in caches: the same for equal processors, another for any other."""
        parts = [
            self.target["kind"],
            self.target.get("mtriple"),
            self.target.get("mcpu"),
            *self.target.get("mattr", ()),
            f"{self.lanes}x{self.registers}",
            "emulated" if self.emulated else None,
        ]
        return "-".join([self.name, *(str(p) for p in parts if p)])

    @property
    def is_host(self) -> bool:
        """Whether the target is this machine."""
        return not self.rpc_key

    @property
    def triple(self) -> str:
        """The target's triple; this machine's where the profile names none."""
        return str(self.target.get("mtriple") or TRIPLES.get(host_arch(), f"{host_arch()}-linux-gnu"))

    @property
    def arch(self) -> str:
        """The architecture, in the words of `tvm_lowrank.targets.toolchain`."""
        return arch_of(self.triple)

    @property
    def code(self) -> str:
        """What the code is for, in a few words: the triple, the processor and its features."""
        return " ".join(filter(None, [self.triple, self.target.get("mcpu"), *self.target.get("mattr", ())]))

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats that the processor computes in fast, by name; float32 first."""
        return tuple(format.name for format in formats_of(self.tvm_target()))

    def tvm_target(self, threads: int = 1) -> tvm.target.Target:
        """TVM's target for code that runs on this many threads."""
        return tvm.target.Target({**self.target, "num-cores": threads})

    @property
    def needs(self) -> Needs:
        """What code for the target may need of a processor."""
        return needs_of_target(self.tvm_target())

    def linker(self) -> tuple[str, tuple[str, ...]]:
        """The compiler that links libraries for the device, and its options.

        Raises
        ------
        UserError
            If it is missing; the message says how to get it.
        """
        if self.compiler == NDK:
            return ndk_compiler(), self.options
        if not self.compiler:
            return cross_compiler(self.triple), self.options
        found = shutil.which(self.compiler)
        if found is None:
            raise UserError(f"no compiler {self.compiler} (target {self.name}); install it, or name another in [link]")
        return found, self.options


def known_profiles() -> list[str]:
    """Names of the bundled profiles."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Load a bundled profile by its name, or any profile by the path of its TOML file.

    Raises
    ------
    UserError
        If there is no such profile, or the file is not one.
    """
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        known = ", ".join(known_profiles())
        raise UserError(f"unknown target {name!r}; use one of {known}, or the path of a profile (.toml)") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserError(f"target profile {path} is not TOML: {error}; {EXAMPLE} is an example") from error
    try:
        return _profile(path.stem, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"target profile {path}: {detail}; {EXAMPLE} is an example") from error


def load_levels(names: str) -> tuple[Profile, ...]:
    """Profiles by their names, with commas between them: levels of this machine's architecture.

    The first is that on which a search is to measure, the best that this processor has; the others follow, the best
    first.

    Raises
    ------
    UserError
        If there is no such profile, or one of several is not for this machine.
    """
    named = [load_profile(name) for name in dict.fromkeys(name.strip() for name in names.split(","))]
    if len(named) == 1:
        return (named[0],)
    for profile in named:
        if not profile.is_host:
            raise UserError(f"target {profile.name} is a board; give it alone, not in {names!r}")
    levels = sorted(named, key=lambda profile: len(profile.needs.features), reverse=True)
    first = next((profile for profile in levels if not missing(profile.needs)), levels[-1])
    return (first, *(profile for profile in levels if profile is not first))


def _profile(name: str, document: dict[str, Any]) -> Profile:
    _check_names(document)
    target, vector, link = dict(document["target"]), document["vector"], document.get("link", {})
    detected = target.get("mcpu") == HOST and not os.environ.get("TVM_LOWRANK_HOST_CPU")
    if target.get("mcpu") == HOST:
        target["mcpu"] = os.environ.get("TVM_LOWRANK_HOST_CPU") or codegen.llvm_get_system_cpu()
    _check_code(target)
    if detected:
        target = without_missing(target)
    made = tvm.target.Target(target)
    lanes, registers, cores = vector["lanes"], vector["registers"], document.get("cores", 1)
    if lanes == DETECT:
        lanes = target_lanes(made)
    if registers == DETECT:
        # NEON has 32 registers, but on 32-bit ARM only half as many
        wide = arch_of(target.get("mtriple", codegen.llvm_get_system_triple())) == "aarch64"
        registers = 32 if wide or "avx512f" in codegen.llvm_get_cpu_features(made) else 16
    if cores == DETECT:
        cores = os.cpu_count() or 1
    for value, what in ((lanes, "lanes"), (registers, "registers"), (cores, "cores")):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what!r} is a positive number or 'detect', not {value!r}")
    return Profile(
        name,
        str(document.get("description", "")),
        target,
        lanes,
        registers,
        cores,
        compiler=_text(link, "compiler"),
        options=tuple(_texts(link, "options")),
        rpc_key=_text(document.get("rpc", {}), "key"),
    )


def _check_names(document: dict[str, Any]) -> None:
    for section, content in document.items():
        if section in SECTIONS and not isinstance(content, dict):
            raise TypeError(f"{section!r} is a section, not {content!r}")
        flat = section == "target" or not isinstance(content, dict)
        unknown = {section} - NAMES if flat else {f"{section}.{name}" for name in content} - NAMES
        if unknown:
            raise ValueError(f"{min(unknown)!r} is not known, only {', '.join(sorted(NAMES))}")


def _check_code(target: dict[str, Any]) -> None:
    """Check what LLVM would ignore with a message on standard error, or crash on."""
    if target.get("kind") != "llvm":
        raise ValueError(f"'target.kind' is {target.get('kind')!r}, but code is generated with 'llvm' only")
    triple = _text(target, "mtriple") or codegen.llvm_get_system_triple()
    arch = arch_of(triple).replace("armv7", "arm")
    if arch not in map(str, codegen.llvm_get_targets()):
        raise ValueError(f"'target.mtriple' is {triple!r}, which LLVM has no code for")
    cpu = _text(target, "mcpu")
    if cpu and not codegen.llvm_is_valid_cpu(cpu, triple):
        raise ValueError(f"'target.mcpu' is {cpu!r}, which is no processor of {triple}")
    for feature in _texts(target, "mattr"):
        if feature[:1] not in ("+", "-"):
            raise ValueError(f"'target.mattr' has {feature!r}, which does not begin with + or -")
        one = tvm.target.Target({**target, "mattr": [f"+{feature[1:]}"]})
        if feature[1:] not in codegen.llvm_get_cpu_features(one):
            raise ValueError(f"'target.mattr' has {feature[1:]!r}, which is no feature of {triple}")


def _text(section: dict[str, Any], name: str) -> str:
    value = section.get(name, "")
    if not isinstance(value, str):
        raise TypeError(f"{name!r} is text, not {value!r}")
    return value


def _texts(section: dict[str, Any], name: str) -> list[str]:
    value = section.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name!r} is a list of texts, not {value!r}")
    return value
