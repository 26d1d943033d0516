from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tvm_lowrank import example
from tvm_lowrank.data.splits import fingerprint, load_data, overlaps
from tvm_lowrank.errors import UserError

SHAPE = (3, 8, 8)
rng = np.random.default_rng(0)


def images(n: int) -> np.ndarray:
    return rng.normal(size=(n, *SHAPE)).astype("float32")


def pixels(n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, 8, 8, 3), dtype="uint8")


def mapping(**changes: object) -> dict[str, object]:
    splits = {"calibration": images(5), "selection": (images(4), np.arange(4)), "evaluation": (images(3), np.arange(3))}
    return {**splits, **changes}


def arrays(**changes: object) -> dict[str, object]:
    y = np.array([0, 1, 2])
    return {
        "calibration_x": pixels(4),
        "selection_x": pixels(3),
        "selection_y": y,
        "evaluation_x": pixels(3),
        "evaluation_y": y,
        **changes,
    }


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "; " in text, text
    return text


# sources


def test_example_is_the_default() -> None:
    splits = load_data(input_shape=(3, 32, 32), classes=10)
    assert [len(splits.calibration), len(splits.selection[0]), len(splits.evaluation[0])] == [1000, 1000, 2000]
    assert splits.name == "example"
    assert overlaps(splits) == []
    again = load_data(splits.name, input_shape=(3, 32, 32))
    assert fingerprint(again) == fingerprint(splits)
    expected = example.data()["evaluation"]
    np.testing.assert_array_equal(splits.evaluation[0][:], expected[0])


def test_example_does_not_fit_other_models() -> None:
    with pytest.raises(UserError, match="3x32x32, the model takes 3x224x224"):
        load_data(input_shape=(3, 224, 224))


def test_every_form_of_a_labelled_split_gives_the_same() -> None:
    x, y = images(6), np.arange(6)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    forms = [
        (x, y),
        [x, y.astype("uint8")],
        (x.astype("float64"), y.tolist()),
        (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)),
        ([x[:4], x[4:]], [y[:4], y[4:]]),
        ((image for image in x), (int(label) for label in y)),
        batches,
        iter(batches),
        [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in batches],
        torch.utils.data.DataLoader(dataset, batch_size=4),
        dataset,
    ]
    for form in forms:
        splits = load_data(mapping(selection=form), input_shape=SHAPE)
        got_x, got_y = splits.selection[0][:], splits.selection[1]
        assert (got_x.dtype, got_y.dtype) == (np.float32, np.int64)
        assert got_x.flags.c_contiguous
        np.testing.assert_array_equal(got_x, x)
        np.testing.assert_array_equal(got_y, y)


def test_calibration_may_be_batches_with_or_without_labels() -> None:
    x = images(6)
    labelled = [[torch.from_numpy(x[:4]), torch.zeros(4)], [torch.from_numpy(x[4:]), torch.zeros(2)]]
    for form in (x, [x[:4], x[4:]], [x[:3], x[3:]], list(x), labelled, torch.from_numpy(x)):
        np.testing.assert_array_equal(load_data(mapping(calibration=form), input_shape=SHAPE).calibration[:], x)


def test_factory_in_a_file_finds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_numbers.py").write_text("COUNT = 2\n")
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\nfrom my_numbers import COUNT\n"
        "def factory():\n    x = np.zeros((COUNT, 3, 8, 8))\n    y = np.arange(COUNT)\n"
        "    return {'calibration': x, 'selection': (x, y), 'evaluation': (x, y)}\n"
    )
    monkeypatch.chdir(tmp_path)
    for source in ("my_data.py:factory", "my_data:factory"):
        splits = load_data(source, input_shape=SHAPE)
        assert len(splits.evaluation[0]) == 2
        # the name must mean the same in another folder
        assert splits.name == (f"{tmp_path / 'my_data.py'}:factory" if ".py" in source else source)


@pytest.mark.parametrize("stats", [(None, None), ([0.5], [0.25]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), (None, [2.0])])
def test_npz_of_pixels(tmp_path: Path, stats: tuple[list[float] | None, list[float] | None]) -> None:
    stored = arrays()
    np.savez(tmp_path / "d.npz", **stored)  # type: ignore[arg-type]
    mean, std = stats
    splits = load_data(tmp_path / "d.npz", input_shape=SHAPE, mean=mean, std=std, classes=3)
    expected = (stored["evaluation_x"] / 255 - np.array(mean or 0)) / np.array(std or 1)  # type: ignore[operator]
    np.testing.assert_allclose(splits.evaluation[0][:], expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert splits.evaluation[0][:].dtype == np.float32
    assert splits.name == str(tmp_path / "d.npz")


def test_npz_of_floats(tmp_path: Path) -> None:
    x = images(3).astype("float16")
    np.savez(tmp_path / "d.npz", **arrays(calibration_x=x, selection_x=x, evaluation_x=x))  # type: ignore[arg-type]
    np.testing.assert_array_equal(load_data(tmp_path / "d.npz", input_shape=SHAPE).calibration[:], x.astype("float32"))


def save(path: Path, size: tuple[int, int] = (12, 10), value: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    array = (
        rng.integers(0, 256, (height, width, 3), dtype="uint8") if value is None else np.full((height, width, 3), value)
    )
    Image.fromarray(array.astype("uint8")).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for split in ("selection", "evaluation"):
        for i, name in enumerate(("b_cat", "a_dog", "c_fox")):
            for j in range(2):
                save(root / split / name / f"{j}.png", value=50 * i + 1)
    for i in range(3):
        save(root / "calibration" / f"{i}.JPEG")
    (root / "selection" / "notes.txt").write_text("not an image")
    (root / "selection" / "a_dog" / ".hidden.png").write_text("not an image")
    return root


def test_folder_labels_follow_the_sorted_names(folder: Path) -> None:
    splits = load_data(folder, input_shape=SHAPE, classes=3)
    x, y = splits.selection
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(x[:][:, 0, 0, 0] * 255, [51, 51, 1, 1, 101, 101], atol=1e-3)
    assert splits.calibration.shape == (3, 3, 8, 8)
    assert splits.name == str(folder)


def test_folder_calibration_per_class_and_grey(folder: Path) -> None:
    save(folder / "calibration" / "x" / "deep.png")
    assert load_data(folder, input_shape=SHAPE).calibration.shape == (4, 3, 8, 8)
    assert load_data(folder, input_shape=(1, 8, 8)).calibration.shape == (4, 1, 8, 8)


def test_folder_scales_and_cuts_as_for_imagenet(tmp_path: Path, folder: Path) -> None:
    size = (300, 260)
    save(folder / "evaluation" / "a_dog" / "0.png", size)
    pixels = Image.open(folder / "evaluation" / "a_dog" / "0.png")
    scaled = pixels.resize((round(300 * 256 / 260), 256), Image.Resampling.BILINEAR)
    left = round((scaled.width - 224) / 2)
    expected = np.asarray(scaled.crop((left, 16, left + 224, 240)))
    got = load_data(folder, input_shape=(3, 224, 224)).evaluation[0][:1][0]
    np.testing.assert_allclose(got.transpose(1, 2, 0) * 255, expected, atol=1e-3)


def test_folder_leaves_images_of_the_right_size_alone(folder: Path) -> None:
    save(folder / "evaluation" / "a_dog" / "0.png", (8, 8))
    expected = np.asarray(Image.open(folder / "evaluation" / "a_dog" / "0.png"))
    got = load_data(folder, input_shape=SHAPE).evaluation[0][:1][0]
    np.testing.assert_allclose(got.transpose(1, 2, 0) * 255, expected, atol=1e-3)


def test_float_images_in_either_order() -> None:
    """As a network from TensorFlow takes them, and as this tool does."""
    first = images(3)
    last = np.ascontiguousarray(np.asarray(first).transpose(0, 2, 3, 1))
    got = [load_data(mapping(calibration=given), input_shape=SHAPE).calibration[:3] for given in (first, last)]
    np.testing.assert_array_equal(got[0], got[1])


# bad input

ONES = np.ones((3, *SHAPE), "float32")
BAD_SPLITS = {
    "missing key": ({"calibration": ONES}, "has no 'selection'"),
    "calibration of a wrong size": (mapping(calibration=np.ones((3, 3, 9, 8))), "3x3x9x8.*n x 3x8x8"),
    "wrong channels": (mapping(selection=(np.ones((3, 1, 8, 8)), np.arange(3))), "3x1x8x8"),
    "float NHWC of a wrong size": (mapping(calibration=np.ones((3, 9, 8, 3))), "float NCHW"),
    "uint8 NCHW": (mapping(calibration=np.ones((3, *SHAPE), "uint8")), "uint8 NHWC"),
    "integers": (mapping(calibration=np.ones((3, *SHAPE), "int32")), "int32"),
    "one image": (mapping(calibration=np.ones(SHAPE)), "have shape 3x8x8"),
    "no array": (mapping(calibration=None), "NoneType is no array"),
    "text": (mapping(calibration="images.npz"), "str is no array"),
    "NaN": (
        mapping(evaluation=(np.where(np.arange(3)[:, None, None, None] == 1, np.nan, ONES), [0, 1, 2])),
        "number 1",
    ),
    "Inf": (mapping(calibration=np.full((2, *SHAPE), 1e39)), "2 calibration images hold NaN or Inf"),
    "empty array": (mapping(selection=(np.ones((0, *SHAPE)), np.arange(0))), "selection is empty"),
    "empty list": (mapping(calibration=[]), "calibration.*empty"),
    "empty batches": (mapping(selection=[]), "selection.*empty"),
    "no labels": (mapping(selection=images(3)), "give a pair"),
    "batches without labels": (mapping(selection=[images(3), images(3), images(3)]), "give a pair"),
    "too few labels": (mapping(selection=(images(3), [0, 1])), "3 images but targets of shape 2"),
    "float labels": (mapping(selection=(images(3), [0.0, 1.0, 2.0])), "labels are float64"),
    "text labels": (mapping(selection=(images(3), np.array(["a", "b", "c"]))), "labels are <U1"),
    "label too high": (mapping(selection=(images(3), [0, 1, 7])), "labels run from 0 to 7"),
    "negative label": (mapping(evaluation=(images(3), [0, -1, 2])), "labels run from -1 to 2"),
    "ragged batches": (mapping(calibration=[np.ones((2, *SHAPE)), np.ones((2, 3, 9, 9))]), "do not fit together"),
    "failing iterator": (mapping(calibration=(1 / (i - 1) * ONES for i in range(3))), "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_bad_splits(case: str) -> None:
    splits, message = BAD_SPLITS[case]
    with pytest.raises(UserError, match=message) as error:
        load_data(splits, input_shape=SHAPE, classes=7)
    one_line(error)


def test_stats_that_would_be_ignored_or_do_not_fit() -> None:
    for mean, std, message in (
        ([0.5], None, "mean and std apply to uint8"),
        ([0.5, 0.5], None, "--mean has 2 values, the model 3 channels"),
        (None, [0.0], "std above 0"),
        ([float("nan")], None, "not usable"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_data(mapping(), input_shape=SHAPE, mean=mean, std=std)
        one_line(error)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def factory(): return 1 / 0", "failed: ZeroDivisionError.*bad.py:1"),
        ("def factory(): raise SystemExit(3)", "failed: SystemExit"),
        ("def factory(): return [1, 2]", "gave list; return a mapping"),
        ("factory = 3", "gave int; return a mapping"),
        ("other = 3", "has no 'factory'; it defines other"),
        ("import no_such_module_at_all", "cannot import .*no_such_module_at_all"),
        ("def factory(:", "cannot import .*SyntaxError"),
    ],
)
def test_bad_factories(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        load_data(f"{tmp_path}/bad.py:factory", input_shape=SHAPE)
    one_line(error)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:factory", "no such file: nowhere.py"),
        ("no_such_package.data:factory", "no module named 'no_such_package'"),
        ("nowhere.npz", "no such file: nowhere.npz"),
        ("nowhere", "no such data: nowhere"),
        ("pyproject.toml", "no such data|cannot read data from pyproject.toml"),
    ],
)
def test_bad_sources(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_data(source, input_shape=SHAPE)
    one_line(error)


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    stored = arrays()
    del stored["evaluation_y"]
    np.savez(path, **stored)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no array 'evaluation_y'"):
        load_data(path, input_shape=SHAPE)
    np.savez(path, **arrays(selection_y=np.array([0, "x", None], dtype=object)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"cannot read {re.escape(str(path))}"):
        load_data(path, input_shape=SHAPE)
    np.savez_compressed(path, **arrays())  # type: ignore[arg-type]
    whole = path.read_bytes()
    damages = [whole[: len(whole) // 2], b"", b"text", whole[:60] + bytes(200) + whole[260:]]
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read") as error:
            load_data(path, input_shape=SHAPE)
        one_line(error)


def test_bad_folders(folder: Path) -> None:
    def fails(message: str, *, shape: tuple[int, int, int] = SHAPE, classes: int = 3) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_data(folder, input_shape=shape, classes=classes)
        one_line(error)

    fails("3 class folders, the model 10 outputs", classes=10)
    fails("the model takes 4", shape=(4, 8, 8))
    broken = folder / "evaluation" / "c_fox" / "1.png"
    content = broken.read_bytes()
    for damaged in (b"no picture", content[: len(content) // 2]):
        broken.write_bytes(damaged)
        fails(f"cannot read image {re.escape(str(broken))}")
    broken.write_bytes(content)
    (folder / "selection" / "d_gnu").mkdir()
    fails("class folder 'd_gnu' is in only one")
    (folder / "selection" / "d_gnu").rmdir()
    for path in (folder / "calibration").iterdir():
        path.unlink()
    fails("calibration holds no images")
    (folder / "calibration").rmdir()
    fails("has no folder 'calibration'")


# overlap


def test_overlaps_are_counted() -> None:
    shared = images(2)
    calibration, selection, evaluation = (np.concatenate([images(3), shared[:k]]) for k in (1, 2, 2))
    splits = load_data(
        mapping(calibration=calibration, selection=(selection, np.arange(5)), evaluation=(evaluation, np.arange(5))),
        input_shape=SHAPE,
    )
    messages = overlaps(splits)
    assert [message.split(";")[0] for message in messages] == [
        "1 of 5 evaluation images also appear in calibration",
        "2 of 5 evaluation images also appear in selection",
        "1 of 5 selection images also appear in calibration",
    ]


def test_fingerprint_sees_labels_and_images() -> None:
    x, y = images(3), np.arange(3)
    pairs = ((x, y), (x, y + 1), (x + 1, y), (x[:2], y[:2]))
    prints = {fingerprint(load_data(mapping(evaluation=pair), input_shape=SHAPE)) for pair in pairs}
    assert len(prints) == 4
