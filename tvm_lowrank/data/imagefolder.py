"""Image files in ImageFolder layout as uint8 arrays, prepared as for the usual ImageNet evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tvm_lowrank.data.form import Form
from tvm_lowrank.data.targets import none_for
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import summary

SPLITS = ("calibration", "selection", "evaluation")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"))
# ImageNet's usual evaluation: scale to 256, then cut 224 from the middle
RESIZE = 256 / 224
KEPT = 2**29  # bytes of decoded images, of all splits together; others are decoded whenever they are asked for
THREADS = 8  # at most; decoders leave Python's lock alone


@dataclass(frozen=True, eq=False)
class Files:
    """Image files as uint8 (n, H, W, C) for a model that takes (C, H, W), each decoded when it is asked for.

    A file that cannot be read is a UserError then. ``kept`` are decoded ones, the first that came; several splits may
    have it in common.
    """

    paths: Sequence[Path]
    input_shape: tuple[int, int, int]
    kept: dict[Path, np.ndarray]
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        channels, height, width = self.input_shape
        return (len(self.paths), height, width, channels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, picked: slice | np.ndarray, /) -> np.ndarray:
        paths = [self.paths[number] for number in np.arange(len(self))[picked].tolist()]
        known = {path: self.kept[path] for path in paths if path in self.kept}
        wanted = [path for path in dict.fromkeys(paths) if path not in known]
        if wanted:
            # threads of one batch only: they would be missing in a process that is forked
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                decoded = dict(zip(wanted, pool.map(self._read, wanted), strict=True))
            known |= decoded
            room = max(0, KEPT // int(np.prod(self.input_shape)) - len(self.kept))
            self.kept.update(list(decoded.items())[:room])
        images = np.empty((len(paths), *self.shape[1:]), np.uint8)
        for own, path in zip(images, paths, strict=True):
            own[...] = known[path]
        return images

    def _read(self, path: Path) -> np.ndarray:
        return read_image(path, self.input_shape)


def read_folder(
    root: Path, form: Form, *, labelled: bool = True
) -> tuple[Files, tuple[Files, np.ndarray], tuple[Files, np.ndarray]]:
    """Calibration images, and selection and evaluation images with labels, int64 (n,), of a folder.

    ``selection/`` and ``evaluation/`` have one folder per class, and labels count these in sorted order;
    ``calibration/`` may be flat, as all may if no labels are needed. Hidden files and files that are not images are
    ignored.

    Raises
    ------
    UserError
        If a folder is missing or empty, or the classes differ.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split!r}; it needs {', '.join(SPLITS)}")
    if form.shape[0] not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, the model takes {form.shape[0]}; use --data file.py:factory"
        )
    kept: dict[Path, np.ndarray] = {}
    if not labelled:
        every, *others = (Files(_some(root / split), form.shape, kept) for split in SPLITS)
        chosen, judged = ((own, none_for(len(own))) for own in others)
        return every, chosen, judged
    names, also = (_class_names(root / split) for split in SPLITS[1:])
    if names != also:
        odd = min(set(names) ^ set(also))
        raise UserError(
            f"{root}: class folder {odd!r} is in only one of selection and evaluation; make the lists equal"
        )
    if form.classes is not None and len(names) != form.classes:
        raise UserError(
            f"{root} has {len(names)} class folders, the model {form.classes} outputs; give one folder per class"
        )
    files = {"calibration": [(path, 0) for path in _some(root / "calibration")]}
    for split in SPLITS[1:]:
        files[split] = [(path, i) for i, name in enumerate(names) for path in _image_files(root / split / name)]
    for split, listed in files.items():
        if not listed:
            raise _empty(root / split)
    images = {split: Files([path for path, _ in listed], form.shape, kept) for split, listed in files.items()}
    labels = {split: np.array([label for _, label in listed], "int64") for split, listed in files.items()}
    calibration, selection, evaluation = SPLITS
    return images[calibration], (images[selection], labels[selection]), (images[evaluation], labels[evaluation])


def read_image(path: Path, input_shape: tuple[int, int, int]) -> np.ndarray:
    """One file as uint8 (H, W, C): scaled to cover 256/224 of the size and cut from the middle, unless it fits as is.

    Raises
    ------
    UserError
        If the file cannot be read.
    """
    channels, height, width = input_shape
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    # Pillow's decoders raise all kinds of exceptions on broken files
    except Exception as error:
        raise UserError(f"cannot read image {path}: {summary(error)}; replace or remove it") from error
    if image.size != (width, height):
        factor = RESIZE * max(width / image.width, height / image.height)
        resized = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        image = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels)


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _some(folder: Path) -> list[Path]:
    """The image files of a folder; UserError if there are none."""
    found = _image_files(folder)
    if not found:
        raise _empty(folder)
    return found


def _empty(folder: Path) -> UserError:
    return UserError(f"{folder} holds no images; put {', '.join(sorted(SUFFIXES))} files there")


def _image_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))
