"""The arrays of a `.npz` file, of which those larger than memory are left in files."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile

from tvm_lowrank.console import progress
from tvm_lowrank.data import images
from tvm_lowrank.data.form import Form
from tvm_lowrank.data.imagefolder import SPLITS
from tvm_lowrank.data.images import CHUNK, Filed, Raw, Spool
from tvm_lowrank.data.parts import Targets
from tvm_lowrank.data.several import joined
from tvm_lowrank.data.targets import none_for
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import summary

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
LOCAL_HEADER = 30  # bytes before the name of a file in an archive; the last four are the lengths of what follows


def read_npz(
    path: Path, form: Form, folder: Path | None, *, labelled: bool = True
) -> tuple[Raw, tuple[Raw, Targets], tuple[Raw, Targets]]:
    """Calibration images, and selection and evaluation images with targets, of a file with the arrays of `names`.

    What is compressed and too large for memory goes to a file in ``folder``. If no targets are needed there may be
    none.

    Raises
    ------
    UserError
        If the file cannot be read, an array is missing, images have not the form, or there is no room for them.
    """
    wanted = names(form)
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [key for key in wanted if key not in stored and (labelled or not key.endswith("_y"))]
            if missing:
                raise UserError(f"{path} has no array {missing[0]!r}; it needs {', '.join(wanted)}")
            calibration, selection, evaluation = (_images(path, stored, split, form, folder) for split in SPLITS)
            if not labelled:
                return calibration, (selection, none_for(len(selection))), (evaluation, none_for(len(evaluation)))
            return calibration, (selection, stored["selection_y"]), (evaluation, stored["evaluation_y"])
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; give a .npz file with {', '.join(wanted)}") from error
    except UserError:
        raise
    # numpy, zipfile, zlib and struct have exceptions of their own for damaged files
    except Exception as error:
        raise UserError(f"cannot read {path}: {summary(error)}; write it again with numpy.savez") from error


def names(form: Form) -> list[str]:
    """What the arrays are called: the images of several inputs `calibration_x_1`, `calibration_x_2` and so on."""
    numbers = [""] if form.inputs is None else [f"_{number}" for number in range(1, 1 + len(form.inputs.shapes))]
    axes = {split: [f"x{number}" for number in numbers] + ["y"] * (split != "calibration") for split in SPLITS}
    return [f"{split}_{axis}" for split, own in axes.items() for axis in own]


def _images(path: Path, stored: NpzFile, split: str, form: Form, folder: Path | None) -> Raw:
    """The images of a split."""
    arrays = [name for name in names(form) if name.startswith(f"{split}_x")]
    if form.inputs is None:
        return _array(path, stored, arrays[0], split, form.check, folder)
    parts = [
        _array(path, stored, name, split, partial(form.check_input, number), folder)
        for number, name in enumerate(arrays)
    ]
    return joined(parts, split, form)


def _array(
    path: Path,
    stored: NpzFile,
    name: str,
    split: str,
    check: Callable[[tuple[int, ...], np.dtype, str], None],
    folder: Path | None,
) -> Raw:
    """An array of images: in memory, in a file, or where it is if it is not compressed."""
    assert stored.zip is not None  # it is open
    member = stored.zip.getinfo(f"{name}.npy")
    with stored.zip.open(member) as file:
        shape, in_columns, dtype = HEADERS[npy.read_magic(file)](file)
        check(shape, dtype, split)
        size = dtype.itemsize * math.prod(shape[1:])
        if in_columns or shape[0] * size <= images.IN_MEMORY:
            return stored[name]
        as_is = member.compress_type == zipfile.ZIP_STORED
        place = file.tell()
        spool, at_once = Spool(folder, f"{split} images"), max(1, CHUNK // size)
        with progress(f"reading {split} images", shape[0]) as advance:
            for start in range(0, shape[0], at_once):
                count = min(at_once, shape[0] - start)
                batch = np.frombuffer(file.read(count * size), dtype).reshape(count, *shape[1:])
                if not as_is:
                    spool.add(batch)
                advance(count)
        if file.read(1):  # at the end the sum of all bytes is checked
            raise ValueError(f"{member.filename} is longer than it says")
    return Filed(path.open("rb"), shape, dtype, place + _start(path, member)) if as_is else spool.read()


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the content of a file in an archive begins."""
    with path.open("rb") as archive:
        archive.seek(member.header_offset)
        header = archive.read(LOCAL_HEADER)
    return member.header_offset + LOCAL_HEADER + sum(np.frombuffer(header[-4:], "<u2").tolist())
