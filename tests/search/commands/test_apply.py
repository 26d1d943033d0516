"""`tvm_lowrank decompose`: an explicit plan, without data and with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tvm_lowrank
from tvm_lowrank import example
from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import decompose
from tvm_lowrank.options import CompileOptions
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.transform import replace_sites

pytestmark = pytest.mark.slow

SITES = {
    "conv2": {"method": "tucker2", "rank": [32, 32]},
    "conv4": {"method": "btd", "rank": [64, 64, 2]},
    "conv5": {"method": "dac", "rank": 2},
    "conv6": {"method": "cp3", "rank": 96},
    "conv8": {"method": "dense"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("apply")
    (root / "plan.json").write_text(json.dumps({"schema": 1, "sites": SITES}))
    return root


def asked(folder: Path, **changes: object) -> CompileOptions:
    options = {"out": folder / "out", "model": "tvm_lowrank.example:model", "input_shape": (1, 3, 32, 32), "trials": 1}
    return CompileOptions(cache=folder / "cache", **{**options, **changes})  # type: ignore[arg-type]


def test_without_data_synthetic_images_give_the_norm(folder: Path) -> None:
    manifest = apply_plan(asked(folder), folder / "plan.json")
    assert manifest["accuracy"] is None and manifest["data"] is None and manifest["budget"] is None
    assert {site["id"]: site["method"] for site in manifest["sites"] if site["method"] != "dense"} == {
        name: entry["method"] for name, entry in SITES.items() if entry["method"] != "dense"
    }
    assert all(site["ms"] > 0 for site in manifest["sites"])

    mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    images = example.data()["evaluation"][0][:200]
    expected = predict(TorchBridge(mod), images)
    got = np.concatenate([tvm_lowrank.load(folder / "out")(images[i : i + 1]) for i in range(len(images))])
    agree = np.mean(got.argmax(1) == expected.argmax(1))
    plan = Plan.read(folder / "plan.json")
    weights_only = {
        site.id: decompose(site.weight, site.spec, method=plan[site.id].method, rank=plan[site.id].rank)  # type: ignore[arg-type]
        for site in find_sites(mod)
        if site.id in plan and plan[site.id].rank is not None
    }
    plain = predict(TorchBridge(replace_sites(mod, weights_only)), images)
    assert agree > np.mean(plain.argmax(1) == expected.argmax(1))
    assert divergence(Answers(), expected, got) < 0.7 * divergence(Answers(), expected, plain)


@pytest.mark.parametrize(
    ("sites", "named"),
    [
        ({"conv9": {"method": "channel", "rank": 8}}, "'conv9'"),
        ({"conv2": {"method": "channel", "rank": 65}}, "outside 1..64"),
        ({"conv2": {"method": "winograd", "rank": 1}}, "'winograd'"),
        ({"conv2": {"method": "btd", "rank": [30, 32, 4]}}, "4 blocks"),
        ({"conv2": {"method": "spatial", "rank": [3, 3]}}, "outside"),
        ({"conv2": {"method": "spatial"}}, "malformed"),
    ],
)
def test_impossible_plans_are_named_before_any_work(folder: Path, sites: dict[str, object], named: str) -> None:
    path = folder / "bad.json"
    path.write_text(json.dumps({"schema": 1, "sites": sites}))
    with pytest.raises(UserError) as raised:
        apply_plan(asked(folder, out=folder / "none"), path)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_missing_plan(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot read plan"):
        apply_plan(asked(folder), folder / "absent.json")
