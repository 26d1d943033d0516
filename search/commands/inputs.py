"""What was asked for, loaded and checked: the same for every command, before any long work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from tvm.ir import IRModule

from tvm_lowrank import console, example
from tvm_lowrank.bridge.answers import EMBEDDING, MULTILABEL, REGRESSION, SCORES, Answers
from tvm_lowrank.bridge.calibrate import answered, predict
from tvm_lowrank.bridge.grids import IMAGES, calibrated
from tvm_lowrank.bridge.meaning import answers_of, guessed, with_answers
from tvm_lowrank.bridge.meaning import asked as said_of
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import prepare_out
from tvm_lowrank.codegen.link import find_compiler
from tvm_lowrank.data.builtin import SIMPLE, YES
from tvm_lowrank.data.metric import Metric, load_metric, tried
from tvm_lowrank.data.splits import Splits, load_data, overlaps
from tvm_lowrank.data.synthetic import dead_leaves
from tvm_lowrank.data.training_data import load_training, name_of
from tvm_lowrank.errors import UserError
from tvm_lowrank.formats import FORMATS
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS
from tvm_lowrank.options import BundleOptions, MethodOptions, ModelOptions, NetworkOptions, SearchOptions
from tvm_lowrank.searching.choose.networks import Training
from tvm_lowrank.searching.fit.torchrun import Workers
from tvm_lowrank.searching.journal import JOURNAL
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.searching.measure.device import Device, check_connection, open_device
from tvm_lowrank.targets.profile import Profile, load_levels
from tvm_lowrank.targets.toolchain import cache_folder
from tvm_lowrank.tensors import Tensors

SYNTHETIC_IMAGES = 500
SPREAD_IMAGES = 64  # on which the spread of regressions is measured


AUTO = "auto"


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a command works on.

    ``profile`` is the target; ``others`` are further ones that a bundle has libraries for.
    ``splits`` is None where the model comes without data or the command looks at no accuracy, ``training`` where there
    are no labelled batches.
    """

    asked: NetworkOptions
    profile: Profile
    mod: IRModule
    sites: list[Site]
    metric: Metric = field(default_factory=load_metric)
    splits: Splits | None = None
    training: Training | None = None
    others: tuple[Profile, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats in which sites may be computed."""
        return precisions(self.asked.precision, self.profile, *self.others)


def precisions(precision: str, *profiles: Profile) -> tuple[str, ...]:
    """What ``--precision`` allows on all of some targets.

    Raises
    ------
    UserError
        If one of them does not compute in it, or there is no such format.
    """
    if precision == AUTO:
        return tuple(name for name in FORMATS if all(name in profile.formats for profile in profiles))
    if precision not in FORMATS:
        raise UserError(f"unknown --precision {precision!r}; give {AUTO} or one of {', '.join(FORMATS)}")
    for profile in profiles:
        if precision not in profile.formats:
            raise UserError(
                f"target {profile.name} ({profile.code}) does not compute in {precision}, "
                f"only in {', '.join(profile.formats)}; leave --precision out"
            )
    return (precision,)


def load(asked: NetworkOptions, workers: Workers | None = None) -> Inputs:
    """Load what was asked for. Whatever is wrong with it is found here, what is quickly checked first.

    ``workers`` share the training. Nothing is written, but for the output folder, if there is none.

    Raises
    ------
    UserError
        If an input is bad, the output cannot be written, or something is missing that the work needs.
    MeasurementError
        If the device does not answer.
    """
    metric, splits, training = load_metric(), None, None
    profile, *others = load_levels(asked.target)
    precisions(asked.precision, profile, *others)
    check_connection(profile, asked)
    if isinstance(asked, MethodOptions):
        _check_methods(asked.methods)
    if isinstance(asked, BundleOptions):
        find_compiler()
        metric = load_metric(asked.metric)
        if isinstance(asked, SearchOptions):
            asked.allowed(metric.unit.name, metric.name)
        prepare_out(asked.folder, force=asked.force or resumes(asked))
    mod = load_model(asked)
    if isinstance(asked, BundleOptions) and (asked.model is None or asked.data is not None):
        metric = meant(metric, mod)
        splits = _load_splits(asked, mod, labelled=metric.labelled)
        metric = _tried(metric, mod, splits)
    if isinstance(asked, SearchOptions) and asked.finetune is not None:
        training = load_training_of(asked, mod, workers or Workers())
    if isinstance(asked, BundleOptions):
        mod = _gridded(mod, splits, precisions(asked.precision, profile, *others))
    if others:
        console.phase(f"of the targets, {profile.name} is the best that this processor has: it is measured on")
    return Inputs(asked, profile, mod, find_sites(mod), metric, splits, training, tuple(others))


def _gridded(mod: IRModule, splits: Splits | None, formats: Sequence[str]) -> IRModule:
    """The module with a grid for every site, if one of the formats has whole numbers."""
    if not any(FORMATS[format].whole for format in formats):
        return mod
    images = synthetic_images(mod, 0) if splits is None else splits.calibration
    if not np.ptp(images[:IMAGES], axis=0).any():
        console.warn("the calibration images are all alike, and tell no ranges of activations: nothing is in int8")
        return mod
    with console.progress("ranges of activations", min(IMAGES, len(images))) as advance:
        return calibrated(mod, images, names=[site.id for site in find_sites(mod)], advance=advance)


def meant(metric: Metric, mod: IRModule) -> Metric:
    """The form of a metric that fits what a network's outputs mean; UserError if there is none."""
    name, answers = metric.name, answers_of(mod["main"])
    if name == "top1" and yes_or_no(mod):
        name = "binary"
    if name == "agreement" and (not isinstance(answers, Answers) or answers.kind in (REGRESSION, EMBEDDING)):
        raise UserError(f"agreement compares decisions, but outputs are {answers}; use relative-error, or see --output")
    if not isinstance(answers, Answers):
        return metric
    if name == "agreement" and answers.kind == MULTILABEL:
        name = "agreement-labels"
    if name == "agreement" and answers.axis == 2:
        name = "agreement-tokens"
    if answers.kind == MULTILABEL and answers.probabilities and name + YES in SIMPLE:
        name += YES
    return metric if name == metric.name else load_metric(name)


def _tried(metric: Metric, mod: IRModule, splits: Splits) -> Metric:
    """The metric, `tried` on the first images of both splits."""
    bridge = TorchBridge(mod)
    for images, targets in (splits.selection, splits.evaluation):
        metric = tried(metric, lambda count, images=images: answered(bridge, images[:count]), targets)  # type: ignore[misc]
    return metric


def resumes(asked: BundleOptions) -> bool:
    """Whether a search goes on with the journal in its folder."""
    return isinstance(asked, SearchOptions) and asked.resume and (asked.folder / JOURNAL).is_file()


def _check_methods(methods: Sequence[str]) -> None:
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise UserError(f"unknown method {', '.join(unknown) or '(none)'}; known are {', '.join(METHODS)}")


def load_model(asked: ModelOptions) -> IRModule:
    """The canonical module of a model, which says what its outputs mean; UserError if it cannot be imported."""
    if asked.model is None:
        console.phase("no --model: using the bundled example, a VGG-style CIFAR-10 network")
        mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    else:
        mod = import_model(asked.model, input_shape=asked.input_shape)
    return _meaning(asked, mod) if isinstance(asked, BundleOptions) else mod


def _meaning(asked: BundleOptions, mod: IRModule) -> IRModule:
    """The module with what its outputs mean: as it was asked for, or as its end suggests."""
    function = mod["main"]
    if asked.output is not None:
        answers = said_of(asked.output, function)
    else:
        answers = guessed(function)
        outputs = Tensors.of(function)
        if answers != Answers() or len(outputs.shapes[0]) != 1:
            console.phase(f"outputs {outputs} are taken for {answers}; --output says otherwise")
    # every worker of a training must count alike, so the spread is that on images that all of them have
    images = _made_up(mod, SPREAD_IMAGES, 0)
    found = answers.measured(torch.from_numpy(predict(TorchBridge(mod), images)))
    return mod if found == guessed(function) else with_answers(mod, found)


def _load_splits(asked: BundleOptions, mod: IRModule, *, labelled: bool) -> Splits:
    """The data, checked against its model's input and output shapes; ``labelled`` if it needs targets."""
    if asked.data is None:
        console.phase("no --data: using the bundled CIFAR-10 images")
    splits = load_data(
        asked.data,
        input_shape=Tensors.taken(mod["main"]).shapes,
        mean=asked.mean,
        std=asked.std,
        classes=_classes(mod),
        folder=asked.folder,
        labelled=labelled,
    )
    for message in overlaps(splits):
        console.warn(message)
    return splits


def load_training_of(asked: SearchOptions, mod: IRModule, workers: Workers) -> Training:
    """How the networks of a search learn, with labels where there are classes; the first batch is checked."""
    assert asked.finetune is not None
    mean, std = asked.mean, asked.std
    if asked.data is None:
        mean = std = None  # the example's training data comes normalised
    classes, known = _classes(mod), not yes_or_no(mod) and _classes(mod) is not None
    if not known:
        console.phase("the outputs are no class scores: fine-tuning imitates the dense network, without labels")
    inputs = Tensors.taken(mod["main"]).shapes
    batches = load_training(asked.finetune, input_shape=inputs, mean=mean, std=std, classes=classes, labelled=known)
    name = f"{name_of(asked.finetune)}, {asked.epochs} epochs" + (f", {asked.stages} stages" * (asked.stages > 1))
    return Training(batches, name, asked.epochs, asked.stages, workers, asked.seed)


def image_shape(mod: IRModule) -> tuple[int, int, int]:
    """(C, H, W) of a canonical module's input."""
    channels, height, width = (int(d) for d in list(mod["main"].params[0].ty.shape)[1:])
    return channels, height, width


def _classes(mod: IRModule) -> int | None:
    """How many classes labels may count, if they count classes."""
    if yes_or_no(mod):
        return 2
    shape, answers = Tensors.of(mod["main"]).shapes[0], answers_of(mod["main"])
    return shape[0] if len(shape) == 1 and isinstance(answers, Answers) and answers.kind == SCORES else None


def yes_or_no(mod: IRModule) -> bool:
    """Whether a network answers one question with yes or no."""
    answers = answers_of(mod["main"])
    return isinstance(answers, Answers) and answers.kind == MULTILABEL and Tensors.of(mod["main"]).ends == [1]


def synthetic_images(mod: IRModule, seed: int) -> np.ndarray:
    """Images (n, C, H, W) for a model that came without data."""
    return _made_up(mod, SYNTHETIC_IMAGES, seed)


def _made_up(mod: IRModule, count: int, seed: int) -> np.ndarray:
    """So many images; inputs of several that are no images become noise."""
    inputs = Tensors.taken(mod["main"])
    noise = np.random.default_rng(seed)
    made = [
        dead_leaves(shape, count, seed=seed)
        if len(shape) == 3
        else noise.standard_normal((count, *shape)).astype("float32")
        for shape in inputs.shapes
    ]
    images: np.ndarray = inputs.images(made)
    return images


@contextmanager
def opened(inputs: Inputs) -> Iterator[tuple[Device, LatencyOracle, SiteTimes]]:
    """The device, an oracle for it, and the times of the network's sites there."""
    asked, cache = inputs.asked, cache_folder(inputs.asked.cache)
    with (
        open_device(inputs.profile, asked, threads=asked.threads, cache_dir=cache) as device,
        LatencyOracle(
            device.profile, cache_dir=cache, trials=asked.trials, threads=asked.threads, bench=device.devices
        ) as oracle,
    ):
        yield device, oracle, SiteTimes(inputs.mod, inputs.sites, oracle, batch=asked.batch)
