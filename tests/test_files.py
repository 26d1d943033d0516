"""Files take the place of others whole, and a process keeps the library that it has mapped."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_lowrank.errors import UserError
from tvm_lowrank.files import copy, replaced, write_text

COPIED_OVER = """
import ctypes, sys
from pathlib import Path
from tvm_lowrank.files import copy

library = ctypes.CDLL(sys.argv[1])
copy(Path(sys.argv[2]), Path(sys.argv[1]))
print(library.answer())
"""


def library(path: Path, answer: int) -> Path:
    """A library that is some pages long, runs code when the process ends, and answers with a number."""
    code = f"""
    static char pages[1 << 20] = {{{answer}}};
    extern "C" int answer() {{ return pages[0]; }}
    struct Ending {{ ~Ending() {{ for (char& c : pages) c = 0; }} }} ending;
    """
    source = path.with_suffix(".cc")
    source.write_text(code if answer else 'extern "C" int answer() { return 0; }')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


def test_a_process_keeps_the_library_that_it_has_mapped(tmp_path: Path) -> None:
    """Written in place, the new file is what the old one's code at exit is read from: the process ends with SIGSEGV."""
    mapped, other = library(tmp_path / "mapped.so", 42), library(tmp_path / "other.so", 0)
    command = [sys.executable, "-c", COPIED_OVER, mapped, other]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    assert mapped.read_bytes() == other.read_bytes()


def test_a_copy_has_the_permissions(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("#!/bin/sh\n")
    (tmp_path / "program").chmod(0o755)
    copy(tmp_path / "program", tmp_path / "board" / "program")
    assert stat.S_IMODE((tmp_path / "board" / "program").stat().st_mode) == 0o755
    assert os.listdir(tmp_path / "board") == ["program"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replaced(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*inside: .*; make room or choose another place"):
        copy(tmp_path / "file", tmp_path / "file" / "inside")
