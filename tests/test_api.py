"""From Python: models, data and labelled batches in memory; and the command line is a thin layer on it."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tvm_lowrank
from support import models
from support.command import Run
from tvm_lowrank import Choice, UserError, api
from tvm_lowrank.cli import app as cli
from tvm_lowrank.methods import METHODS
from tvm_lowrank.options import CompileOptions, DecomposeOptions, Options, SearchOptions, said
from tvm_lowrank.quantities import Budget

SHAPE = (1, 3, 12, 12)
PLAN = {"2": Choice("spatial", 6)}


def network() -> nn.Module:
    front = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return models.randomised(nn.Sequential(*front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))).eval()


@torch.no_grad()
def labelled(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Images with what a network says of them, which thus makes no mistake."""
    images = torch.randn(50, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))
    return images, net(images).argmax(1)


def splits(net: nn.Module) -> dict[str, Any]:
    return {"calibration": labelled(net, 1)[0], "selection": labelled(net, 2), "evaluation": labelled(net, 3)}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    net, cache = network(), tmp_path_factory.mktemp("cache")
    return {"model": net, "input_shape": SHAPE, "trials": 1, "cache": cache, "precision": "float32"}


def same(out: Path, net: nn.Module, *, tolerance: float = 1e-4) -> bool:
    images, _ = labelled(net, 4)
    with torch.no_grad():
        expected = net(images).numpy()
    return bool(np.max(np.abs(tvm_lowrank.load(out)(images.numpy()) - expected)) < tolerance * np.max(np.abs(expected)))


@pytest.mark.slow
def test_compile_builds_the_network_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    net, out = options["model"], tmp_path / "out"
    manifest = tvm_lowrank.compile(**options, data=splits(net), out=str(out))
    assert same(out, net)
    assert (out / "model.so").read_bytes() == (out / "dense.so").read_bytes()
    assert manifest["accuracy"]["compressed"] == manifest["accuracy"]["dense"] == 100
    assert manifest["model"] == "Sequential" and manifest["data"]["source"] == "in memory"


@pytest.mark.slow
def test_decompose_with_a_mapping_or_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    manifest = tvm_lowrank.decompose(**options, plan=PLAN, out=tmp_path / "one")
    assert [site["method"] for site in manifest["sites"]] == ["dense", "spatial", "dense"]
    (tmp_path / "plan.json").write_text(tvm_lowrank.Plan(PLAN).to_json())
    tvm_lowrank.decompose(**options, plan=tmp_path / "plan.json", out=tmp_path / "two")
    images, _ = labelled(options["model"], 4)
    one, two = (tvm_lowrank.load(tmp_path / name)(images.numpy()) for name in ("one", "two"))
    assert np.array_equal(one, two) and not same(tmp_path / "one", options["model"])
    exported = onnxruntime.InferenceSession(tmp_path / "one" / "model.onnx").run(["output"], {"x": images.numpy()})[0]
    with torch.no_grad():
        program = torch.export.load(tmp_path / "one" / "model.pt2").module()(images).numpy()
    for other in (exported, program):
        np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max())
    assert set(manifest["files"]) == {"model.so", "dense.so", "plan.json", "model.pt2", "model.onnx"}
    with pytest.raises(UserError, match=r"plan: the model has no site 'conv9'; it has 0, 2, 6"):
        tvm_lowrank.decompose(**options, plan={"conv9": Choice("spatial", 6)}, out=tmp_path / "three")


@pytest.mark.slow
def test_a_constrained_network_is_compiled(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = tvm_lowrank.constrain(options["model"], PLAN, batch_norm=False).eval()
    tvm_lowrank.compile(**{**options, "model": net}, out=tmp_path)
    assert same(tmp_path, net)


@pytest.mark.slow
def test_search_with_everything_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    net, epochs = options["model"], []

    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        epochs.append(epoch)
        return [labelled(net, seed) for seed in (5, 6)]

    wanted = {"budget": 20.0, "methods": ("channel",), "finetune": batches, "epochs": 1}
    manifest = tvm_lowrank.search(**options, **wanted, data=splits(net), out=tmp_path)
    assert manifest["accuracy"]["drop"] <= 20 and set(epochs) == {1}
    with pytest.raises(UserError, match="in memory"):
        tvm_lowrank.search(**options, finetune=iter([]), data=splits(net), out=tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ([], {}),
        (
            ["--model", "net.py:build", "--input-shape", "1,3,8,8", "--data", "d.npz", "--mean", "0.1,0.2,0.3"],
            {"model": "net.py:build", "input_shape": (1, 3, 8, 8), "data": "d.npz", "mean": (0.1, 0.2, 0.3)},
        ),
        (
            ["--budget", "0.5%", "--time-limit", "10m", "--methods", "spatial, btd", "--confident", "--out", "here"],
            {
                "budget": Budget(0.5, "%"),
                "time_limit": 600,
                "methods": ("spatial", "btd"),
                "confident": True,
                "out": "here",
            },
        ),
        (
            ["--max-latency", "800us", "--target", "arm", "--rpc-key", "pi", "--emulate", "--cache", "c", "--trials=3"],
            {"max_latency": 0.8, "target": "arm", "rpc_key": "pi", "emulate": True, "cache": Path("c"), "trials": 3},
        ),
    ],
)
def test_the_command_line_asks_for_what_python_asks(
    arguments: list[str], keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    seen: list[SearchOptions] = []

    def search(asked: SearchOptions) -> dict[str, Any]:
        seen.append(asked)
        raise UserError("seen; that is enough")

    monkeypatch.setattr("tvm_lowrank.searching.commands.run.search", search)
    with pytest.raises(UserError, match="seen"):
        tvm_lowrank.search(**keywords)
    assert run("search", *arguments, cwd=tmp_path).returncode == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("command", "function", "options"),
    [
        (cli.search, api.search, SearchOptions),
        (cli.decompose, api.decompose, DecomposeOptions),
        (cli.compile_model, api.compile, CompileOptions),
    ],
)
def test_both_have_all_options(command: Any, function: Any, options: type[Options]) -> None:
    there, here = (inspect.signature(f).parameters for f in (command, function))
    named = {field.name: said(field) for field in dataclasses.fields(options)}
    assert set(there) == set(here) == set(named)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in here.values())
    assert all(f"\n{name} : {about.help}" in function.__doc__ for name, about in named.items())
    assert list(here) == list(there)


def test_public_names() -> None:
    assert len(METHODS) > 1  # the packages of search/ and of the methods have been imported, and took no name
    for name in tvm_lowrank.__all__:
        assert callable(getattr(tvm_lowrank, name)), name
        assert getattr(tvm_lowrank, name).__doc__, name
    assert set(tvm_lowrank.__all__) == set(dir(tvm_lowrank))
    with pytest.raises(AttributeError, match="no attribute 'winograd'"):
        _ = tvm_lowrank.winograd  # type: ignore[attr-defined]


def test_a_bundle_is_loaded_without_torch_and_tensorly() -> None:
    code = "import sys, tvm_lowrank; tvm_lowrank.load; sys.exit(bool({'torch', 'tensorly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
