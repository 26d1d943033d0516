"""The compiler that links for Android: the NDK's clang, as bionic's libraries are in nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.toolchain import program_of

COMPILER = "TVM_NDK_CC"  # TVM's own variable: a compiler of the NDK
FOLDERS = ("ANDROID_NDK_HOME", "ANDROID_NDK_ROOT")
CLANG = "toolchains/llvm/prebuilt/*/bin/clang"


def ndk_compiler() -> str:
    """The program that ``TVM_NDK_CC`` names, or clang in the NDK at ``ANDROID_NDK_HOME``.

    The target's triple must be among its options (``--target=aarch64-linux-android24``).

    Raises
    ------
    UserError
        If there is neither.
    """
    chosen = program_of(COMPILER)
    if chosen is not None:
        return chosen
    for variable in FOLDERS:
        folder = os.environ.get(variable)
        if folder:
            for clang in sorted(Path(folder).glob(CLANG)):
                return str(clang)
            raise UserError(f"{variable} is {folder}, which has no {CLANG}; set it to an Android NDK (r25 or later)")
    raise UserError(
        "no compiler for Android; install the Android NDK (https://developer.android.com/ndk/downloads) and set "
        f"{FOLDERS[0]} to its folder, or {COMPILER} to its clang"
    )
