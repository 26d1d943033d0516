"""The report: what it takes from manifest and journal, and that the page is whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support.command import Run
from tvm_lowrank.bundle.bundle import write_manifest
from tvm_lowrank.bundle.report import Tried, pareto, render, tried, write_report
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
        **changes,
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "model.so").write_bytes(b"code")
    (tmp_path / "plan.json").write_text(CHOSEN.to_json())
    write_manifest(tmp_path, manifest())
    entries = [
        ("run", "header", {"model": "x"}),
        ("plan", "0.01", {"plan": CHOSEN.to_json(), "predicted": 0.012, "ms": 1.25}),
        ("plan", "0.02", {"plan": OTHER.to_json(), "predicted": 0.02, "ms": 0.9}),
        ("evaluation", f"refitted {CHOSEN.to_json()}", {"drop": 1.4, "error": 0.4, "damage": 0.015}),
        ("evaluation", f"reconstructed {CHOSEN.to_json()}", {"drop": 0.7, "error": 0.4, "damage": 0.011}),
        (
            "evaluation",
            f"finetuned, /a b/{{net}}.py:batches, 2 epochs, {OTHER.to_json()}",
            {"drop": 2.0, "error": 0.4, "damage": 0.03},
        ),
    ]
    lines = [json.dumps({"kind": kind, "key": key, "value": value}) for kind, key, value in entries]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_plans_of_a_journal(bundle: Path) -> None:
    assert tried(bundle / "journal.jsonl") == [
        Tried(CHOSEN.to_json(), "refitted", 1.25, 1.4, 0.4, 0.012, 0.015),
        Tried(CHOSEN.to_json(), "reconstructed", 1.25, 0.7, 0.4, 0.012, 0.011),
        Tried(OTHER.to_json(), "finetuned", 0.9, 2.0, 0.4, 0.02, 0.03),
    ]
    assert tried(bundle / "none.jsonl") == []


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


def test_without_data_and_without_a_journal() -> None:
    sites = [{key: value for key, value in site("fc", "dense", None, 1.0).items() if key != "offers"}]
    changes = {"accuracy": None, "data": None, "budget": None, "versions": {"python": "3.11"}, "sites": sites}
    page = render(manifest(**changes), [], Plan().to_json())
    assert "accuracy was not measured" in page and page.count("<svg") == 1 and "considered" not in page


def test_a_bundle_of_a_frontier_has_the_journal_above(bundle: Path) -> None:
    inner = bundle / "1"
    inner.mkdir()
    for name in ("model.so", "plan.json", "manifest.json"):
        shutil.copy(bundle / name, inner / name)
    assert write_report(inner).read_text().count("<svg") == 1, "the journal above is that of another search"
    text = (bundle / "journal.jsonl").read_text()
    (bundle / "journal.jsonl").write_text(text.replace('{"model": "x"}', '{"model": "x", "frontier": true}'))
    assert write_report(inner).read_text().count("<svg") == 3


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
    page = render(manifest(latency_ms=latency, versions={"python": "3.11"}), [], CHOSEN.to_json())
    assert "say nothing about a real device" in page


def test_the_best_fit_of_the_chosen_plan_is_marked() -> None:
    plans = [
        Tried(CHOSEN.to_json(), fit, 1.0, drop, 0.4, 0.01, 0.01)
        for fit, drop in (("refitted", 2.0), ("finetuned", 0.5))
    ]
    svg = pareto(plans, CHOSEN.to_json(), 1.0)
    assert "chosen" in svg and "fine-tuned" in svg and "budget" in svg


def test_the_commands(bundle: Path, run: Run) -> None:
    done = run("report", bundle, cwd=bundle)
    assert done.returncode == 0 and "report.html" in done.stdout
    done = run("compare", bundle, bundle, cwd=bundle)
    assert done.returncode == 0 and "speed-up" in done.stdout and "tucker2 [16, 32], 0.250 ms" in done.stdout
    (bundle / "journal.jsonl").write_text("{\n")
    done = run("report", bundle, cwd=bundle)
    assert done.returncode == 2 and "line 1 is damaged; delete that line" in done.stderr
