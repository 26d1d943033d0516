from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from tvm_lowrank import console


def test_bars_are_silent_when_not_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.phase("tuning [1] conv")
    with console.progress("outer", 2) as advance:
        assert list(console.track(range(3), "inner")) == [0, 1, 2]
        advance(1, description="half")
    console.warn("images " + "x" * 200)
    console.error("stop")
    assert capsys.readouterr().err.splitlines() == [
        "tuning [1] conv",
        "warning: images " + "x" * 200,
        "error: stop",
    ]


def test_bars_may_be_nested_and_end_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "_plans", [])  # those of other tests would leave no room for the bars
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        console, "messages", Console(file=screen, force_terminal=True, force_interactive=True, width=80)
    )
    for _ in range(2):  # a bar that was left behind would break the second round
        with pytest.raises(KeyboardInterrupt), console.progress("outer [x]", 2) as advance:
            for _item in console.track(iter(range(3)), "inner", total=3):
                advance(description="moved")
            console.phase("line between")
            raise KeyboardInterrupt
    for text in ("outer [x]", "inner", "line between"):
        assert text in screen.getvalue()


def test_plans_are_lines_or_a_table_above_the_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.search_view("searching"):
        console.tried(2.0, 0.25, "kept")
    line = "plan 1: convolutions 2.00x faster, selection drop +0.25 points, kept\n"
    assert capsys.readouterr().err == line
    screen = io.StringIO()
    monkeypatch.setattr(console, "_plans", [])  # those of other tests would leave no room for the bars
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        console, "messages", Console(file=screen, force_terminal=True, force_interactive=True, width=80)
    )
    with pytest.raises(KeyboardInterrupt), console.search_view("searching"):
        for speedup in (2.0, 3.0):
            console.tried(speedup, 0.25, "kept")
        console.phase("fitting")
        raise KeyboardInterrupt
    shown = screen.getvalue()
    assert "plan 1:" not in shown and "searching" in shown
    assert shown.rindex("3.00x") < shown.rindex("2.00x"), "the fastest is first"
    with console.search_view("again"):
        pass
    assert "3.00x" not in screen.getvalue()[len(shown) :], "the next search begins anew"


def test_how_long_it_takes_is_a_line_or_a_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.search_view("searching"):
        console.expect(25 * 60)
    assert re.fullmatch(r"about 25 min left, until \d\d:\d\d\n", capsys.readouterr().err)
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        console, "messages", Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    )
    with console.search_view("searching"), console.progress("inner", 2):
        console.expect(1000)
        time.sleep(1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"searching.*left 0:16:\d\d", shown), "the clock runs"
    assert re.search(r"inner.*left -:--:--", shown), "it moves nothing else"


def test_tables_keep_brackets_and_width(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("sites", ("id", "ms"), [("conv[bold]", 1.5), ("x" * 150, "–")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.strip().startswith("conv[bold]") and line.endswith("1.5") for line in lines)
    assert any("x" * 150 in line for line in lines)


def test_time_inside_another_block_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    seconds: dict[str, float] = {}
    with console.timed(seconds, "outer"), console.timed(seconds, "inner"):
        pass
    with console.timed(seconds, "inner"):
        pass
    assert seconds == {"outer": 7.0, "inner": 8.0}
