"""The report: what it takes from the manifest, and that the page is whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support.command import Run
from tvm_lowrank.bundle.manifest import write_manifest
from tvm_lowrank.bundle.report import pareto, render, write_report
from tvm_lowrank.plan import Choice, Plan

CHOSEN = Plan({"conv<2>": Choice("tucker2", (16, 32))})
OTHER = Plan({"conv<2>": Choice("cp3", 24), "fc": Choice("svd", 8)})
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


def site(name: str, method: str, rank: Any, ms: float) -> dict[str, Any]:
    return {
        "id": name,
        "method": method,
        "rank": rank,
        "ms": ms,
        "dense_ms": 1.0,
        "macs": int(1e6 * ms),
        "dense_macs": 1_000_000,
        "reason": f"saves {1 - ms:.3f} ms & more",
        "offers": [
            {"method": method, "rank": rank, "ms": ms, "nats": 0.002, "measured": True, "cost": 2 * ms},
            {"method": "svd", "rank": 40, "ms": 0.9, "nats": 0.0012, "measured": False, "cost": 2 * ms + 0.123},
        ],
    }


def manifest(**changes: Any) -> dict[str, Any]:
    quantiles = {"median": 2.0, "p10": 1.9, "p90": 2.2, "predicted": 2.1}
    return {
        "model": "net.py:build",
        "target": {"name": "x86", "kind": "llvm", "mcpu": "znver5"},
        "budget": 1.0,
        "input_shape": [1, 3, 8, 8],
        "data": {"source": "images", "mean": None, "std": None, "evaluation_sha256": "0" * 64},
        "accuracy": {
            "metric": "top1",
            "n": 2000,
            "dense": 93.25,
            "compressed": 92.4,
            "drop": 0.85,
            "ci95": [0.23, 1.47],
            "looks": 1,
            "on_device": 2000,
        },
        "latency_ms": {
            "dense": quantiles,
            "compressed": {**quantiles, "median": 0.5},
            "threads": 1,
            "batch": 1,
            "how": "measured",
        },
        "speedup": 4.0,
        "sites": [site("conv<2>", "tucker2", [16, 32], 0.25), site("fc", "dense", None, 1.0)],
        "seconds": {"tuning kernels": 75.4, "fitting and evaluating plans": 410.0},
        "plans": [
            tried(CHOSEN, "decomposed", 1.25, drop=1.4, predicted=0.012, damage=0.015),
            tried(CHOSEN, "reconstructed", 1.25, drop=0.7, predicted=0.012, damage=0.011),
            tried(OTHER, "finetuned", 0.9, drop=2.0, predicted=0.02, damage=0.03),
        ],
        **changes,
    }


def tried(plan: Plan, fit: str, ms: float, *, drop: float, predicted: float, damage: float) -> dict[str, Any]:
    counted = {"predicted": predicted, "damage": damage, "drop": drop, "error": 0.4, "expected": 1.1 * drop}
    return {"plan": json.loads(plan.to_json()), "fit": fit, "ms": ms, **counted}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "model.so").write_bytes(b"code")
    (tmp_path / "plan.json").write_text(CHOSEN.to_json())
    write_manifest(tmp_path, manifest())
    return tmp_path


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps the text, the SVG, and what is fetched from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_says_what_was_measured_and_needs_no_network(bundle: Path) -> None:
    page = Page(write_report(bundle).read_text())
    text = " ".join(" ".join(page.text).split())
    for wanted in (
        "4.00×",
        "−0.85",
        "93.25 % to 92.40 %",
        "0.23 to 1.47",
        "2000 evaluation images",
        "looked at 1 time.",
        "conv<2>",
        "tucker2 16×32",
        "saves 0.750 ms & more",
        "8 min 05 s",
        "budget was 1 points",
        "svd 40 0.900 ? 0.0012 0.123",
    ):
        assert wanted in text, wanted
    assert not page.links
    assert len(page.ids) == len(set(page.ids)), "an id of one chart is that of another"
    source = (bundle / "report.html").read_text()
    assert source.count("<svg") == 3 and "#123456" not in source and "currentColor" in source
    for part in source.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>")] + "</svg>")


def test_without_data() -> None:
    sites = [{key: value for key, value in site("fc", "dense", None, 1.0).items() if key != "offers"}]
    changes = {"accuracy": None, "data": None, "budget": None, "versions": {"python": "3.11"}, "sites": sites}
    for plans in (manifest()["plans"], []):
        page = render(manifest(**changes, plans=plans))
        assert "accuracy was not measured" in page and page.count("<svg") == 1 and "considered" not in page


def test_a_bundle_whose_manifest_has_no_plans(bundle: Path) -> None:
    """One of `decompose` or `compile`, or of an earlier version."""
    for changes in ({"plans": []}, {}):
        write_manifest(bundle, {**{key: value for key, value in manifest().items() if key != "plans"}, **changes})
        page = write_report(bundle).read_text()
        assert page.count("<svg") == 1 and "0.23 to 1.47" in " ".join(page.split())


def test_a_bundle_alone_tells_everything(bundle: Path, tmp_path: Path) -> None:
    """Neither the search nor what it left behind is needed, which for a frontier is in the folder above."""
    inner = tmp_path / "1"
    inner.mkdir()
    for name in ("model.so", "manifest.json"):
        shutil.copy(bundle / name, inner / name)
    (bundle / "journal.jsonl").write_text("{\n")
    code = """
import sys, pathlib, tvm_lowrank.bundle.report as report
report.write_report(pathlib.Path(sys.argv[1]))
sys.exit(any(name.startswith("tvm_lowrank.searching") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, inner], cwd=inner, check=False)
    assert done.returncode == 0
    assert (inner / "report.html").read_text() == write_report(bundle).read_text()
    assert (inner / "report.html").read_text().count("<svg") == 3


MEASURE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const root = document.documentElement, text = getComputedStyle(document.body);
  document.title = [root.scrollWidth, innerWidth, text.backgroundColor, text.color].join("|");
});
</script></body>"""


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(bundle: Path, tmp_path: Path, width: int, dark: bool) -> None:
    page = tmp_path / "page.html"
    page.write_text(write_report(bundle).read_text().replace("</body>", MEASURE))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *options, *mode, profile, f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    [title] = re.findall(r"<title>(.*?)</title>", done.stdout)
    wide, inner, background, colour = title.split("|")
    assert int(wide) <= int(inner), "the page is wider than its window"
    assert (background, colour) == (
        ("rgb(13, 17, 23)", "rgb(230, 237, 243)") if dark else ("rgb(255, 255, 255)", "rgb(31, 35, 40)")
    )


def test_emulated_times_are_marked() -> None:
    latency = {**manifest()["latency_ms"], "how": "emulated"}
    page = render(manifest(latency_ms=latency, versions={"python": "3.11"}))
    assert "say nothing about a real device" in page


def test_the_best_fit_of_the_chosen_plan_is_marked() -> None:
    plans = [
        tried(CHOSEN, fit, 1.0, drop=drop, predicted=0.01, damage=0.01)
        for fit, drop in (("decomposed", 2.0), ("finetuned", 0.5))
    ]
    svg = pareto(plans, manifest()["sites"], 1.0)
    assert "chosen" in svg and "fine-tuned" in svg and "budget" in svg
    for other in ([], [site("conv<2>", "tucker2", [16, 24], 0.25)]):
        assert "chosen" not in pareto(plans, other, 1.0)


def test_what_was_expected_is_shown() -> None:
    sites, plans = manifest()["sites"], manifest()["plans"]
    unexpected = [{**plan, "expected": plan["drop"]} for plan in plans]
    assert pareto(plans, sites, 1.0) == pareto(manifest()["plans"], sites, 1.0) != pareto(unexpected, sites, 1.0)


def test_the_commands(bundle: Path, run: Run) -> None:
    done = run("report", bundle, cwd=bundle)
    assert done.returncode == 0 and "report.html" in done.stdout
    done = run("compare", bundle, bundle, cwd=bundle)
    assert done.returncode == 0 and "speed-up" in done.stdout and "tucker2 [16, 32], 0.250 ms" in done.stdout
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"fit": "reconstructed"', '"fit": null'))
    done = run("report", bundle, cwd=bundle)
    assert done.returncode == 2 and "manifest.json has no valid 'fit' in plan 2; restore it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
