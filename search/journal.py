"""The append-only log of a search: one JSON object a line, written and synced before its result is used."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tvm_lowrank.errors import UserError

T = TypeVar("T")
JOURNAL = "journal.jsonl"  # its name in the folder of a search
FORMAT = 4  # raised when the values of a kind get another form


class Journal:
    """Results of expensive calls, by kind and key; a search that died finds them again.

    Every line is ``{"kind": …, "key": …, "value": …}``. A torn last line (the process was killed while writing) is
    dropped; `dropped` says so. Entries that belong to another question, or that another version wrote in another form,
    are kept apart by the run's `header`.

    Raises
    ------
    UserError
        If the file is in use by another process, was written for another header, has a line that is not JSON, or
        cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.dropped = False
        self._values: dict[tuple[str, str], Any] = {}
        self._file = _locked(path)
        header = json.loads(json.dumps({**header, "journal format": FORMAT}))
        entries = list(self._read())
        if not entries:
            self._append({"kind": "run", "key": "header", "value": header})
        elif entries[0].get("kind") != "run" or entries[0]["value"] != header:
            stored = entries[0].get("value") if entries[0].get("kind") == "run" else {}
            differing = sorted(k for k in header if not isinstance(stored, dict) or stored.get(k) != header[k])
            raise UserError(
                f"{path} belongs to a search with another {', '.join(differing)}; choose another --out or use --force"
            )
        for entry in entries[1:]:
            self._values[entry["kind"], entry["key"]] = entry["value"]

    def _read(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            self.dropped = True
            self._file.truncate(complete)
        for number, line in enumerate(content[:complete].splitlines(), 1):
            try:
                entry = json.loads(line)
                entry["kind"], entry["key"], entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} line {number} is damaged; delete that line and use --resume again"
                ) from error
            yield entry

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command with --resume"
            ) from error

    def once(self, kind: str, key: str, compute: Callable[[], T]) -> T:
        """The stored value of (kind, key), or else that of `compute`, stored before it is returned.

        Raises
        ------
        UserError
            If it cannot be written; the journal is as it was before, and can be resumed.
        """
        if (kind, key) not in self._values:
            value = compute()
            self._append({"kind": kind, "key": key, "value": value})
            self._values[kind, key] = value
        return self._values[kind, key]

    def record(self, kind: str, key: str, value: Any) -> None:
        """Store a value, replacing what this kind and key had; UserError if it cannot be written."""
        self._append({"kind": kind, "key": key, "value": value})
        self._values[kind, key] = value

    def get(self, kind: str, key: str) -> Any:
        """The stored value, or None."""
        return self._values.get((kind, key))

    def of_kind(self, kind: str) -> dict[str, Any]:
        """All values of a kind by key, in the order of their first writing."""
        return {key: value for (stored, key), value in self._values.items() if stored == kind}

    def close(self) -> None:
        self._file.close()


def check_unused(path: Path) -> None:
    """Raise UserError if a search that is running has this journal, which need not exist."""
    if path.is_file():
        _locked(path).close()


def _locked(path: Path) -> io.FileIO:
    # without a buffer: what could not be written must not be tried again when the file is closed
    try:
        file = io.FileIO(path, "a+")
    except OSError as error:
        raise UserError(f"cannot write journal {path}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"{path} is in use by another search; wait for it or choose another --out") from error
    return file
