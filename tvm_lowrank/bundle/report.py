"""`report.html`: what a search found and why, in one file that needs no network.

Everything is taken from the bundle's manifest and from the journal beside it, so that the report can be made again at
any time. Colours follow the reader's light or dark mode; charts are SVG within the page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_lowrank.bundle.bundle import read_manifest
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import write_text
from tvm_lowrank.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "report.html"
JOURNAL = "journal.jsonl"
INK = "#123456"  # stands for the colour of the text, in either mode
DENSE, CHOSEN, TRIED = "#8a8f98", "#2f81f7", "#d4a72c"  # legible on white and on black
FITS = {"refitted": "fitted layer by layer", "reconstructed": "reconstructed", "finetuned": "fine-tuned"}


@dataclass(frozen=True)
class Tried:
    """A plan that was evaluated on the selection split.

    ``ms`` : sum over its sites; ``drop``, ``error`` : points, and their standard error; ``predicted``, ``damage`` :
    nats, before and after evaluating.
    """

    plan: str
    fit: str
    ms: float
    drop: float
    error: float
    predicted: float
    damage: float


def write_report(directory: Path) -> Path:
    """Make the report of a bundle from its manifest and its journal; returns its path.

    Raises
    ------
    UserError
        If the bundle or the journal cannot be read, or the report not written.
    """
    manifest = read_manifest(directory)
    path = directory / REPORT
    write_text(path, render(manifest, tried(_journal(directory)), _read_plan(directory)))
    return path


def _journal(directory: Path) -> Path:
    """The journal of the search that made a bundle, which for one of a frontier is in the folder above."""
    above = directory.resolve().parent / JOURNAL
    if not (directory / JOURNAL).is_file() and above.is_file():
        header = next((entry["value"] for entry in _entries(above) if entry["key"] == "header"), None)
        if isinstance(header, dict) and header.get("frontier"):
            return above
    return directory / JOURNAL


def _read_plan(directory: Path) -> str:
    path = directory / "plan.json"
    return Plan.read(path).to_json() if path.is_file() else Plan().to_json()


def tried(journal: Path) -> list[Tried]:
    """The plans that a journal knows as evaluated; none if there is no journal."""
    if not journal.is_file():
        return []
    placed: dict[str, Mapping[str, Any]] = {}
    found = []
    for entry in _entries(journal):
        if entry["kind"] == "plan":
            placed[entry["value"]["plan"]] = entry["value"]
        elif entry["kind"] == "evaluation":
            key, value = entry["key"], entry["value"]
            plan = next((plan for plan in placed if key.endswith(plan)), None)
            if plan is not None and Plan.from_json(plan):
                fit = key.removesuffix(plan).split(",")[0].strip()
                place = placed[plan]
                counted = {name: value[name] for name in ("drop", "error", "damage")}
                found.append(Tried(plan, fit, place["ms"], predicted=place["predicted"], **counted))
    return found


def _entries(journal: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(journal.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            entry["kind"], entry["key"], entry["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{journal} line {number} is damaged; delete that line") from error
        yield entry


def render(manifest: Mapping[str, Any], plans: Sequence[Tried], chosen: str) -> str:
    """The page, as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tvm_lowrank.bundle", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    sites = manifest["sites"]
    charts = {"sites": bars(sites)}
    if plans and manifest["accuracy"] is not None:
        charts |= {"plans": pareto(plans, chosen, manifest["budget"]), "damage": agreement(plans)}
    return environment.get_template("report.html").render(
        m=manifest,
        charts=charts,
        plans=plans,
        macs=sum(site["macs"] for site in sites) / sum(site["dense_macs"] for site in sites),
        spent=_spent(manifest.get("seconds", {})),
        total=_duration(sum(manifest.get("seconds", {}).values())),
    )


def _spent(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    most = max(seconds.values(), default=1.0)
    return [(name, _duration(value), value / most) for name, value in seconds.items()]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


# charts


def bars(sites: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of each site, dense and chosen, with its method and rank."""
    figure, axes = _figure(height=0.9 + 0.36 * len(sites))
    for row, site in enumerate(sites):
        became = "dense" if site["rank"] is None else f"{site['method']} {_rank(site['rank'])}"
        own, dense = site["ms"] or 0.0, site["dense_ms"] or 0.0
        axes.barh(row - 0.18, dense, height=0.34, color=DENSE)
        axes.barh(row + 0.18, own, height=0.34, color=CHOSEN)
        end, beside = (max(own, dense), row), (4, 0)
        axes.annotate(became, end, beside, textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(sites)), [_short(site["id"]) for site in sites])
    axes.invert_yaxis()
    axes.margins(x=0.3, y=0.02)
    axes.set_xlabel("ms (grey: dense, blue: chosen)")
    return _svg(figure, "Milliseconds of each layer, dense and chosen")


def pareto(plans: Sequence[Tried], chosen: str, budget: float | None) -> str:
    """Drop on the selection split, and what is expected of the damage, against the sum of the sites' milliseconds."""
    figure, axes = _figure(height=3.2)
    ms, expected = [plan.ms for plan in plans], expected_drops(plans)
    axes.vlines(ms, expected, [plan.drop for plan in plans], colors=DENSE, linewidths=0.8)
    axes.scatter(ms, expected, marker="_", color=INK, label="expected")
    for fit, marker in zip(FITS, "ovs", strict=True):
        own = [plan for plan in plans if plan.fit == fit]
        if own:
            axes.scatter([p.ms for p in own], [p.drop for p in own], marker=marker, color=TRIED, label=FITS[fit])
    # of a plan that was fitted in several ways, the best is what was delivered
    best = min((plan for plan in plans if plan.plan == chosen), key=lambda plan: plan.drop, default=None)
    if best is not None:
        axes.scatter([best.ms], [best.drop], s=160, facecolors="none", edgecolors=CHOSEN, linewidths=2, label="chosen")
    if budget is not None:
        axes.axhline(budget, color=INK, linewidth=0.8, linestyle="--", label="budget")
    axes.set_xlabel("ms, sum of the layers")
    axes.set_ylabel("drop, points")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return _svg(figure, "Evaluated plans: drop on the selection images against milliseconds")


def expected_drops(plans: Sequence[Tried]) -> list[float]:
    """Points that each plan loses by its damage and by what damages cost (`tvm_lowrank.searching.choose.drops`)."""
    from tvm_lowrank.searching.choose.drops import Counted, Rate

    rate, counted = Rate(), [Counted(plan.damage, plan.drop, plan.error) for plan in plans]
    for plan, own in zip(plans, counted, strict=True):
        rate.learn(f"{plan.fit} {plan.plan}", own)
    return [rate.expected(own) for own in counted]


def agreement(plans: Sequence[Tried]) -> str:
    """Predicted against measured damage."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = _figure(height=3.2)
    for fit, marker in zip(FITS, "ovs", strict=True):
        own = [plan for plan in plans if plan.fit == fit and min(plan.predicted, plan.damage) > 0]
        if own:
            axes.scatter(
                [p.predicted for p in own], [p.damage for p in own], marker=marker, color=TRIED, label=FITS[fit]
            )
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    low, high = (pick((*axes.get_xlim(), *axes.get_ylim())) for pick in (min, max))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", label="as predicted")
    axes.set_xlabel("predicted damage, nats (before the fit)")
    axes.set_ylabel("measured, after it")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return _svg(figure, "Predicted against measured damage of the evaluated plans")


def _figure(*, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """A figure as SVG that fits its surroundings and has their colour of text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # ids are per figure, and the page has several
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', svg, count=1
    )


def _rank(rank: int | Sequence[int]) -> str:
    return str(rank) if isinstance(rank, int) else "×".join(map(str, rank))


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"
