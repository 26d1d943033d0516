"""Bundles with libraries for several levels of a processor."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import tvm_lowrank
from support.command import Run
from tvm_lowrank import example
from tvm_lowrank.bundle.library import CompiledModel
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.bundle.verify import print_manifest, verify
from tvm_lowrank.codegen.processor import missing
from tvm_lowrank.errors import UserError
from tvm_lowrank.options import CompileOptions, SearchOptions
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.searching.commands.run import search
from tvm_lowrank.targets.profile import load_levels, load_profile
from tvm_lowrank.targets.toolchain import host_arch

pytestmark = pytest.mark.skipif(host_arch() != "x86_64", reason="the levels are those of x86-64")
TARGETS = "x86-64-v2, x86-64-v3,x86-64-v4"
FUTURE = """
[target]
kind = "llvm"
mcpu = "graniterapids-d"

[vector]
lanes = 16
registers = 32
"""
# made without data, a plan that is quickly fitted
OPTIONS = {"model": "tvm_lowrank.example:model", "input_shape": (1, 3, 32, 32), "trials": 1}


def test_the_best_level_that_this_processor_has_comes_first() -> None:
    first, *others = load_levels("x86-64-v2,x86-64-v3")
    assert (first.name, [other.name for other in others]) == ("x86-64-v3", ["x86-64-v2"])
    assert load_levels("x86-64-v2, x86-64-v2") == load_levels("x86-64-v2")
    named = [load_profile(f"x86-64-v{level}") for level in (2, 3, 4)]
    assert [profile.lanes for profile in named] == [4, 8, 16]
    assert [profile.registers for profile in named] == [16, 16, 32]
    assert {profile.formats for profile in named} == {("float32",)}
    with pytest.raises(UserError, match="target rpi4 is a board; give it alone"):
        load_levels("x86-64-v3,rpi4")
    with pytest.raises(UserError, match="unknown target 'v3'"):
        load_levels("x86-64-v2,v3")


@pytest.mark.slow
def test_a_bundle_has_a_library_for_each_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = apply_plan(
        CompileOptions(out=tmp_path / "out", cache=tmp_path / "cache", target=TARGETS, **OPTIONS),  # type: ignore[arg-type]
        {"conv2": Choice("spatial", 16)},
    )
    assert read_manifest(tmp_path / "out") == manifest
    assert [level["target"]["name"] for level in manifest["levels"]] == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    x = example.data()["evaluation"][0][:3]
    outputs = []
    for level in manifest["levels"]:
        assert {f"{level['folder']}/model.so".strip("/"), f"{level['folder']}/dense.so".strip("/")} <= {
            *manifest["files"]
        }
        runs = not missing(load_profile(level["target"]["name"]).needs)
        assert (level["latency_ms"] is not None) == runs
        if runs:
            outputs.append(CompiledModel(tmp_path / "out" / level["folder"] / "model.so", (1, 3, 32, 32))(x))
    for output in outputs:
        np.testing.assert_allclose(output, outputs[0], atol=1e-3)
    assert tvm_lowrank.load(tmp_path / "out").path.parent == tmp_path / "out"
    print_manifest(manifest)
    assert "levels: a loader takes the first that its processor has" in capsys.readouterr().out
    assert "<h2>Processors</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_what_this_machine_cannot_run_is_built_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "future.toml").write_text(FUTURE)
    target = f"x86-64-v3,{tmp_path / 'future.toml'}"
    options = CompileOptions(out=tmp_path / "out", cache=tmp_path / "cache", target=target, **OPTIONS)  # type: ignore[arg-type]
    if not missing(load_profile(str(tmp_path / "future.toml")).needs):
        pytest.skip("this processor has everything")
    best, second = apply_plan(options, {})["levels"]
    assert best["folder"] == "future" and best["latency_ms"] is None
    assert second["folder"] == "" and second["latency_ms"]["dense"]["median"] > 0
    assert "future is not measured: this processor lacks" in " ".join(capfd.readouterr().err.split())
    # and the loader passes it over
    assert tvm_lowrank.load(tmp_path / "out")(example.data()["evaluation"][0][:1]).shape == (1, 10)


@pytest.mark.slow
def test_a_search_for_several_levels(tmp_path: Path, run: Run) -> None:
    options = {"methods": ("spatial", "channel"), "trials": 1, "budget": 3.0, "cache": tmp_path / "cache"}
    search(SearchOptions(out=tmp_path / "out", target="x86-64-v2,x86-64-v3", **options))  # type: ignore[arg-type]
    assert verify(tmp_path / "out").ok
    shutil.rmtree(tmp_path / "out" / "x86-64-v2")
    done = run("bench", tmp_path / "out", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused = run(
        "search", "--target", "x86-64-v2,x86-64-v3", "--precision", "bfloat16", "--out", "other", cwd=tmp_path
    )
    assert refused.returncode == 2 and "does not compute in bfloat16, only in float32" in refused.stderr
