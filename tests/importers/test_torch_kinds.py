"""Kinds of torch modules and files that people have: as a module, as a `.pt2` of one image, as one of any number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers import torch_operators
from tvm_lowrank.importers.importer import import_model

SIZE = (3, 15, 17)


def after(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Casting(nn.Module):
    """Computes in its own number format, and gives float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x.to(self.first.weight.dtype))).float()
        return self.second(y.to(self.second.weight.dtype)).float()


def averaging() -> nn.Module:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    norm(torch.randn(4, 8, 5, 5) * 2 + 1)
    return after(norm)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: after(nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
    "instance norm without parameters": lambda: after(nn.InstanceNorm2d(8)),
    "instance norm of training": averaging,
    "circular": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
    "reflected": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "replicated": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate"),
    "half of an odd size": lambda: after(nn.Upsample(scale_factor=0.5, mode="bilinear")),
    "cubic": lambda: after(nn.Upsample(scale_factor=1.7, mode="bicubic")),
    "to a size": lambda: after(nn.Upsample((7, 20), mode="bilinear", align_corners=True)),
    "standardised": lambda: Standardised(3, 8, 3),
    "bfloat16": lambda: Casting().bfloat16(),
    "float16": lambda: after(nn.BatchNorm2d(8), nn.ReLU()).half(),
}


def exported(model: nn.Module, batch: int, path: Path) -> Path:
    x = torch.zeros((batch, *SIZE), dtype=next(model.parameters()).dtype)
    shapes = None if batch == 1 else ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False), path)
    return path


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_kinds(name: str, batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODULES[name]().eval()
    if batch is None:
        mod = import_model(model, input_shape=(1, *SIZE))
    else:
        mod = import_model(exported(model, batch, tmp_path / "model.pt2"))
    assert find_sites(mod)[0].weight.dtype == np.float32
    with torch.no_grad():
        for count in (1, 3):
            x = torch.randn(count, *SIZE)
            expected = copy.deepcopy(model).float()(x) if name == "float16" else model(x)
            tolerance = 2e-2 if name == "bfloat16" else 1e-5
            torch.testing.assert_close(
                TorchBridge(mod)(x), expected, rtol=0, atol=tolerance * float(expected.abs().max())
            )


class Recogniser(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.recurrent = nn.Conv2d(3, 8, (15, 3), stride=(1, 6)), layer(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.conv(x).squeeze(2).transpose(1, 2))[0]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_stay_dense(layer: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Recogniser(layer).eval()
    mod = import_model(model, input_shape=(1, *SIZE))
    assert [site.id for site in find_sites(mod)] == ["conv"]
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(TorchBridge(mod)(x), model(x), rtol=0, atol=1e-5)


def test_torchscript(tmp_path: Path) -> None:
    model = after(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, *SIZE)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    mod = import_model(tmp_path / "model.pt", input_shape=(1, *SIZE))
    assert len(find_sites(mod)) == 2
    with torch.no_grad():
        torch.testing.assert_close(TorchBridge(mod)(x), model(x), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="input shape; give"):
        import_model(tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights.pt is no TorchScript.*file.py:factory"):
        import_model(tmp_path / "weights.pt", input_shape=(1, *SIZE))


def test_a_wrong_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch_operators.CONVERTERS["instance_norm.default"]

    def wrong(node: object, importer: object) -> object:
        builder = importer.block_builder  # type: ignore[attr-defined]
        return builder.emit(torch_operators.relax.op.multiply(norm(node, importer), torch_operators.relax.const(1.01)))

    monkeypatch.setitem(torch_operators.CONVERTERS, "instance_norm.default", wrong)
    with pytest.raises(UserError, match=r"differs from torch.*; "):
        import_model(after(nn.InstanceNorm2d(8)), input_shape=(1, *SIZE))
