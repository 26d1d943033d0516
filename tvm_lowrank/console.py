"""What the tool says while it works: progress, tables, warnings. Progress goes to stderr, results to stdout.

Progress bars appear on an interactive terminal only; elsewhere `phase` leaves plain lines and bars are silent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)
_live: Progress | None = None


class Advance(Protocol):
    """Moves a progress bar on by some units of work, and optionally changes its description."""

    def __call__(self, units: float = 1, /, *, description: str | None = None) -> None: ...


def phase(text: str) -> None:
    """Say in one line what is being done now."""
    _say(messages, text)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes to an entry, in seconds."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


def warn(text: str) -> None:
    """Say in one line what the user should know, although the work goes on."""
    _say(messages, "warning: " + text, style="yellow")


def error(text: str) -> None:
    """Say in one line why the work stops."""
    _say(messages, "error: " + text, style="bold red")


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Advance]:
    """A progress bar with the time left; yields the function that advances it.

    Bars may be nested: each has its own line, and goes away when its block ends. ``total`` None means that the amount
    of work is not known.
    """
    global _live
    if not messages.is_interactive:
        yield lambda units=1, /, *, description=None: None
        return
    outermost = _live is None
    bars = _live or Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=messages,
        transient=True,
    )
    if outermost:
        _live = bars
        bars.start()
    task = bars.add_task(description, total=total)

    def advance(units: float = 1, /, *, description: str | None = None) -> None:
        bars.update(task, advance=units, description=description)

    try:
        yield advance
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _live = None


def track(items: Iterable[T], description: str, *, total: float | None = None) -> Iterator[T]:
    """The items, with a progress bar; ``total`` defaults to their number where it is known."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stdout; columns of which every cell starts like a number are right-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    shown = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(columns):
        numeric = all(row[i][:1].isdigit() or row[i][:1] in ("", "-", "+", "–") for row in cells)
        shown.add_column(name, justify="right" if numeric else "left")
    for row in cells:
        shown.add_row(*map(Text, row))  # Text: a site's id may contain what rich would take for markup
    if not results.is_terminal:
        results.width = 400  # a pipe has no width: do not cut columns off
    results.print(shown)


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(Text(text, style=style or ""), soft_wrap=True)
