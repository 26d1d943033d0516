"""The importers: torch, .pt2 and ONNX end in the same canonical function with the same site ids."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from tvm import relax
from tvm.ir import IRModule

from support import models
from tvm_lowrank.bridge.epilogue import epilogue
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.quantities import input_shape as parse_shape

SHARED = {"irregular": ["twice_2"]}  # modules that are called twice


def difference(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return next(iter(y.values())) if isinstance(y, dict) else y


def images(name: str, batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, *models.FAMILIES[name][1], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def imported() -> Callable[[str], tuple[nn.Module, IRModule]]:
    """Each family, built and imported once."""
    cache: dict[str, tuple[nn.Module, IRModule]] = {}

    def get(name: str) -> tuple[nn.Module, IRModule]:
        if name not in cache:
            make, size = models.FAMILIES[name]
            model = models.randomised(make())
            cache[name] = model, import_model(model, input_shape=(1, 3, *size))
        return cache[name]

    return get


def export_onnx(model: nn.Module, x: Tensor, path: Path, *, dynamo: bool = False, dynamic: bool = False) -> Path:
    options: dict = {}
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("n")},)
    elif dynamic:
        options["dynamic_axes"] = {"x": {0: "n"}}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], **options)
    logging.disable(level)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", models.FAMILIES)
def test_torch_route(name: str, imported: Callable) -> None:
    model, mod = imported(name)
    bridge = TorchBridge(mod)
    for batch in (1, 3):
        x = images(name, batch)
        with torch.no_grad():
            assert difference(bridge(x), run(model, x)) < 1e-5
    ids = [site.id for site in find_sites(mod)]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == sorted(models.site_paths(model) + SHARED.get(name, []))
    relax.analysis.well_formed(mod)
    assert "nn.batch_norm" not in mod.script()
    assert len(mod.functions) == 1 and len(mod["main"].body.blocks) == 1
    assert str(mod["main"].params[0].ty.shape.values[0]) == "batch"


@pytest.mark.parametrize("name", models.FAMILIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_route_gives_the_same(name: str, dynamic: bool, imported: Callable, tmp_path: Path) -> None:
    model, mod = imported(name)
    path = export_onnx(model, images(name, 1 + dynamic), tmp_path / "model.onnx", dynamic=dynamic)
    other = import_model(path)
    x = images(name, 3)
    with torch.no_grad():
        assert difference(TorchBridge(other)(x), TorchBridge(mod)(x)) < 1e-4
    ours, theirs = find_sites(mod), find_sites(other)
    assert {s.id: (s.spec, s.size) for s in theirs} == {s.id: (s.spec, s.size) for s in ours}


@pytest.mark.parametrize("name", ["inception", "resnet20"])
def test_onnx_of_the_dynamo_exporter(name: str, imported: Callable, tmp_path: Path) -> None:
    model, mod = imported(name)
    other = import_model(export_onnx(model, images(name, 2), tmp_path / "model.onnx", dynamo=True, dynamic=True))
    x = images(name, 3)
    with torch.no_grad():
        assert difference(TorchBridge(other)(x), TorchBridge(mod)(x)) < 1e-4
    assert {s.id for s in find_sites(other)} == {s.id for s in find_sites(mod)}


@pytest.mark.parametrize("name", ["resnet20", "irregular"])
def test_pt2_with_a_fixed_batch(name: str, imported: Callable, tmp_path: Path) -> None:
    model, mod = imported(name)
    torch.export.save(torch.export.export(model, (images(name, 1),), strict=False), tmp_path / "model.pt2")
    other = import_model(tmp_path / "model.pt2")
    x = images(name, 3)
    with torch.no_grad():
        assert difference(TorchBridge(other)(x), run(model, x)) < 1e-5
    assert [s.id for s in find_sites(other)] == [s.id for s in find_sites(mod)]


def test_batch_norm_folds_only_where_legal(imported: Callable) -> None:
    _, folded = imported("resnet18")
    text = folded.script()
    assert text.count("nn.conv2d") == 21 and "multiply" not in text
    assert all(site.bias is not None for site in find_sites(folded))
    _, dense = imported("densenet")  # batch-norm in front of the convolution, and on a concatenation
    assert dense.script().count("R.multiply") == 4
    assert [s.bias is not None for s in find_sites(dense)] == [False, *([True, False] * 3), True, True]


def test_linear_layers_are_1x1_convolutions() -> None:
    """With what follows them as an epilogue, and no reshape between two of them."""
    torch.manual_seed(0)
    hidden = [nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Hardswish(), nn.Dropout(), nn.Linear(24, 16, bias=False)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.GELU(), nn.Linear(16, 5)]
    model = models.randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head)).eval()
    mod = import_model(model, input_shape=(1, 3, 8, 8))
    sites = find_sites(mod)
    assert [(s.id, s.spec.in_channels, s.spec.out_channels, s.size) for s in sites[1:]] == [
        ("4", 32, 24, (1, 1)),
        ("8", 24, 16, (1, 1)),
        ("10", 16, 5, (1, 1)),
    ]
    assert [s.bias is not None for s in sites] == [True, True, False, True]
    assert mod.script().count("R.reshape") == 3  # flatten, to an image, and back at the end
    first, second = (epilogue(mod["main"], s.id) for s in sites[1:3])
    assert first.activation is not None and "clip" in first.activation.name
    assert second.activation is not None and second.activation.name == "nn.gelu"
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert difference(TorchBridge(mod)(x), model(x)) < 1e-5


def test_products_of_more_than_one_row_an_image_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 4), nn.Flatten(), nn.Linear(32, 3))
    assert [s.id for s in find_sites(import_model(model, input_shape=(1, 3, 8, 8)))] == ["0", "4"]


class Reused(nn.Module):
    """The convolution's result has another use beside its batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.norm(y)) + y


def test_zero_padding_belongs_to_the_convolution(imported: Callable) -> None:
    _, mod = imported("irregular")
    specs = {site.id: site.spec for site in find_sites(mod)}
    assert specs["dilated"].padding == (4, 3, 3, 2) and specs["even"].padding == (0, 1, 1, 2)
    assert "nn.pad" not in mod.script()


def test_batch_norm_beside_another_use() -> None:
    model = models.randomised(Reused())
    mod = import_model(model, input_shape=(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert difference(TorchBridge(mod)(x), model(x)) < 1e-5
    assert "R.multiply" in mod.script()


class Head(nn.Module):
    """A convolution and a rarer operator."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "local response normalisation": nn.LocalResponseNorm(3),
    "adaptive maximum": nn.AdaptiveMaxPool2d(1),
    "maximum with indices": lambda x: torch.max(x.flatten(2), 2)[0],
    "nearest": lambda x: nn.functional.interpolate(x, size=(7, 5)),
    "hard-coded batch": lambda x: x.reshape(2, -1),
    "concatenated zeros": lambda x: torch.cat([x, torch.zeros(x.size(0), 2, *x.shape[2:])], 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_rarer_operators(name: str) -> None:
    model = models.randomised(Head(HEADS[name]))
    mod = import_model(model, input_shape=(1, 3, 14, 14))
    batch = 2 if name == "hard-coded batch" else 3
    x = torch.randn(batch, 3, 14, 14, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert difference(TorchBridge(mod)(x), model(x)) < 1e-5
        assert TorchBridge(mod)(x.repeat(2, 1, 1, 1)).shape[0] == 2 * batch


def test_the_model_keeps_its_mode() -> None:
    model = Reused().train()
    model.norm.eval()
    import_model(model, input_shape=(1, 3, 8, 8))
    assert model.training and not model.norm.training


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(find_sites(import_model("tvm_lowrank.example:network", input_shape=(1, 3, 32, 32)))) == 9
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(
        "from neighbour import WIDTH\nfrom torch import nn\ndef make():\n    return nn.Conv2d(3, WIDTH, 1)\n"
    )
    (site,) = find_sites(import_model(f"{tmp_path / 'net.py'}:make", input_shape=(1, 3, 4, 4)))
    assert site.spec.out_channels == 5 and site.id == "conv_1"
    monkeypatch.chdir(tmp_path)
    assert find_sites(import_model("net:make", input_shape=(1, 3, 4, 4)))


def test_input_shapes_as_text() -> None:
    assert parse_shape("1,3,224,224") == (1, 3, 224, 224)
    assert parse_shape("1x3x32x32") == (1, 3, 32, 32)
    for text in ("1,3,224", "a,b,c,d", "", "1,3,-2,4", "1,3,0,4"):
        with pytest.raises(UserError):
            parse_shape(text)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"logits": y, "auxiliary": y * 2}


class Classes(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.conv(x).argmax(1)


class NoTensor(Several):
    def forward(self, x: Tensor) -> int:  # type: ignore[override]
        return 3


class TwoInputs(Several):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.conv(x + y)


class Unsupported(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.special.bessel_j0(self.conv(x))


class DataDependent(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def broken(value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight.data[0, 0, 0, 0] = value
    return model


MODULE_ERRORS = {
    "classes": (Classes, (1, 3, 8, 8), ["int64", "not float32", "metric"]),
    "no tensor": (NoTensor, (1, 3, 8, 8), ["int", "no tensor"]),
    "two inputs": (TwoInputs, (1, 3, 8, 8), ["input"]),
    "unsupported": (Unsupported, (1, 3, 8, 8), ["bessel_j0", "not supported"]),
    "control flow": (DataDependent, (1, 3, 8, 8), ["torch.export"]),
    "channels": (Several, (1, 5, 8, 8), ["2x5x8x8", "expected input"]),
    "too small": (lambda: nn.Conv2d(3, 4, 5), (1, 3, 2, 2), ["2x3x2x2"]),
    "no shape": (Several, None, ["input shape"]),
    "bad shape": (Several, (3, 8, 8), ["(3, 8, 8)"]),
    "nan": (lambda: broken(float("nan")), (1, 3, 8, 8), ["'1'", "NaN"]),
    "inf": (lambda: broken(float("inf")), (1, 3, 8, 8), ["'1'", "NaN or inf"]),
    "double": (lambda: nn.Conv2d(3, 4, 3).double(), (1, 3, 8, 8), ["float64", "float32"]),
    "no layer": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), (1, 3, 2, 2), ["no 2-D convolution"]),
    "batch mixed in": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0, 1)), (1, 3, 2, 2), ["batch"]),
}


def test_several_outputs_keep_their_order() -> None:
    model = models.randomised(Several())
    bridge = TorchBridge(import_model(model, input_shape=(1, 3, 8, 8)))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(x).values(), bridge.outputs.parted(bridge(x))
    for wanted, own in zip(expected, found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


def test_several_outputs_of_a_file(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "two.onnx", "Relu", outputs=2)
    bridge = TorchBridge(import_model(path))
    images = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype("float32")
    expected = onnxruntime.InferenceSession(path).run(None, {"x": images})
    found = bridge.outputs.parted(bridge(torch.from_numpy(images)))
    for wanted, own in zip(expected, found, strict=True):
        np.testing.assert_allclose(own.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def check_message(error: UserError, words: list[str]) -> None:
    text = str(error)
    assert "\n" not in text and "; " in text and len(text) < 500
    assert all(word in text for word in words), text


@pytest.mark.parametrize("case", MODULE_ERRORS)
def test_errors_of_modules(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, shape, words = MODULE_ERRORS[case]
    with pytest.raises(UserError) as caught:
        import_model(make(), input_shape=shape)
    check_message(caught.value, words)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


FILES = {
    "raises.py": "def make():\n    raise ValueError('first line\\nsecond line')\n",
    "notmodule.py": "def make():\n    return 3\nvalue = 3\n",
    "broken.py": "import torch_that_does_not_exist\n",
    "syntax.py": "def make(:\n",
    "junk.pt2": "junk",
    "junk.onnx": "junk",
}
SOURCE_ERRORS = {
    "raises.py:make": ["ValueError", "first line"],
    "notmodule.py:make": ["int", "torch.nn.Module"],
    "notmodule.py:value": ["int"],
    "notmodule.py:missing": ["missing"],
    "broken.py:make": ["torch_that_does_not_exist"],
    "syntax.py:make": ["SyntaxError"],
    "nowhere.py:make": ["nowhere.py", "does not exist"],
    "no_such_package.models:make": ["no_such_package"],
    "raises.py": ["factory"],
    "model.h5": ["model.h5"],
    "junk.pt2": ["junk.pt2"],
    "junk.onnx": ["junk.onnx"],
    "nowhere.onnx": ["does not exist"],
    "nowhere.pt2": ["does not exist"],
}


@pytest.mark.parametrize("source", SOURCE_ERRORS)
def test_errors_of_sources(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        import_model(source, input_shape=(1, 3, 8, 8))
    check_message(caught.value, SOURCE_ERRORS[source])


def onnx_file(path: Path, operator: str, *, dtype: int = onnx.TensorProto.FLOAT, outputs: int = 1) -> Path:
    """x -> Conv -> operator -> y, y2, ..."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"]),
        *(onnx.helper.make_node(operator, ["c"], [f"y{i}"]) for i in range(outputs)),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", dtype, ("n", 3, 8, 8))],
        [onnx.helper.make_tensor_value_info(f"y{i}", dtype, None) for i in range(outputs)],
        [weight],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_onnx_without_any_names(tmp_path: Path) -> None:
    (site,) = find_sites(import_model(onnx_file(tmp_path / "m.onnx", "Relu")))
    assert site.id == "conv_1"


def test_errors_of_onnx(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = [
        (onnx_file(tmp_path / "op.onnx", "Hardmaxx"), ["Hardmaxx"]),
        (onnx_file(tmp_path / "bytes.onnx", "Relu", dtype=onnx.TensorProto.UINT8), ["uint8", "float32"]),
    ]
    for path, words in cases:
        with pytest.raises(UserError) as caught:
            import_model(path)
        check_message(caught.value, words)
    with pytest.raises(UserError) as caught:
        import_model(onnx_file(tmp_path / "m.onnx", "Relu"), input_shape=(1, 3, 9, 9))
    check_message(caught.value, ["3x9x9", "3x8x8"])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
