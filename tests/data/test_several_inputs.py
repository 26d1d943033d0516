"""Data of networks with several inputs: in every form the same, each input left where it is until it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tvm_lowrank.data import images, npz
from tvm_lowrank.data.images import Filed, Stored
from tvm_lowrank.data.several import Joined
from tvm_lowrank.data.splits import Splits, fingerprint, load_data, overlaps
from tvm_lowrank.data.training_data import load_training
from tvm_lowrank.errors import UserError

SHAPES = ((3, 4, 6), (5,))
COUNT = 12
rng = np.random.default_rng(0)
Inputs = tuple[np.ndarray, np.ndarray]


def inputs(count: int = COUNT) -> Inputs:
    first, second = (rng.normal(size=(count, *shape)).astype("float32") for shape in SHAPES)
    return first, second


CALIBRATION, SELECTION, EVALUATION = inputs(), inputs(), inputs()
LABELS = np.arange(COUNT) % 3


def flat(given: Inputs) -> np.ndarray:
    """What the tool works with: of each image the inputs one after another."""
    return np.concatenate([own.reshape(len(own), -1) for own in given], axis=1)[:, :, None, None]


def mapping(**changes: Any) -> dict[str, Any]:
    return {"calibration": CALIBRATION, "selection": (SELECTION, LABELS), "evaluation": (EVALUATION, LABELS), **changes}


def loaded(folder: Path | None = None, *, labelled: bool = True, **changes: Any) -> Splits:
    return load_data(mapping(**changes), input_shape=SHAPES, classes=3, folder=folder, labelled=labelled)


class Pairs(Dataset):
    """((a, b), label) of one image."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        if number >= COUNT:
            raise IndexError
        return tuple(torch.from_numpy(own[number]) for own in SELECTION), int(LABELS[number])  # type: ignore[return-value]


def batches(given: Inputs = SELECTION) -> list[Any]:
    return [(tuple(own[part] for own in given), LABELS[part]) for part in (slice(7), slice(7, None))]


def test_every_form_of_a_labelled_split_gives_the_same() -> None:
    tensors = tuple(map(torch.from_numpy, SELECTION))
    forms = [
        (SELECTION, LABELS),
        [list(SELECTION), LABELS.tolist()],
        (tensors, torch.from_numpy(LABELS)),
        (tuple(own.astype("float64") for own in SELECTION), LABELS),
        batches(),
        iter(batches()),
        ([own for own, _ in batches()], LABELS),
        [[[torch.from_numpy(x) for x in own], torch.from_numpy(y)] for own, y in batches()],
        Pairs(),
        DataLoader(Pairs(), batch_size=5),
    ]
    for form in forms:
        found, labels = loaded(selection=form).selection
        assert found.shape == (COUNT, 3 * 4 * 6 + 5, 1, 1)
        np.testing.assert_array_equal(found[:], flat(SELECTION))
        np.testing.assert_array_equal(labels, LABELS)
        np.testing.assert_array_equal(found[np.array([7, 0, 7])], flat(SELECTION)[[7, 0, 7]])
        assert found[:].dtype == np.float32 and found[:].flags.c_contiguous and found[:0].shape == (0, 77, 1, 1)


def test_calibration_and_unlabelled_splits_may_come_with_or_without_targets() -> None:
    bare = [own for own, _ in batches()]
    for form in (SELECTION, list(SELECTION), bare, batches(), iter(bare), Pairs(), DataLoader(Pairs(), batch_size=5)):
        if not hasattr(form, "__next__"):
            found = loaded(labelled=False, selection=form, evaluation=(EVALUATION, None)).selection
            np.testing.assert_array_equal(found[0][:], flat(SELECTION))
            assert found[1].shape == (COUNT, 0)
        np.testing.assert_array_equal(loaded(calibration=form).calibration[:], flat(SELECTION))


def written(path: Path, save: Callable[..., None] = np.savez, **changes: Any) -> Path:
    splits = {"calibration": CALIBRATION, "selection": SELECTION, "evaluation": EVALUATION}
    arrays = {f"{name}_x_{number}": x for name, own in splits.items() for number, x in enumerate(own, 1)}
    save(path, **{**arrays, "selection_y": LABELS, "evaluation_y": LABELS, **changes})
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("limit", [2**28, 1000])
def test_npz(save: Callable[..., None], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IN_MEMORY", limit)
    monkeypatch.setattr(npz, "CHUNK", 700)
    splits = load_data(written(tmp_path / "d.npz", save), input_shape=SHAPES, folder=tmp_path)
    np.testing.assert_array_equal(splits.evaluation[0][:], flat(EVALUATION))
    assert fingerprint(splits) == fingerprint(loaded())
    assert isinstance(splits.calibration, Stored) and isinstance(splits.calibration.raw, Joined)
    # the pictures are too many, the vectors are not
    kinds = [isinstance(own, Filed) for own in splits.calibration.raw.parts]
    assert kinds == [limit == 1000, False]


def test_arrays_stay_where_they_are_and_batches_go_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IN_MEMORY", 1000)
    mapped = []
    for number, own in enumerate(SELECTION):
        np.save(tmp_path / f"{number}.npy", own)
        mapped.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    found = loaded(tmp_path, selection=(tuple(mapped), LABELS), calibration=batches()).selection[0]
    assert isinstance(found, Stored) and isinstance(found.raw, Joined)
    assert all(np.shares_memory(own, stored) for own, stored in zip(found.raw.parts, mapped, strict=True))
    spooled = loaded(tmp_path, selection=batches()).selection[0]
    assert isinstance(spooled, Stored) and isinstance(spooled.raw, Filed)
    np.testing.assert_array_equal(spooled[:], found[:])


def test_images_in_two_splits_are_those_that_have_all_inputs_in_common() -> None:
    half = (SELECTION[0], EVALUATION[1])
    assert overlaps(loaded(evaluation=(half, LABELS))) == []
    (said,) = overlaps(loaded(evaluation=(SELECTION, LABELS)))
    assert said.startswith("12 of 12 evaluation images also appear in selection")


def test_training_data() -> None:
    for form in ((SELECTION, LABELS), batches(), DataLoader(Pairs(), batch_size=5)):
        found = list(load_training(form, input_shape=SHAPES, classes=3)(1))
        x, y = (torch.cat(own).numpy() for own in zip(*found, strict=True))  # type: ignore[arg-type]
        places = {image.tobytes(): label for image, label in zip(flat(SELECTION), LABELS, strict=True)}
        assert len(x) == COUNT and [places[image.tobytes()] for image in x] == y.tolist()
    bare = [own for own, _ in batches()]
    for form in (bare, batches(), (SELECTION, None)):
        found = list(load_training(form, input_shape=SHAPES, labelled=False)(1))
        assert sum(len(x) for x, _ in found) == COUNT and all(y is None for _, y in found)


bad = EVALUATION[1].copy()
bad[3, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"calibration": CALIBRATION[0]},
            "calibration of in memory: ndarray, the model has several inputs; give a tuple",
        ),
        ({"calibration": (*CALIBRATION, LABELS)}, "reading failed|ndarray, the model has several inputs"),
        (
            {"calibration": CALIBRATION[::-1]},
            r"shape 12x5 \(float32\) as input 1; the model takes \(n, 3, 4, 6\), \(n, 5\)",
        ),
        ({"calibration": (CALIBRATION[0].transpose(0, 2, 3, 1), CALIBRATION[1])}, "12x4x6x3 .* as input 1; the model"),
        ({"calibration": (CALIBRATION[0][0], CALIBRATION[1][0])}, r"shape 3x4x6 \(float32\) as input 1; the model"),
        (
            {"calibration": ((CALIBRATION[0] * 9).astype("uint8"), CALIBRATION[1])},
            r"\(uint8\) as input 1; several inputs are float32, taken as they are",
        ),
        (
            {"calibration": (CALIBRATION[0], CALIBRATION[1][:5])},
            "calibration has 12, 5 images in its inputs; give as many",
        ),
        ({"calibration": (CALIBRATION[0][:0], CALIBRATION[1][:0])}, "calibration is empty; give"),
        ({"calibration": []}, "calibration of in memory: empty; give"),
        ({"selection": SELECTION}, "selection images: ndarray, the model has several inputs; give a tuple of arrays"),
        ({"selection": (SELECTION[0], LABELS)}, "selection images: ndarray, the model has several inputs"),
        ({"selection": [(SELECTION[0], LABELS)]}, "selection images: ndarray, the model has several inputs"),
        ({"selection": [((*SELECTION, LABELS), LABELS)]}, "selection images: tuple of 3, the model has several inputs"),
        ({"selection": (SELECTION, LABELS[:5])}, "selection has 12 images but targets of shape 5; give one"),
        ({"evaluation": ((EVALUATION[0], bad), LABELS)}, "1 evaluation images hold NaN or Inf, the first is number 3;"),
        ({"evaluation": ((EVALUATION[0], bad * 1e300), LABELS)}, "evaluation images hold NaN or Inf"),
    ],
)
def test_what_is_wrong_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        loaded(**changes)
    assert "\n" not in str(error.value) and "; " in str(error.value)


def test_sources_for_one_input_are_refused(tmp_path: Path) -> None:
    for split in ("calibration", "selection", "evaluation"):
        (tmp_path / "folder" / split).mkdir(parents=True)
    old = tmp_path / "old.npz"
    np.savez(old, calibration_x=CALIBRATION[0])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            tmp_path / "folder",
            {},
            r"has images for one input, the model takes \(n, 3, 4, 6\), \(n, 5\); give a function",
        ),
        (None, {}, r"the bundled images are 3x32x32, the model takes \(n, 3, 4, 6\), \(n, 5\); give --data"),
        (
            old,
            {},
            "has no array 'calibration_x_1'; it needs calibration_x_1, calibration_x_2, selection_x_1, selection_x_2,",
        ),
        (mapping(), {"mean": [0.5]}, "--mean and --std are for models of one input; normalise"),
        (mapping(), {"std": [0.5]}, "--mean and --std are for models of one input; normalise"),
        (written(tmp_path / "a.npz", evaluation_x_2=LABELS), {}, r"shape 12 \(int64\) as input 2; the model takes"),
        (written(tmp_path / "b.npz", selection_x_2=SELECTION[1][:3]), {}, "selection has 12, 3 images in its inputs;"),
    ]
    for source, more, message in cases:
        with pytest.raises(UserError, match=message) as error:
            load_data(source, input_shape=SHAPES, **more)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((SELECTION[0], LABELS), r"epoch 1, batch 1\) images: ndarray, the model has several inputs; give a tuple"),
        (
            (SELECTION[::-1], LABELS),
            r"epoch 1, batch 1\) images have shape 12x5 \(float32\) as input 1; the model takes",
        ),
        ((SELECTION, LABELS + 1), r"labels run from 1 to 3; give"),
        (((EVALUATION[0], bad), LABELS), "1 training .* images hold NaN"),
    ],
)
def test_training_batches_that_are_wrong(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_training([batch], input_shape=SHAPES, classes=3)
    assert "\n" not in str(error.value) and "; " in str(error.value)
