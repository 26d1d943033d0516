"""Targets of any form: read with their images in every form of a split, handed on as they are, and told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tvm_lowrank.data.parts import joined, take
from tvm_lowrank.data.splits import fingerprint, load_data
from tvm_lowrank.errors import UserError

SHAPE = (3, 4, 6)
COUNT = 5
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, *SHAPE)).astype("float32")
VECTORS = rng.normal(size=(COUNT, 2))
MASKS = rng.integers(0, 3, (COUNT, 4, 6)).astype("uint8")
PICTURES = rng.random((COUNT, 3, 8, 12)).astype("float32")
BOXES = [{"boxes": rng.random((k, 4)), "labels": np.arange(k), "name": f"image {k}"} for k in range(COUNT)]
ARRAYS = {"vectors": VECTORS, "masks": MASKS, "pictures": PICTURES, "as large as the images": X + 1}


class Pairs(Dataset[Any]):
    """A user's data set of one image and target at a time."""

    def __init__(self, targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        target = self.targets[number]
        return torch.from_numpy(X[number]), torch.from_numpy(target) if isinstance(target, np.ndarray) else target


def load(selection: Any, **more: Any) -> Any:
    return load_data({"calibration": X, "selection": selection, "evaluation": selection}, input_shape=SHAPE, **more)


def in_lists(batch: Any) -> tuple[Any, Any]:
    """How detection data is usually put together."""
    images, targets = zip(*batch, strict=True)
    return torch.stack(images), targets


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_in_every_form(kind: str) -> None:
    targets = ARRAYS[kind]
    forms = [
        (X, targets),
        (X, torch.from_numpy(targets)),
        (X, list(targets)),
        ([X[:2], X[2:]], [targets[:2], targets[2:]]),
        [(X[:2], targets[:2]), (X[2:], targets[2:])],
        DataLoader(Pairs(targets), batch_size=2),
        Pairs(targets),
    ]
    for form in forms:
        images, found = load(form).selection
        np.testing.assert_array_equal(images[:], X)
        np.testing.assert_array_equal(found, targets)
        assert found.dtype == targets.dtype


def test_lists_of_objects_in_every_form() -> None:
    """Of two splits they are the same; a loader's mapping of values for a batch becomes one for each image."""
    for form in ((X, BOXES), Pairs(BOXES), DataLoader(Pairs(BOXES), batch_size=2, collate_fn=in_lists)):
        images, found = load(form).selection
        np.testing.assert_array_equal(images[:], X)
        assert isinstance(found, list) and [own["name"] for own in found] == [own["name"] for own in BOXES]
        for own, wanted in zip(found, BOXES, strict=True):
            np.testing.assert_array_equal(own["boxes"], wanted["boxes"])
    alike = [{"height": number, "mask": MASKS[number]} for number in range(COUNT)]
    found = load(DataLoader(Pairs(alike), batch_size=2)).selection[1]
    assert [int(own["height"]) for own in found] == list(range(COUNT))
    np.testing.assert_array_equal(found[4]["mask"], MASKS[4])


def test_calibration_may_be_batches_with_targets_of_any_form() -> None:
    for loader in (DataLoader(Pairs(X + 1), batch_size=2), Pairs(X + 1), Pairs(BOXES)):
        splits = load_data(
            {"calibration": loader, "selection": (X, BOXES), "evaluation": (X, BOXES)}, input_shape=SHAPE
        )
        np.testing.assert_array_equal(splits.calibration[:], X)


def test_npz_of_masks(tmp_path: Path) -> None:
    arrays = {"calibration_x": X, "selection_x": X, "selection_y": MASKS, "evaluation_x": X, "evaluation_y": VECTORS}
    np.savez(tmp_path / "d.npz", **arrays)
    splits = load_data(tmp_path / "d.npz", input_shape=SHAPE)
    np.testing.assert_array_equal(splits.selection[1], MASKS)
    np.testing.assert_array_equal(splits.evaluation[1], VECTORS)


def test_without_targets_where_none_are_needed(tmp_path: Path) -> None:
    for split in ("calibration", "selection", "evaluation"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (4, 6, 3), dtype="uint8")
            Image.fromarray(pixels).save(tmp_path / "flat" / split / f"{number}.png")
    np.savez(tmp_path / "d.npz", calibration_x=X, selection_x=X, evaluation_x=X)
    sources: list[Any] = [tmp_path / "flat", tmp_path / "d.npz"]
    sources += [{"calibration": X, "selection": own, "evaluation": own} for own in (X, [X[:2], X[2:]], (X, MASKS))]
    sources += [{"calibration": X, "selection": own, "evaluation": own} for own in (Pairs(BOXES), (X, [0] * 5))]
    for source in sources:
        splits = load_data(source, input_shape=SHAPE, labelled=False)
        assert len(splits.selection[0]) == len(splits.selection[1]) in (3, COUNT)
        assert splits.evaluation[0].shape[1:] == SHAPE and splits.evaluation[1].size == 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (MASKS[:3], "5 images but targets of shape 3x4x6; give one for each"),
        (BOXES[:3], "5 images but targets of shape 3; give one for each"),
        (None, "NoneType is no list; give an array or a list"),
        ({"boxes": 1}, "dict is no list; give an array or a list"),
        ((1 / number for number in (1, 0)), "reading failed: ZeroDivisionError"),
        ([(lambda: 0)] * COUNT, "selection targets: .*give arrays, numbers, texts, lists and mappings"),
    ],
)
def test_bad_targets(targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load((X, targets))
    assert "\n" not in str(error.value)


def test_a_batch_with_another_number_of_targets() -> None:
    for targets, message in (
        (MASKS[:1], "1 for a batch of 2 images"),
        ({"a": MASKS}, "5 for a batch of 2"),
        (3, "int"),
    ):
        with pytest.raises(UserError, match=message):
            load([(X[:2], targets), (X[2:], MASKS[2:]), (X, MASKS)])


def test_labels_are_checked_only_where_they_are_labels() -> None:
    """Where the network tells seven classes apart, one number an image is a class; anything else is the metric's."""
    for targets, message in (([0, 1, 2, 3, 7], "from 0 to 7"), (np.zeros(COUNT), "labels are float64")):
        with pytest.raises(UserError, match=message):
            load((X, targets), classes=7)
        load((X, targets))
    np.testing.assert_array_equal(load((X, MASKS + 100), classes=7).selection[1], MASKS + 100)
    assert load((X, [0, 1, 2, 3, 4]), classes=7).selection[1].dtype == np.int64


def test_fingerprints_see_any_target() -> None:
    changed = [dict(own) for own in BOXES]
    changed[3] = {**changed[3], "boxes": changed[3]["boxes"] + 1e-9}
    for number, kinds in enumerate(
        (
            (MASKS, MASKS + 1, MASKS.astype("int16"), MASKS.reshape(COUNT, 6, 4)),
            (BOXES, changed, BOXES[::-1], [own["boxes"] for own in BOXES], [own["name"] for own in BOXES]),
        )
    ):
        prints = {fingerprint(load((X, own))) for own in kinds}
        assert len(prints) == len(kinds), number
    in_order, turned = [{"a": 1, "b": None}] * COUNT, [{"b": None, "a": 1}] * COUNT
    assert fingerprint(load((X, in_order))) == fingerprint(load((X, turned)))
    tensors = [{**own, "boxes": torch.from_numpy(own["boxes"])} for own in BOXES]
    assert fingerprint(load((X, tensors))) == fingerprint(load((X, BOXES)))


PROGRAM = """
import numpy as np
from tvm_lowrank.data.splits import fingerprint, load_data
class Box:
    def __init__(self, corner): self.corner, self.names = corner, {"cat", "dog", "cow"}
x = np.zeros((2, 3, 4, 6), "float32")
targets = [{"names": {"cat", "dog", "cow"}, "box": (1.5, [b"x", True])}, Box(3).corner]
split = x, targets
print(fingerprint(load_data({"calibration": x, "selection": split, "evaluation": split}, input_shape=(3, 4, 6))))
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    """Though Python hashes texts in another way each time."""
    runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != ""


def test_parts_of_everything() -> None:
    outputs = (VECTORS, MASKS)
    for values in (VECTORS, outputs, BOXES):
        again = joined([take(values, slice(0, 2)), take(values, np.array([2, 3, 4]))])
        for own, wanted in zip(again, values, strict=True):
            assert own is wanted or np.array_equal(own, wanted)
