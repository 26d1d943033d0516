"""Images that are more than memory holds: they are the same as in memory, and little is in memory at a time."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from tvm_lowrank.bridge.calibrate import batches
from tvm_lowrank.data import imagefolder, images, npz, splits
from tvm_lowrank.data.form import Form, form_of
from tvm_lowrank.data.images import Filed, Images, Spool, Stored, part
from tvm_lowrank.data.splits import Splits, fingerprint, load_data, overlaps
from tvm_lowrank.errors import UserError

SHAPE = (3, 8, 8)
FORM = Form(SHAPE)
rng = np.random.default_rng(0)
FLOATS = rng.normal(size=(50, *SHAPE)).astype("float32")
PIXELS = rng.integers(0, 256, (50, 8, 8, 3), dtype="uint8")
LABELS = rng.integers(0, 3, 50)
FOLDERS = ("calibration", "selection/a", "selection/b", "evaluation/a", "evaluation/b")
# the bundled example's, as bundles of version 0.1 state it
EXAMPLE = "d866f76a314f885003de4ff1e31d12b64a425747c0446f2e01f17592a5b52e7d"
NUMBERS = np.array([7, 0, 49, 7])


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte is too much for memory, and everything is looked at in several parts."""
    monkeypatch.setattr(images, "IN_MEMORY", 1000)
    monkeypatch.setattr(images, "CHUNK", 7 * FLOATS[0].nbytes)
    monkeypatch.setattr(npz, "CHUNK", 3 * FLOATS[0].nbytes)


def loaded(x: object, folder: Path | None = None, y: np.ndarray = LABELS) -> Splits:
    """Data with these images in the evaluation split, and others in the other ones."""
    others = {"calibration": FLOATS[:2] + 100, "selection": (FLOATS[:2] + 200, LABELS[:2])}
    return load_data({**others, "evaluation": (x, y)}, input_shape=SHAPE, folder=folder)


def open_files(folder: Path) -> list[str]:
    """Files in a folder that this process has open, those without a name among them."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return [target for link in links if link.is_symlink() and str(folder) in (target := os.readlink(link))]


# the same as in memory


@pytest.mark.parametrize("stats", [(None, None), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])
def test_pixels_become_what_they_would_become_together(stats: tuple[list[float] | None, list[float] | None]) -> None:
    form = form_of(SHAPE, *stats, None)
    whole, stored = form.prepared(PIXELS), Stored(PIXELS, form)
    assert whole.shape == stored.shape == (50, *SHAPE) and len(stored) == 50
    for picked in (slice(3, 11), slice(None, None, 7), slice(40, None), slice(5, 5), NUMBERS):
        got = stored[picked]
        assert got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, whole[picked])
    np.testing.assert_array_equal(np.concatenate(list(images.chunks(stored))), whole)


def test_floats_are_kept_as_they_are(tmp_path: Path) -> None:
    FLOATS.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=FLOATS.shape)
    for raw in (FLOATS, FLOATS.astype("float16"), FLOATS.astype(">f8"), mapped, np.asfortranarray(FLOATS)):
        stored = loaded(raw).evaluation[0]
        assert isinstance(stored, Stored) and np.shares_memory(stored.raw, raw) and stored.raw.dtype == raw.dtype
        got = stored[NUMBERS]
        assert got.dtype == np.float32 and got.dtype.isnative and got.flags.c_contiguous and got.flags.writeable
        np.testing.assert_array_equal(got, raw[NUMBERS].astype("float32"))


@pytest.mark.parametrize("whole", [FLOATS, Stored(FLOATS, FORM)])
def test_a_part_reads_nothing_else(whole: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    some = part(whole, slice(10, 40))
    first = part(some, slice(5))
    monkeypatch.setattr(Form, "prepared", lambda self, raw: pytest.fail("read") if len(raw) > 5 else raw)
    assert some.shape == (30, *SHAPE) and len(first) == 5
    np.testing.assert_array_equal(first[:], FLOATS[10:15])
    np.testing.assert_array_equal(some[np.array([29, 0])], FLOATS[[39, 10]])
    np.testing.assert_array_equal(torch.cat([chunk for _, chunk in batches(some, 4)]), FLOATS[10:40])
    assert len(part(whole, slice(60, None))) == 0


def spooled(batches: list[np.ndarray], folder: Path) -> images.Raw:
    spool = Spool(folder, "images")
    for batch in batches:
        spool.add(batch)
    return spool.read()


@pytest.mark.parametrize("x", [FLOATS, FLOATS.astype("float64"), PIXELS])
@pytest.mark.parametrize("limit", [0, 2000, 2**20])
def test_a_spool_gives_what_it_got(x: np.ndarray, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IN_MEMORY", limit)
    raw = spooled([x[:7], x[7:7], x[7:8], x[8:]], tmp_path)
    assert isinstance(raw, np.ndarray if limit == 2**20 else Filed)
    expected = x.astype("uint8" if x.dtype == np.uint8 else "float32")
    assert raw.dtype == expected.dtype and raw.shape == expected.shape
    for picked in (slice(None), slice(5, 9), slice(None, None, -3), slice(60, None), NUMBERS):
        np.testing.assert_array_equal(raw[picked], expected[picked])


def test_a_spool_keeps_no_batch_of_the_source(tmp_path: Path) -> None:
    buffer, spool = np.zeros((1, *SHAPE), "float32"), Spool(tmp_path, "images")
    for value in (1, 2):
        buffer[:] = value
        spool.add(buffer)
    assert [image.mean() for image in spool.read()[:]] == [1, 2]


def shuffled(seen: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.random.default_rng(1).permutation(50)
    for some in np.array_split(order, 8):
        seen += some.tolist()
        yield FLOATS[some], LABELS[some]


def test_a_shuffled_generator_is_read_once(in_files: None, tmp_path: Path) -> None:
    seen: list[int] = []
    others = {"calibration": FLOATS[:2] + 100, "selection": (FLOATS[:2] + 200, LABELS[:2])}
    data = load_data({**others, "evaluation": shuffled(seen)}, input_shape=SHAPE, folder=tmp_path)
    x, y = data.evaluation
    assert sorted(seen) == list(range(50))
    for _ in range(2):
        np.testing.assert_array_equal(x[:], FLOATS[seen])
    np.testing.assert_array_equal(y, LABELS[seen])
    assert fingerprint(data) == fingerprint(loaded(FLOATS[seen], y=LABELS[seen]))


def test_loaders_and_datasets_go_into_a_file_that_goes_away(in_files: None, tmp_path: Path) -> None:
    dataset = TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS))
    for source in (dataset, DataLoader(dataset, batch_size=16)):
        data = load_data({"calibration": source, "selection": source, "evaluation": source}, input_shape=SHAPE)
        assert isinstance(data.evaluation[0], Stored) and isinstance(data.evaluation[0].raw, Filed)
        data = loaded(source[:][0] if source is dataset else [x for x, _ in source], tmp_path)
    assert len(open_files(tmp_path)) == 1 and not list(tmp_path.iterdir())  # no name: nothing is left by a kill
    np.testing.assert_array_equal(data.evaluation[0][NUMBERS], FORM.prepared(PIXELS[NUMBERS]))
    del data
    assert not open_files(tmp_path)


Save = Callable[..., None]


def written(path: Path, x: np.ndarray, *, save: Save = np.savez, **changes: np.ndarray) -> Path:
    arrays = {"calibration_x": x, "selection_x": x, "selection_y": LABELS, "evaluation_x": x, "evaluation_y": LABELS}
    save(path / "d.npz", **{**arrays, **changes})
    return path / "d.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("x", [PIXELS, FLOATS, FLOATS.astype(">f8"), np.asfortranarray(FLOATS)])
def test_large_arrays_of_npz_stay_in_files(x: np.ndarray, save: Save, in_files: None, tmp_path: Path) -> None:
    (tmp_path / "spools").mkdir()
    data = load_data(written(tmp_path, x, save=save), input_shape=SHAPE, folder=tmp_path / "spools")
    if x.flags.c_contiguous:
        assert isinstance(data.calibration, Stored) and isinstance(data.calibration.raw, Filed)
        assert len(open_files(tmp_path / "spools")) == (0 if save is np.savez else 3)
    for own in (data.calibration, data.selection[0], data.evaluation[0]):
        np.testing.assert_array_equal(own[:], FORM.prepared(x))
        np.testing.assert_array_equal(own[NUMBERS], FORM.prepared(x[NUMBERS]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_in_large_npz_is_found(save: Save, in_files: None, tmp_path: Path) -> None:
    path = written(tmp_path, PIXELS, save=save)
    whole = path.read_bytes()
    path.write_bytes(whole[:4000] + bytes([255 - whole[4000]]) + whole[4001:])
    with pytest.raises(UserError, match=r"cannot read .*d\.npz: .*; write it again"):
        load_data(path, input_shape=SHAPE)


def test_npz_of_a_wrong_form_is_not_read(in_files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, FLOATS, save=np.savez_compressed, calibration_x=PIXELS.transpose(0, 3, 1, 2))
    monkeypatch.setattr(Spool, "add", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="calibration images have shape 50x3x8x8"):
        load_data(path, input_shape=SHAPE)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    FLOATS.tofile(tmp_path / "x")
    raw = Filed((tmp_path / "x").open("rb"), FLOATS.shape, FLOATS.dtype)
    os.truncate(tmp_path / "x", FLOATS.nbytes // 2)
    with pytest.raises(UserError, match="cut off while it was used; "):
        raw[NUMBERS]


@pytest.mark.parametrize(("given", "remedy"), [(True, "make room there$"), (False, "make room there or set TMPDIR$")])
def test_a_full_disk_is_one_line(given: bool, remedy: str, in_files: None, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=rf"^cannot keep the evaluation images in .*: File too large; {remedy}"):
            loaded(iter(FLOATS), tmp_path if given else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for split, start in (
        ("calibration", 0),
        ("selection/a", 10),
        ("selection/b", 20),
        ("evaluation/a", 30),
        ("evaluation/b", 40),
    ):
        (root / split).mkdir(parents=True)
        for number in range(start, start + 10):
            Image.fromarray(PIXELS[number]).save(root / split / f"{number}.png")
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image was decoded."""
    counts: Counter[str] = Counter()
    read = imagefolder.read_image

    def counting(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
        counts[path.stem] += 1
        return read(path, shape)

    monkeypatch.setattr(imagefolder, "read_image", counting)
    return counts


def test_decoded_images_are_kept_as_long_as_there_is_room(
    folder: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefolder, "KEPT", 35 * PIXELS[0].nbytes)
    data = load_data(folder, input_shape=SHAPE)
    assert set(decoded.values()) == {1} and len(decoded) == 50
    for own, count in ((data.calibration, 10), (data.selection[0], 20), (data.evaluation[0], 20)):
        for _ in range(3):
            assert own[:].shape == (count, *SHAPE)
    # calibration and selection come first, five evaluation images had room as well
    assert [decoded[str(number)] for number in range(50)] == [1] * 35 + [4] * 15
    kept = data.calibration.raw.kept  # type: ignore[attr-defined]
    assert sum(image.nbytes for image in kept.values()) == 35 * PIXELS[0].nbytes
    np.testing.assert_array_equal(data.evaluation[0][:], FORM.prepared(PIXELS[30:]))
    np.testing.assert_array_equal(data.evaluation[0][np.array([19, 3, 19])], FORM.prepared(PIXELS[[49, 33, 49]]))


def test_a_batch_decodes_only_its_images(folder: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefolder, "KEPT", 0)
    data = load_data(folder, input_shape=SHAPE)
    decoded.clear()
    part(data.evaluation[0], slice(5))[:2]
    data.selection[0][np.array([0, 19, 0])]
    assert decoded == {"30": 1, "31": 1, "10": 1, "29": 1}


# the one look at everything


def test_the_fingerprint_is_that_of_the_arrays_in_memory(in_files: None, tmp_path: Path) -> None:
    prepared = FORM.prepared(PIXELS)
    digest = hashlib.sha256()
    for array in (prepared, LABELS.astype("int64")):
        digest.update(str(array.shape).encode())
        digest.update(array.data)
    for form in (PIXELS, prepared, iter(PIXELS), [prepared[:20], prepared[20:]]):
        assert fingerprint(loaded(form, tmp_path)) == digest.hexdigest()
    assert fingerprint(load_data(input_shape=(3, 32, 32))) == EXAMPLE


def test_each_image_is_looked_at_once(folder: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefolder, "KEPT", 0)
    data = load_data(folder, input_shape=SHAPE)
    assert overlaps(data) == [] and len(fingerprint(data)) == 64
    assert [digest.sha256 for digest in data.digests.values()] == [digest.sha256 for digest in data.digests.values()]
    assert set(decoded.values()) == {1}


def test_overlaps_are_found_however_images_are_stored(in_files: None, folder: Path, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[3]).save(folder / "evaluation" / "a" / "again.png")
    assert [message.split(";")[0] for message in overlaps(load_data(folder, input_shape=SHAPE))] == [
        "1 of 21 evaluation images also appear in calibration"
    ]
    data = load_data(
        {"calibration": iter(FLOATS[:20]), "selection": ([FLOATS[19:30]], LABELS[19:30]), "evaluation": shuffled([])},
        input_shape=SHAPE,
        folder=tmp_path,
    )
    assert [message.split(";")[0] for message in overlaps(data)] == [
        "20 of 50 evaluation images also appear in calibration",
        "11 of 50 evaluation images also appear in selection",
        "1 of 11 selection images also appear in calibration",
    ]


def test_numbers_of_bad_images_count_from_the_first(in_files: None, tmp_path: Path) -> None:
    x = FLOATS.copy()
    x[[23, 41], 1, 2, 3] = np.nan, np.inf
    with pytest.raises(UserError, match=r"^2 evaluation images hold NaN or Inf, the first is number 23; remove them"):
        loaded((x[i : i + 6] for i in range(0, 50, 6)), tmp_path)


def test_progress_counts_the_images(in_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        def __init__(self, description: str, total: int) -> None:
            bars.append(self)
            self.description, self.total, self.done = description, total, 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __call__(self, units: int) -> None:
            self.done += units

    bars: list[Bar] = []
    monkeypatch.setattr(splits, "progress", Bar)
    loaded(FLOATS)
    assert [(bar.description, bar.total, bar.done) for bar in bars] == [
        ("checking calibration images", 2, 2),
        ("checking selection images", 2, 2),
        ("checking evaluation images", 50, 50),
    ]


# memory

GROWN = """
import sys
from pathlib import Path
from tvm_lowrank.data import imagefolder, images
from tvm_lowrank.data.metric import evaluate, load_metric
from tvm_lowrank.data.splits import load_data, overlaps

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

images.IN_MEMORY = imagefolder.KEPT = 2**24
source, before = Path(sys.argv[1]), peak()
data = load_data(source, input_shape=(3, 224, 224), folder=source.parent)
assert overlaps(data) == []
scores = evaluate(lambda x: x.mean(axis=(2, 3)), *data.evaluation, load_metric("top1"))
print(len(scores), (peak() - before) // 1024)
"""
COUNT = 1700  # of 224x224, which are a gigabyte as float32


def grown(source: Path) -> float:
    """Megabytes that it takes to load, check and evaluate images."""
    done = subprocess.run([sys.executable, "-P", "-c", GROWN, source], capture_output=True, text=True, check=True)
    count, megabytes = map(int, done.stdout.split())
    assert count == COUNT
    return megabytes


def test_a_large_folder_takes_little_memory(tmp_path: Path) -> None:
    for number, name in enumerate(FOLDERS):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (224, 224), (60, 50 * number, 90)).save(tmp_path / "images" / name / "0.png")
        for other in range(1, COUNT // 2 if "evaluation" in name else 1):
            os.link(tmp_path / "images" / name / "0.png", tmp_path / "images" / name / f"{other}.png")
    assert grown(tmp_path / "images") < 250


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_takes_little_memory(save: Callable[..., None], tmp_path: Path) -> None:
    x, y = np.full((COUNT, 224, 224, 3), 7, "uint8"), np.zeros(COUNT, "int64")
    save(
        tmp_path / "d.npz",
        calibration_x=x[:1] + 1,
        selection_x=x[:1] + 2,
        selection_y=y[:1],
        evaluation_x=x,
        evaluation_y=y,
    )
    assert grown(tmp_path / "d.npz") < 250
