"""Searches of networks whose outputs are not the scores of several classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tvm_lowrank
from support.command import Run
from support.models import randomised
from tvm_lowrank.bundle.verify import verify

SIZE = 16


def binary(end: nn.Module | None = None) -> nn.Module:
    """One logit, above zero for half of the images."""
    front = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    back = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1)]
    net = randomised(nn.Sequential(*front, *back)).eval()
    with torch.no_grad():
        answers = net(torch.from_numpy(images(9)))
        net[-1].weight.mul_(3 / answers.std()), net[-1].bias.zero_()  # type: ignore[operator, union-attr]
        net[-1].bias.sub_(net(torch.from_numpy(images(9))).median())  # type: ignore[operator, union-attr]
    return nn.Sequential(net, end) if end is not None else net


def picture() -> nn.Module:
    """A picture of twice the size."""
    front = [nn.Conv2d(1, 32, 5, padding=2), nn.Tanh(), nn.Conv2d(32, 32, 3, padding=1), nn.Tanh()]
    return randomised(nn.Sequential(*front, nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2))).eval()


def images(seed: int, channels: int = 3, count: int = 200) -> np.ndarray:
    small = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=SIZE, mode="bilinear").numpy()


def answered(net: nn.Module, even: float) -> dict[str, Any]:
    """Splits whose labels are the network's own answers."""
    splits: dict[str, Any] = {"calibration": images(0)}
    for seed, name in enumerate(("selection", "evaluation"), start=1):
        x = images(seed)
        with torch.no_grad():
            splits[name] = (x, (net(torch.from_numpy(x))[:, 0] > even).long().numpy())
    return splits


def searched(folder: Path, net: nn.Module, channels: int = 3, **options: Any) -> dict[str, Any]:
    return tvm_lowrank.search(
        model=net,
        input_shape=(1, channels, SIZE, SIZE),
        methods=("channel", "spatial"),
        precision="float32",
        trials=1,
        out=folder / "out",
        cache=folder / "cache",
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("end", "even"), [(None, 0.0), (nn.Sigmoid(), 0.5)])
def test_yes_or_no(tmp_path: Path, end: nn.Module | None, even: float) -> None:
    net = binary(end)
    splits = answered(net, even)
    np.savez(
        tmp_path / "data.npz",
        calibration_x=splits["calibration"],
        **{f"{name}_{axis}": splits[name][i] for name in ("selection", "evaluation") for i, axis in enumerate("xy")},
    )
    manifest = searched(tmp_path, net, data=tmp_path / "data.npz", budget=5.0)
    accuracy = manifest["accuracy"]
    assert accuracy["metric"] == ("binary" if end is None else "binary-probability")
    assert accuracy["dense"] > 98 and accuracy["drop"] <= 5
    assert any(plan["damage"] > 1e-6 for plan in manifest["plans"])
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_yes_or_no_without_data(tmp_path: Path) -> None:
    """Every candidate has a damage, so that the network is not destroyed."""
    net = binary()
    manifest = searched(tmp_path, net, budget=1.0)
    assert 0 < manifest["predicted_damage"] < 0.1
    x = images(5)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    found = tvm_lowrank.load(tmp_path / "out")(x)
    assert np.mean((found > 0) == (expected > 0)) > 0.9


@pytest.mark.slow
def test_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Errors count in the spread of the outputs: what hardly changes the picture has hardly any damage."""
    net = picture()
    (tmp_path / "metric.py").write_text(
        "import numpy as np, torch, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_outputs as t\n"
        "x = np.concatenate([t.images(1, 1), t.images(2, 1)])\n"
        "with torch.no_grad(): truth = t.picture()(torch.from_numpy(x)).numpy()\n"
        "def score(outputs, labels):\n"
        "    error = ((outputs - truth[labels]) ** 2).mean((1, 2, 3)) / truth.var()\n"
        "    return np.clip(1 - error, 0, 1)\n"
    )
    count = 200
    splits = {
        "calibration": images(0, 1),
        "selection": (images(1, 1), np.arange(count)),
        "evaluation": (images(2, 1), np.arange(count, 2 * count)),
    }
    manifest = searched(
        tmp_path, net, 1, data=splits, budget=5.0, metric=f"{tmp_path / 'metric.py'}:score", output="regression"
    )
    assert manifest["accuracy"]["drop"] <= 5
    plans = manifest["plans"]
    assert plans and all(1e-7 < plan["damage"] < 2 for plan in plans)
    # half of the relative error is the damage, and the metric is that error
    for plan in plans:
        assert plan["drop"] == pytest.approx(200 * plan["damage"], rel=0.7, abs=0.1)


def test_a_guess_is_told_and_what_cannot_be_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from test_outputs import binary\n"
    )
    given = ["net.py:binary", "--input-shape", f"1,3,{SIZE},{SIZE}", "--trials", "1", "--cache", tmp_path / "cache"]
    done = run("compile", *given, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "outputs (n, 1) are taken for independent labels; --output says otherwise" in said
    done = run("compile", *given, "--out", tmp_path / "other", "--output", "scores", cwd=tmp_path)
    assert done.returncode == 2 and "have no classes on axis 1" in done.stderr
