"""A search for emulated ARM boards behind a tracker, one of which dies in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tvm_lowrank
from support import models
from tvm_lowrank.options import CompileOptions, ConnectionOptions
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.searching.measure.device import open_device
from tvm_lowrank.targets.emulate import Boards, emulated
from tvm_lowrank.targets.profile import load_profile

pytestmark = pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static")
SIZE, IMAGES = 12, 200


def network() -> nn.Module:
    front = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    back = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return models.randomised(nn.Sequential(*front, *back))


def images(seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(IMAGES, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=SIZE, mode="bilinear").numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a .pt2, and images with its own answers as labels."""
    root, model = tmp_path_factory.mktemp("emulated"), network()
    example = torch.zeros(2, 3, SIZE, SIZE)
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=(batch,)), root / "model.pt2")
    arrays = {"calibration_x": images(0)}
    for seed, split in enumerate(("selection", "evaluation"), start=1):
        x = images(seed)
        with torch.no_grad():
            arrays |= {f"{split}_x": x, f"{split}_y": model(torch.from_numpy(x)).argmax(1).numpy()}
    np.savez(root / "data.npz", **arrays)
    return root


@pytest.fixture(scope="module")
def boards(folder: Path) -> Iterator[Boards]:
    with emulated("aarch64", boards=2, cache_dir=folder / "cache") as running:
        yield running


@pytest.fixture(scope="module")
def bundle(folder: Path, boards: Boards) -> Path:
    """A search of which the first board is killed when some kernels are measured."""
    address = ("--rpc-tracker", f"{boards.host}:{boards.port}", "--rpc-key", boards.key, "--emulate")
    command = [sys.executable, "-m", "tvm_lowrank.cli", "search", "--target", "arm", *address, "--budget", "40%"]
    inputs = ["--model", folder / "model.pt2", "--data", folder / "data.npz", "--methods", "spatial", "--trials", "2"]
    outputs = ["--out", folder / "out", "--cache", folder / "cache"]
    # in a checkout, Python would import the folder instead of the installed package
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *map(str, [*inputs, *outputs])], stdout=log, stderr=subprocess.STDOUT, cwd=sys.prefix
        )
    deadline = time.monotonic() + 300
    while sum(len(path.read_text().splitlines()) for path in (folder / "cache").rglob("kernels.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    os.kill(boards.pids[0], signal.SIGKILL)
    assert process.wait(timeout=400) == 0, (folder / "log").read_text()
    return folder / "out"


def test_search_survives_and_marks_its_times(bundle: Path, folder: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["latency_ms"]["how"] == "emulated" and manifest["target"]["name"] == "arm"
    assert any(site["method"] == "spatial" for site in manifest["sites"])
    assert manifest["accuracy"]["n"] == manifest["accuracy"]["on_device"] == IMAGES
    assert manifest["accuracy"]["drop"] <= 40
    caches = [path.parent.name for path in (folder / "cache").rglob("kernels.jsonl")]
    assert caches and all("emulated" in name for name in caches)
    texts = [path.read_text() for path in (folder / "cache").rglob("kernels.jsonl")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)


def test_device_computes_what_this_machine_computes(
    bundle: Path, folder: Path, boards: Boards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan, built for this machine: outputs to 1e-4, and the same top-1 on 200 images."""
    here = folder / "here"
    apply_plan(
        CompileOptions(
            out=here,
            model=str(folder / "model.pt2"),
            data=str(folder / "data.npz"),
            trials=1,
            cache=folder / "cache-here",
        ),
        bundle / "plan.json",
    )
    connection = ConnectionOptions(rpc_tracker=f"{boards.host}:{boards.port}", rpc_key=boards.key, emulate=True)
    x = images(2)
    monkeypatch.chdir(bundle)  # the processes that talk to the boards run elsewhere
    with open_device(load_profile("arm"), connection, threads=1, cache_dir=folder / "cache") as device:
        for name in ("model", "dense"):
            there = device.model(Path(f"{name}.so"), (1, 3, SIZE, SIZE))(x)
            expected = tvm_lowrank.load(here, which=name)(x)  # type: ignore[arg-type]
            np.testing.assert_allclose(there, expected, atol=1e-4 * np.abs(expected).max())
            np.testing.assert_array_equal(there.argmax(1), expected.argmax(1))


def test_verify_and_bench_on_the_device(bundle: Path, folder: Path, boards: Boards) -> None:
    address = ["--rpc-tracker", f"{boards.host}:{boards.port}", "--rpc-key", boards.key]
    for command, code in (("verify", 0), ("bench", 0)):
        arguments = [sys.executable, "-m", "tvm_lowrank.cli", command, str(bundle), *address, "--emulate"]
        more = ["--images", "20"] if command == "verify" else ["--rounds", "2"]
        done = subprocess.run([*arguments, *more], capture_output=True, text=True, cwd=sys.prefix, timeout=300)
        assert done.returncode == code, done.stderr
        assert ("emulated" in done.stdout) == (command == "bench")


def test_emulated_boards_are_not_taken_for_real_ones(bundle: Path, boards: Boards) -> None:
    address = ["--rpc-tracker", f"{boards.host}:{boards.port}", "--rpc-key", boards.key]
    command = [sys.executable, "-m", "tvm_lowrank.cli", "bench", str(bundle), *address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix, timeout=300)
    assert done.returncode == 2 and "is emulated" in done.stderr, done.stderr


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_float16_on_a_board(scale: float, folder: Path, boards: Boards) -> None:
    """Its arithmetic is that of the bridge; a layer that reads larger numbers than it has stays in float32."""
    model = network()
    with torch.no_grad():  # the next layer makes up for it
        model[0].weight.mul_(scale), model[0].bias.mul_(scale), model[2].weight.div_(scale)  # type: ignore[operator, union-attr]
    manifest = tvm_lowrank.search(
        model=model,
        input_shape=(1, 3, SIZE, SIZE),
        data=str(folder / "data.npz"),
        target="rpi5",
        precision="float16",
        rpc_tracker=f"{boards.host}:{boards.port}",
        rpc_key=boards.key,
        emulate=True,
        methods=("spatial",),
        budget=40.0,
        trials=1,
        cache=folder / "cache",
        out=folder / f"half{scale:g}",
    )
    sites = {site["id"]: site for site in manifest["sites"]}
    formats = {name: site["format"] for name, site in sites.items()}
    large = "float32" if scale > 1 else "float16"
    assert formats == {"0": large, "2": large, "4": "float16", "8": "float16"}
    assert all(("too much for float16" in sites[name]["reason"]) == (scale > 1) for name in ("0", "2"))
    assert "too much" not in sites["4"]["reason"] + sites["8"]["reason"]
    # the libraries were compared with PyTorch, which rounds as they do; the network is hardly another
    accuracy = manifest["accuracy"]
    assert accuracy["on_device"] == IMAGES and abs(accuracy["float32"]["dense"] - accuracy["dense"]) < 2
