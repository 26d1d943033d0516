"""Device profiles: what the search has to know about a target, read from a small TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from tvm_lowrank.errors import UserError
from tvm_lowrank.schedule import target_lanes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
EXAMPLE = HERE / "x86.toml"
HOST = "host"
DETECT = "detect"


@dataclass(frozen=True)
class Profile:
    """One target.

    ``target`` is TVM's target dictionary without the number of cores; ``lanes`` is the number of float32 values in a
    vector register and ``registers`` the number of vector registers.
    """

    name: str
    description: str
    target: Mapping[str, Any]
    lanes: int
    registers: int

    @property
    def key(self) -> str:
        """Identifies the generated code in caches: the same for equal processors, another for any other."""
        parts = [
            self.target["kind"],
            self.target.get("mtriple"),
            self.target.get("mcpu"),
            *self.target.get("mattr", ()),
        ]
        return "-".join([self.name, *(str(p) for p in parts if p), f"{self.lanes}x{self.registers}"])

    def tvm_target(self, threads: int = 1) -> tvm.target.Target:
        """TVM's target for code that runs on this many threads."""
        return tvm.target.Target({**self.target, "num-cores": threads})


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
        raise UserError(
            f"target profile {path} is not TOML: {error}; see {HERE / 'x86.toml'} for an example"
        ) from error
    return _profile(path, document)


def _profile(path: Path, document: dict[str, Any]) -> Profile:
    try:
        target = dict(document["target"])
        vector = document["vector"]
        lanes, registers = vector["lanes"], vector["registers"]
        if target.get("mcpu") == HOST:
            target["mcpu"] = tvm.target.codegen.llvm_get_system_cpu()
        made = tvm.target.Target(target)
        if lanes == DETECT:
            lanes = target_lanes(made)
        if registers == DETECT:
            features = tvm.target.codegen.llvm_get_cpu_features(made)
            registers = 32 if "avx512f" in features or "neon" in features else 16
        if not (isinstance(lanes, int) and isinstance(registers, int) and lanes > 0 and registers > 0):
            raise ValueError("'lanes' and 'registers' are positive numbers or 'detect'")
        return Profile(path.stem, str(document.get("description", "")), target, lanes, registers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"target profile {path}: {detail}; {EXAMPLE} is an example") from error
