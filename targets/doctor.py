"""Is everything there that a search on a target needs, and does it work? Each step says what to do where it is not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from tvm_lowrank import console
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.targets.probe import OUTPUT, Board, expected, export_libraries, visit
from tvm_lowrank.targets.profile import Profile
from tvm_lowrank.targets.toolchain import release, tvm_versions
from tvm_lowrank.targets.tracker import summary

TOLERANCE = 1e-4  # of the largest value
UNSTABLE = 0.10  # spread of a kernel's times
SERVER = "python -m tvm.exec.rpc_server"


@dataclass(frozen=True)
class Step:
    """One thing that was looked at: what was found, or why it is no good."""

    name: str
    detail: str
    error: UserError | MeasurementError | None = None


@dataclass
class Examination:
    """What is known so far; one method for each step, which returns what it found or raises."""

    profile: Profile
    tracker: tuple[str, int] | None
    key: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def compiler(self) -> str:
        return " ".join([self.profile.linker()[0], *self.profile.linker()[1]])

    def link(self) -> str:
        export_libraries(self.profile, self.folder)
        return f"a convolution for {self.profile.triple}"

    def reach(self) -> str:
        """Is there a tracker?"""
        if self.tracker is None:
            raise UserError(
                f"target {self.profile.name} is another machine: name the tracker of its boards with --rpc-tracker "
                "HOST:PORT (see docs/devices.md), or use emulated boards with --emulate"
            )
        boards = self._summary()["server_info"]
        return f"{self._address}, {len(boards)} board(s)"

    def known(self) -> str:
        """Does it have boards with the key?"""
        keys = [info["key"].removeprefix("server:") for info in self._summary()["server_info"] if "key" in info]
        if self.key not in keys:
            others = f"has only {', '.join(sorted(set(keys)))}" if keys else "has none at all"
            raise MeasurementError(
                f"the tracker {self._address} has no board with key {self.key!r} and {others}; start the RPC server "
                f"on the board ({SERVER} --tracker {self._address} --key {self.key}), or choose a key with --rpc-key"
            )
        return f"{self.key}, {keys.count(self.key)} board(s)"

    def free(self) -> str:
        """Is one of them free?"""
        queue = self._summary()["queue_info"].get(self.key, {})
        if not queue.get("free"):
            raise MeasurementError(
                f"every board with key {self.key!r} is in use, {queue.get('pending', 0)} more client(s) waiting; "
                "end the other session, or start its server again"
            )
        return f"{queue['free']} board(s)"

    def versions(self) -> str:
        """Does the board have this machine's version of TVM?"""
        assert self.tracker is not None
        facts = self.facts = visit(self.folder, Board(*self.tracker, self.key))
        here = tvm_versions()["apache-tvm"]
        if "about" not in facts:
            remedy = "start its server again"
            if "connected" not in facts:
                remedy = f"check that it can be reached from here (docs/devices.md) and that its TVM is {here}, as here"
            raise MeasurementError(f"{facts['doing']}: {facts['error']}; {remedy}")
        about, install = facts["about"], f"install the same on both sides (here: {here})"
        if about is not None and release(about["tvm"]) != release(here):
            raise MeasurementError(
                f"the board {facts['address']} has TVM {about['tvm']}, this machine {here}; {install}"
            )
        if "ffi" in facts and facts["ffi"][0] != facts["ffi"][1]:
            numbers = (".".join(map(str, version)) for version in facts["ffi"])
            text = "this machine has tvm-ffi {}, the board's TVM was built with {}".format(*numbers)
            raise MeasurementError(f"{text}; {install}")
        if about is None:
            told = ".".join(map(str, facts["ffi"][1])) if "ffi" in facts else "an unknown version"
            return f"{here} here; TVM's own server at {facts['address']} tells of tvm-ffi only: {told}, as here"
        return f"{about['tvm']} on both sides; {_describe(about)} at {facts['address']}"

    def round_trip(self) -> str:
        """Is what the device computes right?"""
        if self.profile.is_host:
            self.facts = visit(self.folder, None)
        if "output" not in self.facts:
            raise MeasurementError(f"{self.facts['doing']}: {self.facts['error']}; {self._advice}")
        output, wanted = np.load(self.folder / OUTPUT), expected()
        error = float(np.abs(output - wanted).max() / np.abs(wanted).max())
        if not error <= TOLERANCE:  # nor NaN
            raise MeasurementError(f"the results are wrong by {error:.2g} of the largest value; {self._advice}")
        return f"a convolution, largest error {error:.1g} of the largest value"

    def clock(self) -> str:
        """Do equal runs take equal times?"""
        if "seconds" not in self.facts:
            raise MeasurementError(f"{self.facts['doing']}: {self.facts['error']}; try again")
        low, middle, high = np.percentile(1e3 * np.array(self.facts["seconds"]), (10, 50, 90))
        text = f"{middle:.3g} ms a convolution, spread {high / low - 1:.0%}"
        if self.profile.emulated:
            return f"{text}; emulated: it says nothing about a board"
        if high / low - 1 > UNSTABLE:
            about = self.facts.get("about") or {}
            governor = ", ".join(sorted({name for name in about.get("governor", ()) if name}))
            celsius = about.get("celsius")
            seen = [f"governor {governor}"] if governor else []
            seen += [f"{celsius:.0f} °C"] if celsius else []
            noted = f" ({', '.join(seen)})" if seen else ""
            raise MeasurementError(
                f"{text}{noted}; set the governor to performance, cool the device, end what else runs there"
            )
        return text

    @property
    def _address(self) -> str:
        assert self.tracker is not None
        return "{}:{}".format(*self.tracker)

    @property
    def _advice(self) -> str:
        return f"check that target {self.profile.name} ({self.profile.code}) fits the device"

    def _summary(self) -> dict[str, Any]:
        assert self.tracker is not None
        try:
            return summary(*self.tracker)
        except OSError as error:
            port = self.tracker[1]
            raise MeasurementError(
                f"no RPC tracker answers at {self._address} ({error}); start one "
                f"(python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {port}), or correct --rpc-tracker"
            ) from error


Check = Callable[[Examination], str]
# name, what to do, and the steps that it is no use without
STEPS: tuple[tuple[str, Check, tuple[str, ...]], ...] = (
    ("compiler", Examination.compiler, ()),
    ("link", Examination.link, ("compiler",)),
    ("tracker", Examination.reach, ()),
    ("key", Examination.known, ("tracker",)),
    ("free board", Examination.free, ("key",)),
    ("TVM versions", Examination.versions, ("free board",)),
    ("round trip", Examination.round_trip, ("link", "TVM versions")),
    ("clock", Examination.clock, ("round trip",)),
)
QUICK = ("compiler", "tracker", "key", "free board")
REMOTE = ("tracker", "key", "free board", "TVM versions")


def examine(
    profile: Profile, *, tracker: tuple[str, int] | None = None, key: str | None = None, quick: bool = False
) -> Iterator[Step]:
    """Look at one thing after the other; those that cannot work because of an earlier one are left out.

    Parameters
    ----------
    tracker, key
        Where the boards are registered, and as what (the profile's, if it is not given).
    quick
        Only what takes no time: the compiler, and whether a board is free.
    """
    skipped = REMOTE if profile.is_host else ()
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        examination = Examination(profile, tracker, key or profile.rpc_key, Path(folder))
        for name, check, needed in STEPS:
            if name in skipped or (quick and name not in QUICK):
                continue
            if failed.intersection(needed):
                failed.add(name)
                continue
            try:
                yield Step(name, check(examination))
            except (UserError, MeasurementError) as error:
                failed.add(name)
                yield Step(name, str(error), error)


def doctor(profile: Profile, *, tracker: tuple[str, int] | None = None, key: str | None = None) -> bool:
    """Print what `examine` finds, as it finds it; whether everything is well."""
    well = True
    for step in examine(profile, tracker=tracker, key=key):
        sign, style = ("✓", "green") if step.error is None else ("✗", "bold red")
        console.results.print(Text.assemble((sign, style), f" {step.name}: {step.detail}"), soft_wrap=True)
        well = well and step.error is None
    return well


def _describe(about: dict[str, Any]) -> str:
    return f"{about.get('model') or about['architecture']}, {about['cores']} cores"
