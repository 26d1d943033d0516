"""The images: calibration (unlabelled), selection (the search looks at it) and evaluation (it does not).

Everything ends as float32 NCHW arrays and int64 labels in memory, checked before any long work starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank import example
from tvm_lowrank.data.imagefolder import SPLITS, read_folder
from tvm_lowrank.data.reference import absolute, is_reference, load_object, summary
from tvm_lowrank.errors import UserError

Labelled = tuple[np.ndarray, np.ndarray]
Stats = Sequence[float] | None

IN_MEMORY = "in memory"
NPZ_KEYS = ("calibration_x", "selection_x", "selection_y", "evaluation_x", "evaluation_y")


@dataclass(frozen=True, eq=False)
class Splits:
    """Images are float32 (n, C, H, W), labels int64 (n,); ``name`` is the source, valid from any folder."""

    calibration: np.ndarray
    selection: Labelled
    evaluation: Labelled
    name: str


def load_data(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    input_shape: tuple[int, int, int],
    mean: Stats = None,
    std: Stats = None,
    classes: int | None = None,
) -> Splits:
    """Read and check the three splits.

    Parameters
    ----------
    source
        - ``file.py:factory`` or ``pkg.module:factory``: a function without arguments that returns a mapping (or such a
          mapping itself) with ``calibration``: images, and ``selection`` and ``evaluation``: pairs (images, labels).
          Each is an array, a tensor, or an iterable of batches; a labelled split may also be an iterable of
          (images, labels) batches, such as a DataLoader.
        - ``file.npz`` with the arrays ``NPZ_KEYS``.
        - ``folder/`` in ImageFolder layout: ``calibration/`` (flat or one folder per class), ``selection/`` and
          ``evaluation/`` with one folder per class; labels follow the sorted names. Images are scaled so that they
          cover 256/224 of the input size and cut from the middle, unless they have the input size already.
        - None or ``"example"``: the images that come with the package.
    input_shape
        (C, H, W) of the model.
    mean, std
        Per channel (or one for all), on the scale 0 to 1, for images that are uint8 NHWC (and for folders); the
        default is 0 and 1. Float images are NCHW and taken as they are.
    classes
        Number of the model's outputs, if known: labels must be smaller.

    Raises
    ------
    UserError
        If anything is missing, has the wrong shape or type, or is not finite.
    """
    scale = scale_of(mean, std, input_shape[0])
    if isinstance(source, Mapping):
        return _from_mapping(source, IN_MEMORY, input_shape, scale, classes)
    if source is None or str(source) == example.NAME:
        if input_shape != example.INPUT_SHAPE[1:]:
            raise UserError(f"the bundled images are 3x32x32, the model takes {_x(input_shape)}; give --data")
        return _from_mapping(example.data(), example.NAME, input_shape, scale, classes)
    text, path = str(source), Path(source)
    if path.is_dir():
        read: dict[str, Any] = read_folder(path, input_shape=input_shape, classes=classes)
        read["calibration"] = read["calibration"][0]
        return _from_mapping(read, str(path.resolve()), input_shape, scale, classes)
    if path.suffix == ".npz":
        return _from_mapping(_read_npz(path), str(path.resolve()), input_shape, scale, classes)
    if is_reference(text):
        return _from_mapping(_call(load_object(text), text), absolute(text), input_shape, scale, classes)
    if not path.exists():
        raise UserError(f"no such data: {text}; give file.py:factory, file.npz or a folder")
    raise UserError(f"cannot read data from {text}; give file.py:factory, file.npz or a folder")


def overlaps(splits: Splits) -> list[str]:
    """One message for each pair of splits that share images (bit for bit), with their number."""
    hashes = {
        "calibration": _hashes(splits.calibration),
        "selection": _hashes(splits.selection[0]),
        "evaluation": _hashes(splits.evaluation[0]),
    }
    consequence = {
        "evaluation": "the measured accuracy is not that of unseen images",
        "selection": "the search will believe its choices to be better than they are",
    }
    messages = []
    for later, earlier in (("evaluation", "calibration"), ("evaluation", "selection"), ("selection", "calibration")):
        known = set(hashes[earlier])
        shared = sum(digest in known for digest in hashes[later])
        if shared:
            count = f"{shared} of {len(hashes[later])} {later} images"
            messages.append(f"{count} also appear in {earlier}; {consequence[later]}")
    return messages


def fingerprint(labelled: Labelled) -> str:
    """SHA-256 of the images and labels, to tell whether two splits are the same."""
    digest = hashlib.sha256()
    for array in labelled:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation, (C, 1, 1) or scalar, float32."""

    mean: np.ndarray | np.float32
    std: np.ndarray | np.float32

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, C) to float32 (n, C, H, W)."""
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype="float32")
        images /= 255
        images -= self.mean
        images /= self.std
        return images


def scale_of(mean: Stats, std: Stats, channels: int) -> Scale | None:
    """None if neither is given: float images need no scale, and a given one must not be ignored."""
    if mean is None and std is None:
        return None
    arrays = []
    for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        array = np.asarray([default] if values is None else values, dtype="float32").reshape(-1, 1, 1)
        if len(array) not in (1, channels):
            raise UserError(f"--{name} has {len(array)} values, the model {channels} channels; give one per channel")
        if not np.isfinite(array).all() or (name == "std" and (array <= 0).any()):
            raise UserError(f"--{name} {array.ravel().tolist()} is not usable; give finite numbers, std above 0")
        arrays.append(array)
    return Scale(*arrays)


def _call(factory: object, text: str) -> Mapping[str, Any]:
    if callable(factory):
        try:
            factory = factory()
        except (Exception, SystemExit) as error:
            raise UserError(f"data {text} failed: {summary(error)}; correct the function") from error
    if not isinstance(factory, Mapping):
        kind = type(factory).__name__
        raise UserError(f"data {text} gave {kind}; return a mapping with calibration, selection and evaluation")
    return factory


def _from_mapping(
    mapping: Mapping[str, Any], name: str, shape: tuple[int, int, int], scale: Scale | None, classes: int | None
) -> Splits:
    for key in SPLITS:
        if key not in mapping:
            found = ", ".join(map(str, mapping)) or "nothing"
            raise UserError(f"data {name} has no {key!r}, it has {found}; it needs {', '.join(SPLITS)}")
    return Splits(
        checked_images(_unlabelled(mapping["calibration"], f"calibration of {name}"), "calibration", shape, scale),
        _pair(mapping["selection"], "selection", shape, scale, classes),
        _pair(mapping["evaluation"], "evaluation", shape, scale, classes),
        name,
    )


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [key for key in NPZ_KEYS if key not in stored]
            if missing:
                raise UserError(f"{path} has no array {missing[0]!r}; it needs {', '.join(NPZ_KEYS)}")
            arrays = {key: stored[key] for key in NPZ_KEYS}
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; give a .npz file with {', '.join(NPZ_KEYS)}") from error
    except UserError:
        raise
    # numpy, zipfile, zlib and struct have exceptions of their own for damaged files
    except Exception as error:
        raise UserError(f"cannot read {path}: {summary(error)}; write it again with numpy.savez") from error
    return {
        "calibration": arrays["calibration_x"],
        "selection": (arrays["selection_x"], arrays["selection_y"]),
        "evaluation": (arrays["evaluation_x"], arrays["evaluation_y"]),
    }


def _items(value: Any) -> Iterable[Any] | None:
    """What to iterate over, or None for what is not a collection of arrays."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    if hasattr(value, "__iter__"):
        return iter(value)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        # a torch Dataset; iterating over it directly would rely on an IndexError at its end
        return (value[i] for i in range(len(value)))
    return None


def _each(items: Iterable[Any], what: str, convert: Callable[[Any], Any]) -> list[Any]:
    """Convert the items of an iterable of the user's, whose code may fail anywhere."""
    try:
        return [convert(item) for item in items]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: reading failed: {summary(error)}; correct the data source") from error


def as_array(value: Any, dims: int, what: str) -> np.ndarray:
    """An array, a tensor, or an iterable of batches (``dims`` axes) or items (``dims - 1`` axes) as one array."""
    if callable(getattr(value, "detach", None)):
        value = value.detach().cpu()
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__") or isinstance(value, (int, float)):
        return np.asarray(value)
    items = _items(value)
    if items is None:
        raise UserError(f"{what}: {type(value).__name__} is no array; give an array, a tensor or batches of them")
    return _join(_each(items, what, lambda item: as_array(item, dims, what)), dims, what)


def _join(parts: list[np.ndarray], dims: int, what: str) -> np.ndarray:
    if not parts:
        raise UserError(f"{what}: empty; give at least one image")
    try:
        return np.concatenate(parts) if parts[0].ndim == dims else np.stack(parts)
    except ValueError as error:
        raise UserError(f"{what}: batches do not fit together: {error}; all images need one shape") from error


def is_batch(item: Any) -> bool:
    """Whether an item is an (images, labels) pair rather than a list of two arrays."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return False
    return getattr(item[0], "ndim", 0) > getattr(item[1], "ndim", 0)


def _unlabelled(value: Any, what: str) -> np.ndarray:
    """Images, from an array or from batches; labels that come with the batches are dropped."""
    items = None if hasattr(value, "__array__") else _items(value)
    if items is None:
        return as_array(value, 4, what)
    return _join(_each(items, what, lambda item: as_array(item[0] if is_batch(item) else item, 4, what)), 4, what)


def _pair(value: Any, split: str, shape: tuple[int, int, int], scale: Scale | None, classes: int | None) -> Labelled:
    x_name, y_name = f"{split} images", f"{split} labels"
    if isinstance(value, (tuple, list)) and len(value) == 2 and not is_batch(value[0]):
        images, labels = as_array(value[0], 4, x_name), as_array(value[1], 1, y_name)
    else:
        items = None if hasattr(value, "__array__") else _items(value)
        batches = [] if items is None else _each(items, split, lambda item: item)
        if items is None or not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in batches):
            raise UserError(f"{split} is {type(value).__name__}; give a pair (images, labels) or batches of such pairs")
        images = _join([as_array(x, 4, x_name) for x, _ in batches], 4, x_name)
        labels = _join([as_array(y, 1, y_name) for _, y in batches], 1, y_name)
    return checked_images(images, split, shape, scale), checked_labels(labels, split, len(images), classes)


def checked_images(array: np.ndarray, split: str, shape: tuple[int, int, int], scale: Scale | None) -> np.ndarray:
    channels, height, width = shape
    pixels = array.dtype == np.uint8
    expected = (height, width, channels) if pixels else shape
    layout = "uint8 NHWC" if pixels else "float NCHW"
    if array.ndim != 4 or array.shape[1:] != expected:
        raise UserError(
            f"{split} images have shape {_x(array.shape)} ({array.dtype}); the model takes {layout} n x {_x(expected)}"
        )
    if not len(array):
        raise UserError(f"{split} is empty; give at least one image")
    if pixels:
        return (scale or Scale(np.float32(0), np.float32(1)))(array)
    if array.dtype.kind != "f":
        raise UserError(f"{split} images are {array.dtype}; give uint8 NHWC or float NCHW")
    if scale is not None:
        raise UserError(
            f"{split} images are {array.dtype}, mean and std apply to uint8; normalise them or leave both out"
        )
    with np.errstate(over="ignore"):  # what does not fit becomes Inf and is reported below
        images = np.ascontiguousarray(array, dtype="float32")
    bad = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        raise UserError(f"{len(bad)} {split} images hold NaN or Inf, the first is number {bad[0]}; remove them")
    return images


def checked_labels(array: np.ndarray, split: str, count: int, classes: int | None) -> np.ndarray:
    if array.shape != (count,):
        raise UserError(f"{split} has {count} images but labels of shape {_x(array.shape)}; give one label per image")
    if array.dtype.kind not in "iu":
        raise UserError(f"{split} labels are {array.dtype}; give integers that count classes from 0")
    low, high = int(array.min()), int(array.max())
    if low < 0 or (classes is not None and high >= classes):
        limit = "" if classes is None else f" to {classes - 1}, the model's last output"
        raise UserError(f"{split} labels run from {low} to {high}; give classes from 0{limit}")
    return array.astype("int64")


def _hashes(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
