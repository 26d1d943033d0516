"""`report.html`: what a search found and why, in one file that needs no network.

Everything is taken from the bundle's manifest, so that the report can be made again at any time. Colours follow the
reader's light or dark mode; charts are SVG within the page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.data.measure import POINTS, unit_called
from tvm_lowrank.files import write_text
from tvm_lowrank.formats import FLOAT32
from tvm_lowrank.plan import Choice, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "report.html"
INK = "#123456"  # stands for the colour of the text, in either mode
DENSE, CHOSEN, TRIED = "#8a8f98", "#2f81f7", "#d4a72c"  # legible on white and on black
FITS = {
    "decomposed": "decomposed layer by layer",
    "refitted": "fitted layer by layer",
    "reconstructed": "reconstructed",
    "finetuned": "fine-tuned",
}


def write_report(directory: Path) -> Path:
    """Make the report of a bundle from its manifest; returns its path.

    Raises
    ------
    UserError
        If the bundle cannot be read, or the report not written.
    """
    path = directory / REPORT
    write_text(path, render(read_manifest(directory)))
    return path


def render(manifest: Mapping[str, Any]) -> str:
    """The page, as HTML; without ``plans`` in the manifest it has no charts of them."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tvm_lowrank.bundle", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["became"] = became
    sites, plans = manifest["sites"], [plan for plan in manifest.get("plans", ()) if "unscored" not in plan]
    unit = (manifest["accuracy"] or {}).get("unit", POINTS.name)
    charts = {"sites": bars(sites)}
    if plans and manifest["accuracy"] is not None:
        charts |= {"plans": pareto(plans, sites, manifest["budget"], unit=unit), "damage": agreement(plans)}
    return environment.get_template("report.html").render(
        m=manifest,
        unit=unit,
        sign=unit_called(unit).sign,
        charts=charts,
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
        own, dense = site["ms"] or 0.0, site["dense_ms"] or 0.0
        axes.barh(row - 0.18, dense, height=0.34, color=DENSE)
        axes.barh(row + 0.18, own, height=0.34, color=CHOSEN)
        end, beside = (max(own, dense), row), (4, 0)
        axes.annotate(became(site), end, beside, textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(sites)), [_short(site["id"]) for site in sites])
    axes.invert_yaxis()
    axes.margins(x=0.3, y=0.02)
    axes.set_xlabel("ms (grey: dense, blue: chosen)")
    return _svg(figure, "Milliseconds of each layer, dense and chosen")


def pareto(
    plans: Sequence[Mapping[str, Any]],
    sites: Sequence[Mapping[str, Any]],
    budget: float | None,
    *,
    unit: str = POINTS.name,
) -> str:
    """Drop on the selection split, and what is expected of the damage, against the sum of the sites' milliseconds.

    ``sites`` are those of the bundle, whose plan is marked.
    """
    figure, axes = _figure(height=3.2)
    ms, expected, drops = ([plan[name] for plan in plans] for name in ("ms", "expected", "drop"))
    axes.vlines(ms, expected, drops, colors=DENSE, linewidths=0.8)
    axes.scatter(ms, expected, marker="_", color=INK, label="expected")
    for fit, marker in zip(FITS, "o^vs", strict=True):
        own = [plan for plan in plans if plan["fit"] == fit]
        if own:
            axes.scatter([p["ms"] for p in own], [p["drop"] for p in own], marker=marker, color=TRIED, label=FITS[fit])
    # of a plan that was fitted in several ways, the best is what was delivered
    chosen = {site["id"]: choice for site in sites if (choice := Choice.from_json(site)) != Choice()}
    same = [plan for plan in plans if Plan.from_json(json.dumps(plan["plan"])) == Plan(chosen)]
    if same:
        best = min(same, key=lambda plan: plan["drop"])
        axes.scatter(
            [best["ms"]], [best["drop"]], s=160, facecolors="none", edgecolors=CHOSEN, linewidths=2, label="chosen"
        )
    if budget is not None:
        axes.axhline(budget, color=INK, linewidth=0.8, linestyle="--", label="budget")
    axes.set_xlabel("ms, sum of the layers")
    axes.set_ylabel(f"drop, {unit}")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return _svg(figure, "Evaluated plans: drop on the selection images against milliseconds")


def agreement(plans: Sequence[Mapping[str, Any]]) -> str:
    """Predicted against measured damage."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = _figure(height=3.2)
    for fit, marker in zip(FITS, "o^vs", strict=True):
        own = [plan for plan in plans if plan["fit"] == fit and min(plan["predicted"], plan["damage"]) > 0]
        if own:
            predicted, damage = ([plan[name] for plan in own] for name in ("predicted", "damage"))
            axes.scatter(predicted, damage, marker=marker, color=TRIED, label=FITS[fit])
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


def became(site: Mapping[str, Any]) -> str:
    """What a site of the manifest became, or one of its offers, in a few words."""
    rank, format = site["rank"], site.get("format", FLOAT32)
    shape = site["method"] if rank is None else f"{site['method']} {_rank(rank)}"
    return shape if format == FLOAT32 else f"{shape}, {format}"


def _rank(rank: int | Sequence[int]) -> str:
    return str(rank) if isinstance(rank, int) else "×".join(map(str, rank))


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"
