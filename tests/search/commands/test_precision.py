"""Number formats from the command line to the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tvm_lowrank
from support.command import Run
from tvm_lowrank import example
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.bundle.verify import verify
from tvm_lowrank.options import CompileOptions, SearchOptions
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.searching.commands.run import search
from tvm_lowrank.targets.profile import load_profile

HALF = [format for format in load_profile("x86").formats if format != "float32"]
SITES = {"conv2": {"method": "spatial", "rank": 32, "format": "bfloat16"}, "conv4": {"method": "channel", "rank": 32}}

needs_half = pytest.mark.skipif(not HALF, reason="this processor computes in float32 only")


@pytest.mark.parametrize("command", ["search", "compile", "inspect", "profile"])
def test_a_format_that_the_target_has_not_is_an_error(run: Run, tmp_path: Path, command: str) -> None:
    out = ["--out", str(tmp_path / "out")] if command in ("search", "compile") else []
    given = [] if command == "profile" else ["tvm_lowrank.example:model"]
    model = [] if command == "search" else [*given, "--input-shape", "1,3,32,32"]
    tracker = ["--rpc-tracker", "localhost:1"]
    done = run(command, *model, *out, "--target", "rpi4", "--precision", "bfloat16", *tracker, cwd=tmp_path)
    assert done.returncode == 2
    assert "does not compute in bfloat16, only in float32; leave --precision out" in " ".join(done.stderr.split())
    done = run(command, *model, *out, "--precision", "int4", cwd=tmp_path)
    assert done.returncode == 2 and "unknown --precision 'int4'" in done.stderr
    assert not (tmp_path / "out").exists()


def asked(folder: Path, **changes: object) -> CompileOptions:
    options = {"out": folder / "out", "model": "tvm_lowrank.example:model", "input_shape": (1, 3, 32, 32), "trials": 1}
    return CompileOptions(cache=folder / "cache", **{**options, **changes})  # type: ignore[arg-type]


@needs_half
def test_a_plan_with_formats_is_built_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "sites": SITES}))
    manifest = apply_plan(asked(tmp_path), tmp_path / "plan.json")
    made = {site["id"]: site for site in manifest["sites"]}
    assert {name: site["format"] for name, site in made.items()} == {
        name: "bfloat16" if name == "conv2" else "float32" for name in made
    }
    # the dense library is the fastest in the plan's formats
    assert made["conv4"]["dense_format"] == "bfloat16"
    assert set(manifest["latency_ms"]) >= {"dense", "compressed", "float32"}
    assert not (tmp_path / "out" / "float32.so").exists()
    assert Plan.read(tmp_path / "out" / "plan.json").formats == {"conv2": "bfloat16"}


@needs_half
def test_compile_takes_the_fastest_formats_or_those_asked_for(tmp_path: Path) -> None:
    x = example.data()["evaluation"][0][:20]
    outputs = {}
    for precision in ("float32", HALF[0]):
        out = tmp_path / precision
        manifest = apply_plan(asked(tmp_path, out=out, precision=precision), {})
        assert {site["format"] for site in manifest["sites"] if site["id"] == "conv2"} == {precision}
        assert ("float32" in manifest["latency_ms"]) == (precision != "float32")
        outputs[precision] = tvm_lowrank.load(out)(x)
    error = np.abs(outputs["float32"] - outputs[HALF[0]]).max() / np.abs(outputs["float32"]).max()
    assert 1e-5 < error < 2e-2


@needs_half
@pytest.mark.slow
def test_a_search_allocates_formats_and_says_what_it_is_compared_with(tmp_path: Path) -> None:
    options = {"methods": ("spatial", "channel"), "trials": 1, "budget": 3.0}
    search(SearchOptions(out=tmp_path / "out", cache=tmp_path / "cache", **options))  # type: ignore[arg-type]
    manifest = read_manifest(tmp_path / "out")
    accuracy, latency = manifest["accuracy"], manifest["latency_ms"]
    assert set(HALF) & {site["format"] for site in manifest["sites"] if site["rank"] is not None}
    assert accuracy["float32"]["drop"] <= 3.0 and latency["float32"]["median"] > 0
    assert {offer["format"] for site in manifest["sites"] for offer in site["offers"]} <= {"float32", *HALF}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "in float32 it takes" in report and f", {HALF[0]}</td>" in report
    # what it says can be repeated
    assert verify(tmp_path / "out").ok
