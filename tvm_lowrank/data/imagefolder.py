"""Image files in ImageFolder layout as uint8 arrays, prepared as for the usual ImageNet evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tvm_lowrank.console import track
from tvm_lowrank.data.reference import summary
from tvm_lowrank.errors import UserError

SPLITS = ("calibration", "selection", "evaluation")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"))
# ImageNet's usual evaluation: scale to 256, then cut 224 from the middle
RESIZE = 256 / 224
# a pixel as uint8 here, and as float32 when it is normalised
BYTES_PER_VALUE = 5


def read_folder(root: Path, *, input_shape: tuple[int, int, int], classes: int | None = None) -> dict[str, tuple]:
    """The three splits of a folder: for each its images, uint8 (n, H, W, C), and labels, int64 (n,).

    ``selection/`` and ``evaluation/`` have one folder per class, and labels count these in sorted order;
    ``calibration/`` may be flat, its labels are all 0. Hidden files and files that are not images are ignored.

    Raises
    ------
    UserError
        If a folder is missing or empty, the classes differ, an image cannot be read, or memory does not suffice.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split!r}; it needs {', '.join(SPLITS)}")
    if input_shape[0] not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, the model takes {input_shape[0]}; use --data file.py:factory"
        )
    names, others = (_class_names(root / split) for split in SPLITS[1:])
    if names != others:
        odd = min(set(names) ^ set(others))
        raise UserError(
            f"{root}: class folder {odd!r} is in only one of selection and evaluation; make the lists equal"
        )
    if classes is not None and len(names) != classes:
        raise UserError(
            f"{root} has {len(names)} class folders, the model {classes} outputs; give one folder per class"
        )
    files = {"calibration": [(path, 0) for path in _image_files(root / "calibration")]}
    for split in SPLITS[1:]:
        files[split] = [(path, i) for i, name in enumerate(names) for path in _image_files(root / split / name)]
    for split, listed in files.items():
        if not listed:
            raise UserError(f"{root / split} holds no images; put {', '.join(sorted(SUFFIXES))} files there")
    needed = BYTES_PER_VALUE * sum(map(len, files.values())) * int(np.prod(input_shape))
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"the images of {root} need {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; use fewer images"
        )
    return {
        split: (
            np.stack([read_image(path, input_shape) for path, _ in track(listed, f"reading {split}")]),
            np.array([label for _, label in listed], "int64"),
        )
        for split, listed in files.items()
    }


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


def _image_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))
