"""The images: calibration (unlabelled), selection (the search looks at it) and evaluation (it does not).

All are looked at once, before any long work starts; they may be more than memory holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank import example
from tvm_lowrank.console import progress
from tvm_lowrank.data.form import Form, Stats, check_finite, check_some, finite, form_of
from tvm_lowrank.data.given import read_images, read_labelled
from tvm_lowrank.data.imagefolder import SPLITS, read_folder
from tvm_lowrank.data.images import Images, Raw, Stored, chunks
from tvm_lowrank.data.npz import read_npz
from tvm_lowrank.data.parts import Targets
from tvm_lowrank.data.targets import checked, feed
from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import absolute, is_reference, load_object, summary
from tvm_lowrank.tensors import Shape

Labelled = tuple[Images, Targets]
Read = tuple[Raw, tuple[Raw, Targets], tuple[Raw, Targets]]  # the splits, as they are stored

IN_MEMORY = "in memory"


@dataclass(frozen=True)
class Digest:
    """What tells data apart: the SHA-256 of images and targets, and a hash of each image."""

    sha256: str
    images: list[bytes]


@dataclass(frozen=True, eq=False)
class Splits:
    """Images (n, C, H, W), and a target for each: class labels int64 (n,), an array (n, …) or a list of any objects.

    ``name`` is the source, valid from any folder.
    """

    calibration: Images
    selection: Labelled
    evaluation: Labelled
    name: str

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Of each split; all images are read for them. UserError if one cannot be read, or is not finite."""
        return {
            "calibration": _digest(self.calibration, None, "calibration"),
            "selection": _digest(*self.selection, "selection"),
            "evaluation": _digest(*self.evaluation, "evaluation"),
        }


def load_data(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    input_shape: Shape | tuple[Shape, ...],
    mean: Stats = None,
    std: Stats = None,
    classes: int | None = None,
    folder: Path | None = None,
    labelled: bool = True,
) -> Splits:
    """Read and check the three splits. Images are converted when they are used, files of them are read again then.

    Parameters
    ----------
    source
        - ``file.py:factory`` or ``pkg.module:factory``: a function without arguments that returns a mapping (or such a
          mapping itself) with ``calibration``: images, and ``selection`` and ``evaluation``: pairs (images, targets).
          Images are an array, a tensor, or an iterable of batches; a pair may also be an iterable of (images, targets)
          batches, such as a DataLoader. What can be iterated over is read once. A target is whatever the metric takes:
          a class label, a vector, a mask, a mapping of boxes and labels, ...; those of all images are an array or a
          list. Images for a model of several inputs are a tuple with an array for each, in order, or batches of such
          tuples.
        - ``file.npz`` with the arrays ``calibration_x``, ``selection_x``, ``selection_y``, ``evaluation_x`` and
          ``evaluation_y``; targets (n, …) of any shape. Of several inputs ``calibration_x_1``, ``calibration_x_2``, …
        - ``folder/`` in ImageFolder layout: ``calibration/`` (flat or one folder per class), ``selection/`` and
          ``evaluation/`` with one folder per class; labels follow the sorted names. Images are scaled so that they
          cover 256/224 of the input size and cut from the middle, unless they have the input size already. For models
          of one input.
        - None or ``"example"``: the images that come with the package.
    input_shape
        (C, H, W) of the model, or the shapes of several inputs, each without the batch.
    mean, std
        Per channel (or one for all), on the scale 0 to 1, for images that are uint8 NHWC (and for folders); the
        default is 0 and 1. Float images are NCHW and taken as they are, as those of several inputs must be.
    classes
        Number of classes that the model tells apart, if it does: targets (n,) must be smaller.
    folder
        Where batches and compressed arrays wait if they are more than 256 MB a split; None is the system's place for
        temporary files.
    labelled
        Whether targets are needed; else there may be none, and they are left out.

    Raises
    ------
    UserError
        If anything is missing, has the wrong shape or type, is not finite, or there is no room for it.
    """
    form = form_of(input_shape, mean, std, classes)
    name, (calibration, selection, evaluation) = _read(source, form, folder, labelled)
    splits = Splits(
        _stored(calibration, "calibration", form),
        _labelled(*selection, "selection", form),
        _labelled(*evaluation, "evaluation", form),
        name,
    )
    _ = splits.digests  # what is wrong with an image is found now
    return splits


def overlaps(splits: Splits) -> list[str]:
    """One message for each pair of splits that share images (bit for bit), with their number."""
    consequence = {
        "evaluation": "the measured accuracy is not that of unseen images",
        "selection": "the search will believe its choices to be better than they are",
    }
    messages = []
    for later, earlier in (("evaluation", "calibration"), ("evaluation", "selection"), ("selection", "calibration")):
        known, own = set(splits.digests[earlier].images), splits.digests[later].images
        shared = sum(digest in known for digest in own)
        if shared:
            count = f"{shared} of {len(own)} {later} images"
            messages.append(f"{count} also appear in {earlier}; {consequence[later]}")
    return messages


def fingerprint(splits: Splits) -> str:
    """SHA-256 of the evaluation images and targets, to tell whether two splits are the same."""
    return splits.digests["evaluation"].sha256


def _read(
    source: str | Path | Mapping[str, Any] | None, form: Form, folder: Path | None, labelled: bool
) -> tuple[str, Read]:
    """What the source is called, and what it holds."""
    if isinstance(source, Mapping):
        return IN_MEMORY, _of_mapping(source, IN_MEMORY, form, folder, labelled)
    if source is None or str(source) == example.NAME:
        if form.shape != example.INPUT_SHAPE[1:]:
            raise UserError(f"the bundled images are 3x32x32, the model takes {form}; give --data")
        return example.NAME, _of_mapping(example.data(), example.NAME, form, folder, labelled)
    text, path = str(source), Path(source)
    if path.is_dir():
        if form.inputs is not None:
            raise UserError(
                f"the folder {text} has images for one input, the model takes {form}; give a function or .npz"
            )
        return str(path.resolve()), read_folder(path, form, labelled=labelled)
    if path.suffix == ".npz":
        return str(path.resolve()), read_npz(path, form, folder, labelled=labelled)
    if is_reference(text):
        name = absolute(text)
        return name, _of_mapping(_called(load_object(text), text), name, form, folder, labelled)
    if not path.exists():
        raise UserError(f"no such data: {text}; give file.py:factory, file.npz or a folder")
    raise UserError(f"cannot read data from {text}; give file.py:factory, file.npz or a folder")


def _called(factory: object, text: str) -> Mapping[str, Any]:
    if callable(factory):
        try:
            factory = factory()
        except (Exception, SystemExit) as error:
            raise UserError(f"data {text} failed: {summary(error)}; correct the function") from error
    if not isinstance(factory, Mapping):
        kind = type(factory).__name__
        raise UserError(f"data {text} gave {kind}; return a mapping with calibration, selection and evaluation")
    return factory


def _of_mapping(mapping: Mapping[str, Any], name: str, form: Form, folder: Path | None, labelled: bool) -> Read:
    for split in SPLITS:
        if split not in mapping:
            found = ", ".join(map(str, mapping)) or "nothing"
            raise UserError(f"data {name} has no {split!r}, it has {found}; it needs {', '.join(SPLITS)}")
    return (
        read_images(mapping["calibration"], f"calibration of {name}", "calibration", form, folder),
        read_labelled(mapping["selection"], "selection", form, folder, labelled=labelled),
        read_labelled(mapping["evaluation"], "evaluation", form, folder, labelled=labelled),
    )


def _stored(raw: Raw, split: str, form: Form) -> Stored:
    check_some(len(raw), split)
    return Stored(raw, form)


def _labelled(raw: Raw, targets: Targets, split: str, form: Form) -> Labelled:
    return _stored(raw, split, form), checked(targets, split, len(raw), form)


def _digest(images: Images, targets: Targets | None, split: str) -> Digest:
    whole, each = hashlib.sha256(str(images.shape).encode()), list[bytes]()
    good = np.ones(len(images), bool)
    with progress(f"checking {split} images", len(images)) as advance:
        for some in chunks(images):
            good[len(each) : len(each) + len(some)] = finite(some)
            whole.update(some.data)
            each += [hashlib.blake2b(image.data, digest_size=16).digest() for image in some]
            advance(len(some))
    check_finite(good, split)
    if targets is not None:
        feed(whole.update, targets, f"{split} targets")
    return Digest(whole.hexdigest(), each)
