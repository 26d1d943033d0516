"""The journal keeps what was computed, through kills and torn lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvm_lowrank.errors import UserError
from tvm_lowrank.searching.journal import Journal

HEADER = {"model": "abc", "seed": 0}


def test_computes_once_over_restarts(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 41 + len(calls)

    for _ in range(3):
        journal = Journal(tmp_path / "j", HEADER)
        assert journal.once("probe", "conv1", compute) == 42
        journal.close()
    assert len(calls) == 1


def test_torn_last_line_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, HEADER)
    journal.record("probe", "a", 1)
    journal.record("probe", "b", 2)
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.rfind(b"\n", 0, -1) + 1, -1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, HEADER)
        assert journal.dropped and journal.of_kind("probe") == {"a": 1}
        journal.record("probe", "c", 3)
        journal.close()
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["header", "a", "c"]


def test_damaged_line_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, HEADER).close()
    with path.open("a") as file:
        file.write('{"kind": "probe"\n{"kind": "probe", "key": "b", "value": 2}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"line 2 is damaged"):
        Journal(path, HEADER)
    assert path.read_bytes() == before


def test_another_question_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", HEADER).close()
    with pytest.raises(UserError, match="another seed"):
        Journal(tmp_path / "j", {**HEADER, "seed": 1})


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "j", HEADER).close()
    monkeypatch.setattr("tvm_lowrank.searching.journal.FORMAT", 0)
    with pytest.raises(UserError, match="another journal format; choose another --out or use --force"):
        Journal(tmp_path / "j", HEADER)


def test_two_searches_do_not_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    with pytest.raises(UserError, match="in use"):
        Journal(tmp_path / "j", HEADER)
    journal.close()


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write journal"):
        Journal(tmp_path / "missing" / "j", HEADER)
