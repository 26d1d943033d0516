"""What the tool says while it works: progress, tables, warnings. Progress goes to stderr, results to stdout.

Progress bars, and above them the plans that a search has tried, appear on an interactive terminal only; elsewhere
`phase` leaves plain lines and bars are silent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)
_live: Progress | None = None
_plans: list[tuple[float, float, str, str]] = []  # of this search: speed-up, drop, its unit, what was found


class Advance(Protocol):
    """Moves a progress bar on by some units of work, and optionally changes its description."""

    def __call__(self, units: float = 1, /, *, description: str | None = None) -> None: ...


def phase(text: str) -> None:
    """Say in one line what is being done now."""
    _say(messages, text)


def tried(speedup: float, drop: float, verdict: str, *, unit: str = "points") -> None:
    """Say what a plan that was evaluated is worth: how much faster its convolutions are, and its drop."""
    _plans.append((speedup, drop, unit, verdict))
    if _live is None:
        phase(f"plan {len(_plans)}: convolutions {speedup:.2f}x faster, selection drop {drop:+.2f} {unit}, {verdict}")


def expect(seconds: float) -> None:
    """Say how long what `search_view` shows is expected to take from now on; it may be said again."""
    if _live is None:
        end = datetime.now() + timedelta(seconds=seconds)
        phase(f"about {max(1, round(seconds / 60))} min left, until {end:%H:%M}")
        return
    for outermost in _live.tasks[:1]:
        elapsed = outermost.elapsed or 0.0
        if outermost.fields["clock"]:
            _live.update(outermost.id, total=elapsed + seconds, completed=elapsed)


class _Left(TimeRemainingColumn):
    """The time left by the speed so far; of a clock, until its end."""

    def render(self, task: Task) -> Text:
        if not task.fields["clock"] or task.total is None:
            return super().render(task)
        seconds = round(max(0.0, task.total - (task.elapsed or 0.0)))
        return Text(str(timedelta(seconds=seconds)), style="progress.remaining")


class _View(Progress):
    """The plans so far, the fastest first, above the bars; the outermost bar, if its end is expected, is a clock."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for outermost in self.tasks[:1]:
            if outermost.total is not None and outermost.fields["clock"]:
                self.update(outermost.id, completed=min(outermost.elapsed or 0.0, outermost.total))
        if _plans:
            rows = [(f"{speedup:.2f}x", f"{drop:+.2f}", verdict) for speedup, drop, _, verdict in sorted(_plans)[::-1]]
            yield _shown("plans so far", ("convolutions faster", f"selection drop, {_plans[0][2]}", ""), rows)
        yield from super().get_renderables()


@contextmanager
def search_view(description: str) -> Iterator[None]:
    """Show the plans that are `tried` in this block, and how long it has been running, as long as it runs."""
    _plans.clear()
    try:
        with progress(description, clock=True):
            yield
    finally:
        _plans.clear()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes to an entry, in seconds; of a block inside another the time counts once."""
    start, before = time.monotonic(), sum(seconds.values())
    try:
        yield
    finally:
        inside = sum(seconds.values()) - before
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start - inside


def warn(text: str) -> None:
    """Say in one line what the user should know, although the work goes on."""
    _say(messages, "warning: " + text, style="yellow")


def error(text: str) -> None:
    """Say in one line why the work stops."""
    _say(messages, "error: " + text, style="bold red")


@contextmanager
def progress(description: str, total: float | None = None, *, clock: bool = False) -> Iterator[Advance]:
    """A progress bar with the time left; yields the function that advances it.

    Bars may be nested: each has its own line, and goes away when its block ends. ``total`` None means that the amount
    of work is not known. With ``clock`` the time that passes moves it, once there is something to `expect`.
    """
    global _live
    if not messages.is_interactive:
        yield lambda units=1, /, *, description=None: None
        return
    outermost = _live is None
    bars = _live or _View(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _Left(),
        console=messages,
        transient=True,
    )
    if outermost:
        _live = bars
        bars.start()
    task = bars.add_task(description, total=total, clock=clock)

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
    shown = _shown(title, columns, rows)
    if not results.is_terminal:
        results.width = 400  # a pipe has no width: do not cut columns off
    results.print(shown)


def _shown(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    cells = [[str(cell) for cell in row] for row in rows]
    shown = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(columns):
        numeric = all(row[i][:1].isdigit() or row[i][:1] in ("", "-", "+", "–") for row in cells)
        shown.add_column(name, justify="right" if numeric else "left")
    for row in cells:
        shown.add_row(*map(Text, row))  # Text: a site's id may contain what rich would take for markup
    return shown


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(Text(text, style=style or ""), soft_wrap=True)
