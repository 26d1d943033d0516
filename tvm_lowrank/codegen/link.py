"""From compiled code to a shared library."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tvm.runtime import Executable, Module

from tvm_lowrank.codegen.processor import c_source, needs_of_module
from tvm_lowrank.errors import UserError


def find_compiler(cc: str | None = None) -> str:
    """The C++ compiler that links libraries: ``cc``, or the one that TVM finds.

    Raises
    ------
    UserError
        If there is none.
    """
    from tvm.support.cc import get_cc

    compiler = cc or get_cc()
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        missing = compiler or "g++, clang++ or cc"
        raise UserError(f"no C++ compiler ({missing}) to link the library; install one, e.g. the package g++")
    return str(compiler)


def needs_source(compiled: Executable | Module, folder: Path) -> str:
    """Write the C source of what compiled code needs of a processor, to be linked with it; its path."""
    path = folder / "needs.c"
    module = compiled.mod if isinstance(compiled, Executable) else compiled
    path.write_text(c_source(needs_of_module(module)))
    return str(path)


def export_library(executable: Executable, path: Path, *, cc: str | None = None, options: Sequence[str] = ()) -> None:
    """Link a compiled module to the shared library ``path``; ``cc`` is the C++ compiler of the target.

    The library says what it needs of a processor.

    Raises
    ------
    UserError
        If no compiler is found, or linking or writing fails.
    """
    compiler = find_compiler(cc)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            linked = Path(folder) / path.name
            addons = [needs_source(executable, Path(folder))]
            executable.export_library(str(linked), cc=compiler, options=list(options), addons=addons)
            os.replace(linked, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another --out") from error
    except RuntimeError as error:  # the compiler's output
        lines = str(error).strip().splitlines()
        why = next((line for line in lines if "error" in line.lower() and "Compilation error" not in line), lines[-1])
        raise UserError(f"{compiler} cannot link {path.name}: {why}; check the compiler") from error
