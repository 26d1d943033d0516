"""Files that are there whole or not at all, whatever happens while they are written.

A file is never written in place: a library that a process has mapped must not change under it, for what it then runs is
neither the old one nor the new one.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tvm_lowrank.errors import UserError


@contextmanager
def replaced(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when the block ends; until then that stays as it is.

    Who has the old file open or mapped keeps it. ``mode`` are the new one's permissions.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another place") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; UserError if that is not possible."""
    with replaced(path) as file:
        file.write(text.encode())


def copy(source: Path, path: Path) -> None:
    """Put a copy of a file, with its permissions, in the place of ``path``; UserError if that is not possible."""
    with source.open("rb") as content, replaced(path, mode=stat.S_IMODE(source.stat().st_mode)) as file:
        shutil.copyfileobj(content, file)
