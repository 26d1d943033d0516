"""What compiled code needs of a processor: written into every library, and checked before any of its code runs.

A library has a constant text, `SYMBOL`, that names each feature beyond those that all processors of its architecture
have, in the words of /proc/cpuinfo, and where a program finds its bits:

    tvm_lowrank needs x86_64 avx2:cpuid.7.0.ebx.5+xcr0.2 fma:cpuid.1.0.ecx.12+xcr0.2

``cpuid`` has a leaf (hexadecimal), a subleaf, a register and a bit; ``xcr0`` says what the system keeps of registers;
``hwcap`` and ``hwcap2`` are what Linux tells each program on ARM. So a loader needs no table: ``needs.h``, which the
C interface of a bundle and the device server have, looks at the bits, and this module at the words.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_lowrank.errors import UserError

SYMBOL = "tvm_lowrank_needs"
MARK = "tvm_lowrank needs"
CPUINFO = Path("/proc/cpuinfo")
YMM, ZMM, TILES = "+xcr0.2", "+xcr0.6", "+xcr0.18"

# LLVM's name of a feature: the system's, and its place. Features that compilers use only when they are asked to
# (ciphers, random numbers, atomics) are left out, and so are those that Linux does not tell of.
FEATURES: dict[str, dict[str, tuple[str, str]]] = {
    "x86_64": {
        "sse3": ("pni", "cpuid.1.0.ecx.0"),
        "ssse3": ("ssse3", "cpuid.1.0.ecx.9"),
        "sse4.1": ("sse4_1", "cpuid.1.0.ecx.19"),
        "sse4.2": ("sse4_2", "cpuid.1.0.ecx.20"),
        "sse4a": ("sse4a", "cpuid.80000001.0.ecx.6"),
        "popcnt": ("popcnt", "cpuid.1.0.ecx.23"),
        "movbe": ("movbe", "cpuid.1.0.ecx.22"),
        "lzcnt": ("abm", "cpuid.80000001.0.ecx.5"),
        "bmi": ("bmi1", "cpuid.7.0.ebx.3"),
        "bmi2": ("bmi2", "cpuid.7.0.ebx.8"),
        "tbm": ("tbm", "cpuid.80000001.0.ecx.21"),
        "gfni": ("gfni", "cpuid.7.0.ecx.8"),
        "avx": ("avx", "cpuid.1.0.ecx.28" + YMM),
        "avx2": ("avx2", "cpuid.7.0.ebx.5" + YMM),
        "fma": ("fma", "cpuid.1.0.ecx.12" + YMM),
        "fma4": ("fma4", "cpuid.80000001.0.ecx.16" + YMM),
        "xop": ("xop", "cpuid.80000001.0.ecx.11" + YMM),
        "f16c": ("f16c", "cpuid.1.0.ecx.29" + YMM),
        "avxvnni": ("avx_vnni", "cpuid.7.1.eax.4" + YMM),
        "avx512f": ("avx512f", "cpuid.7.0.ebx.16" + ZMM),
        "avx512dq": ("avx512dq", "cpuid.7.0.ebx.17" + ZMM),
        "avx512cd": ("avx512cd", "cpuid.7.0.ebx.28" + ZMM),
        "avx512bw": ("avx512bw", "cpuid.7.0.ebx.30" + ZMM),
        "avx512vl": ("avx512vl", "cpuid.7.0.ebx.31" + ZMM),
        "avx512ifma": ("avx512ifma", "cpuid.7.0.ebx.21" + ZMM),
        "avx512vbmi": ("avx512vbmi", "cpuid.7.0.ecx.1" + ZMM),
        "avx512vbmi2": ("avx512_vbmi2", "cpuid.7.0.ecx.6" + ZMM),
        "avx512vnni": ("avx512_vnni", "cpuid.7.0.ecx.11" + ZMM),
        "avx512bitalg": ("avx512_bitalg", "cpuid.7.0.ecx.12" + ZMM),
        "avx512vpopcntdq": ("avx512_vpopcntdq", "cpuid.7.0.ecx.14" + ZMM),
        "avx512bf16": ("avx512_bf16", "cpuid.7.1.eax.5" + ZMM),
        "avx512fp16": ("avx512_fp16", "cpuid.7.0.edx.23" + ZMM),
        "amx-tile": ("amx_tile", "cpuid.7.0.edx.24" + TILES),
        "amx-bf16": ("amx_bf16", "cpuid.7.0.edx.22" + TILES),
        "amx-int8": ("amx_int8", "cpuid.7.0.edx.25" + TILES),
    },
    "aarch64": {
        "fullfp16": ("asimdhp", "hwcap.10"),
        "rdm": ("asimdrdm", "hwcap.12"),
        "complxnum": ("fcma", "hwcap.14"),
        "dotprod": ("asimddp", "hwcap.20"),
        "fp16fml": ("asimdfhm", "hwcap.23"),
        "fptoint": ("frint", "hwcap2.8"),
        "i8mm": ("i8mm", "hwcap2.13"),
        "bf16": ("bf16", "hwcap2.14"),
        "sve": ("sve", "hwcap.22"),
        "sve2": ("sve2", "hwcap2.1"),
        "sve2p1": ("sve2p1", "hwcap2.36"),
        "cssc": ("cssc", "hwcap2.34"),
        "mops": ("mops", "hwcap2.43"),
    },
    "armv7": {
        "neon": ("neon", "hwcap.12"),
        "vfp4": ("vfpv4", "hwcap.16"),
        "hwdiv-arm": ("idiva", "hwcap.17"),
        "hwdiv": ("idivt", "hwcap.18"),
        "d32": ("vfpd32", "hwcap.19"),
        "fullfp16": ("asimdhp", "hwcap.23"),
        "dotprod": ("asimddp", "hwcap.24"),
        "bf16": ("asimdbf16", "hwcap.26"),
        "i8mm": ("i8mm", "hwcap.27"),
        # there is no word for the floating point of version 8, but its processors have this
        "fp-armv8": ("crc32", "hwcap2.4"),
    },
}

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Needs:
    """What code needs: an architecture (x86_64, aarch64, armv7), and features in the words of /proc/cpuinfo."""

    arch: str
    features: tuple[str, ...] = ()


def arch_of(triple: str) -> str:
    """The architecture of a triple."""
    first = triple.split("-")[0]
    return "armv7" if first.startswith("arm") else first


def needs_of_target(target: Any) -> Needs:
    """What the code for a TVM target may need."""
    from tvm.target import codegen

    arch = arch_of(str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple()))
    known = FEATURES.get(arch, {})
    present = set(map(str, codegen.llvm_get_cpu_features(target)))
    return Needs(arch, tuple(word for name, (word, _) in known.items() if name in present))


def needs_of_module(module: Any) -> Needs:
    """What a compiled module needs, by the targets that LLVM compiled it for."""
    from tvm.target import Target

    found: dict[str, None] = {}
    arch, waiting = "", [module]
    while waiting:
        module = waiting.pop()
        waiting.extend(module.imports)
        if module.kind == "llvm":
            needs = needs_of_target(Target(module["_get_target_string"]()))
            arch = needs.arch
            found.update(dict.fromkeys(needs.features))
    return Needs(arch, tuple(found))


def c_source(needs: Needs) -> str:
    """C or C++ that defines the text of a library."""
    places = dict(FEATURES.get(needs.arch, {}).values())
    text = " ".join([MARK, needs.arch, *(f"{word}:{places[word]}" for word in needs.features)])
    return f"""#ifdef __cplusplus
extern "C"
#endif
__attribute__((visibility("default"))) const char {SYMBOL}[] = "{text}";
"""


def read(library: Path) -> Needs | None:
    """What a library says that it needs; None if it says nothing, as older ones. Nothing of it is run.

    Raises
    ------
    UserError
        If the file cannot be read.
    """
    try:
        with library.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.find(f"{MARK} ".encode())
                if start < 0:
                    return None
                text = content[start : content.find(b"\0", start)].decode("ascii", "replace")
    except OSError as error:
        raise UserError(f"cannot read {library}: {error.strerror}; check its permissions") from error
    arch, *features = text.removeprefix(MARK).split()
    return Needs(arch, tuple(feature.split(":")[0] for feature in features))


def check(library: Path) -> None:
    """Make sure that this processor can run a library: the same as `require` for what it says that it needs."""
    needs = read(library)
    if needs is not None:
        require(needs, str(library))


def require(needs: Needs, what: str) -> None:
    """Make sure that this processor can run code, and ask Linux for tiles where the code uses them (AMX).

    Raises
    ------
    UserError
        If it cannot, or tiles are refused; the message begins with ``what``.
    """
    absent = missing(needs)
    if absent:
        raise UserError(
            f"{what} needs a processor with {', '.join(absent)}, which this one does not have; "
            "build it for this processor, or use another"
        )
    if "amx_tile" in needs.features and needs.arch == platform.machine():
        refused = _refused_tiles()
        if refused:
            raise UserError(
                f"{what} needs amx_tile, which Linux refuses this process ({refused}); "
                "use Linux 5.16 or later, without a sandbox that forbids arch_prctl"
            )


def missing(needs: Needs) -> tuple[str, ...]:
    """The features that this processor lacks.

    There are none where the system does not tell, and for another architecture: its libraries cannot be loaded at all.
    """
    present = _present() if needs.arch == arch_of(platform.machine()) else None
    return () if present is None else tuple(word for word in needs.features if word not in present)


def without_missing(target: dict[str, Any]) -> dict[str, Any]:
    """A target for this processor without the features of its model that it does not have, as in some machines' guests.

    Nor has it tiles that Linux refuses this process.

    ``target`` is TVM's dictionary.
    """
    from tvm.target import Target

    needs = needs_of_target(Target(target))
    absent = missing(needs)
    if "amx_tile" in needs.features and not absent and _refused_tiles():
        absent = tuple(word for word in needs.features if word.startswith("amx_"))
    names = [name for name, (word, _) in FEATURES.get(needs.arch, {}).items() if word in absent]
    return {**target, "mattr": [*target.get("mattr", ()), *(f"-{name}" for name in names)]} if names else target


def _present() -> set[str] | None:
    """The words of /proc/cpuinfo; None where it has none."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return None
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return None if line is None else set(line[1].split())


def _refused_tiles() -> str | None:
    """Ask Linux, once for the process, for the registers of AMX; why it refuses, or None."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0:
        return None
    return os.strerror(ctypes.get_errno())
