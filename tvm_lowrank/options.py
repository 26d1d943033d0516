"""What a user can ask for: every option once, with its name, type, default and help.

A class is what one function of `tvm_lowrank.api` and one command of `tvm_lowrank.cli` take, and what the code behind
them works on. The classes are put together from parts, whose ``TITLE`` groups the options in ``--help``. An object of
one has been checked as far as that needs neither the model nor the data.

This module is loaded with the command line: it imports nothing that takes long.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import cleandoc, get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, dataclass_transform

from tvm_lowrank import example, quantities
from tvm_lowrank.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from tvm_lowrank.plan import Choice

Model: TypeAlias = "str | Path | nn.Module | None"
Data: TypeAlias = str | Path | Mapping[str, Any] | None
Labelled: TypeAlias = str | Callable[[int], Iterable[Any]] | Iterable[Any]
Given: TypeAlias = "Mapping[str, Choice] | str | Path"

TITLES = ("Plan", "Search", "Profile", "Model", "Data", "Device", "Output")
# quickly fitted, and their chains run at full speed; each method more costs time
DEFAULT_METHODS = ("channel", "channel_in", "spatial", "spatial_rows", "tucker2", "cp3", "svd")


@dataclass(frozen=True)
class Said:
    """What is said of an option beside its name, type and default.

    ``read`` makes its value of text: a type, or a function that raises UserError. ``python`` is added to the help where
    the function of Python takes more than text.
    """

    help: str
    read: Callable[[str], Any] = str
    python: str = ""
    environment: str = ""  # the variable that takes its place


def option(help: str, *, default: Any = MISSING, **said: Any) -> Any:
    """A field of the classes below; the keywords are those of `Said`."""
    return field(default=default, metadata={"said": Said(help, **said)})


def said(of: Field[Any]) -> Said:
    """What is said of a field of the classes below."""
    return of.metadata["said"]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def _options(cls: type) -> Any:
    return dataclass(frozen=True, kw_only=True)(cls)


def _at_least_one(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is not possible; give at least 1")


@_options
class Options:
    """A part of what can be asked."""

    TITLE: ClassVar[str]
    POSITIONAL: ClassVar[tuple[str, ...]] = ()  # the options that have no name on the command line


@_options
class ModelOptions(Options):
    """Which network."""

    TITLE: ClassVar[str] = "Model"
    model: Model = option(
        "file.py:factory, pkg.module:factory, model.pt2 or model.onnx; none is the bundled CIFAR-10 network.",
        default=None,
        python="Or a torch module.",
    )
    input_shape: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = option(
        "The model's input, e.g. 1,3,224,224 (for a factory); several as 1,3,64,64+1,10.",
        default=None,
        read=quantities.input_shape,
    )

    @property
    def model_name(self) -> str:
        """What reports call the model."""
        if self.model is None:
            return example.NAME
        return str(self.model) if isinstance(self.model, str | Path) else type(self.model).__name__


@_options
class GivenModel(ModelOptions):
    """Which network, where a command has little else to ask."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)


@_options
class DataOptions(Options):
    """Calibration, selection and evaluation images."""

    TITLE: ClassVar[str] = "Data"
    data: Data = option(
        "file.py:factory (a mapping of calibration, selection, evaluation), file.npz, or a folder with calibration/, "
        "selection/ and evaluation/. None is the bundled images for the bundled network.",
        default=None,
        python="Or the mapping itself (see `tvm_lowrank.data.splits.load_data`).",
    )
    mean: Sequence[float] | None = option(
        "Mean of each channel for uint8 images, e.g. 0.485,0.456,0.406.", default=None, read=quantities.channels
    )
    std: Sequence[float] | None = option(
        "Standard deviation of each channel for uint8 images.", default=None, read=quantities.channels
    )


@_options
class MetricOptions(DataOptions):
    """Data, and what a right answer is."""

    TITLE: ClassVar[str] = "Data"
    metric: str = option(
        "top1, top5, f1, mean-iou, dice, psnr, ssim, verification, voc-map, coco-map or oks-map; agreement or "
        "relative-error, which need no targets; or file.py:function of (outputs, targets), which returns a number from "
        "0 to 1 for each image or for all. NAME:file.py:function is a metric of what the function makes of the "
        "outputs, such as coco-map of the boxes in them (see docs/metrics.md).",
        default="top1",
    )
    output: str | None = option(
        "What the outputs are, by which damage is counted: scores, scores:AXIS (of classes), multilabel, regression "
        "or embedding; of several, with a comma between; of parts of one, as regression@1:0-3+multilabel@1:4-83; or "
        "file.py:function (of dense and changed outputs: nats of each image). Left out, the network's end tells.",
        default=None,
    )


@_options
class ConnectionOptions(Options):
    """How boards are reached."""

    TITLE: ClassVar[str] = "Device"
    rpc_tracker: str | None = option(
        "HOST:PORT of the boards' RPC tracker (else $TVM_TRACKER_HOST:$TVM_TRACKER_PORT).", default=None
    )
    rpc_key: str | None = option(
        "The boards' key at the tracker (else the target's).", default=None, environment="TVM_TRACKER_KEY"
    )
    emulate: bool = option("Use emulated boards; their times mean nothing.", default=False, read=bool)
    cache: str | Path | None = option(
        "Folder of measurements (else $TVM_LOWRANK_CACHE or ~/.cache).", default=None, read=Path
    )

    @property
    def starts(self) -> bool:
        """Whether emulated boards are to be started."""
        return self.emulate and self.rpc_tracker is None


@_options
class VerifyOptions(DataOptions, ConnectionOptions):
    """`tvm_lowrank verify`."""


@_options
class TuningOptions(ConnectionOptions):
    """What the library is made for, and how long its kernels are tuned."""

    TITLE: ClassVar[str] = "Device"
    target: str = option(
        "A device profile, by name (see tvm_lowrank targets) or as a .toml file; several levels of this machine's "
        "processor, as x86-64-v3,x86-64-v4, make a bundle with libraries for each.",
        default="x86",
    )
    threads: int = option("Threads that the library runs with.", default=1, read=int)
    batch: int = option("Images in one call of the library.", default=1, read=int)
    trials: int = option("Schedules tried for each kernel.", default=12, read=int)
    precision: str = option(
        "Number format of the convolutions: float32, bfloat16, float16 or int8 (see targets); auto is what is fastest.",
        default="auto",
    )

    def __post_init__(self) -> None:
        _at_least_one(self, "trials", "threads", "batch")


@_options
class MethodOptions(Options):
    """Which decompositions."""

    TITLE: ClassVar[str] = "Search"
    methods: Sequence[str] = option(
        "Methods to choose from, e.g. spatial,btd (see docs/methods.md).",
        default=DEFAULT_METHODS,
        read=quantities.names,
    )


@_options
class SeedOptions(Options):
    """What makes a run repeatable."""

    TITLE: ClassVar[str] = "Data"
    seed: int = option("Of everything drawn at random.", default=0, read=int)


@_options
class NetworkOptions(ModelOptions, TuningOptions):
    """A network, and what it is to run on."""


@_options
class InspectOptions(GivenModel, NetworkOptions):
    """`tvm_lowrank inspect`."""


@_options
class ProfileOptions(MethodOptions, NetworkOptions):
    """`tvm_lowrank profile`."""

    TITLE: ClassVar[str] = "Profile"
    candidates: int = option("Forms of layers to tune as well, for a later search.", default=40, read=int)
    json: bool = option("Print JSON instead of a table.", default=False, read=bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 0:
            raise UserError(f"--candidates {self.candidates} is not possible; give 0 for none")


@_options
class BundleOptions(MetricOptions, NetworkOptions):
    """What every command that writes a bundle takes."""

    TITLE: ClassVar[str] = "Output"
    out: str | Path = option("Folder for the bundle, and for the journal of a search.", default="bundle")
    force: bool = option("Overwrite a bundle in --out.", default=False, read=bool)

    @property
    def folder(self) -> Path:
        """Where the bundle is written."""
        return Path(self.out)


@_options
class CompileOptions(GivenModel, BundleOptions):
    """`tvm_lowrank compile`."""


@_options
class DecomposeOptions(SeedOptions, CompileOptions):
    """`tvm_lowrank decompose`."""

    TITLE: ClassVar[str] = "Plan"
    plan: Given = option(
        "What becomes of each site: a plan.json (see plans/).",
        read=Path,
        python="Or a mapping from the names of layers to `Choice`.",
    )


@_options
class SearchOptions(MethodOptions, SeedOptions, BundleOptions):
    """`tvm_lowrank search`."""

    TITLE: ClassVar[str] = "Search"
    budget: float | str | quantities.Budget | None = option(
        "What the metric may lose: 1% (points, the default) or 0.5%; 0.5dB for one that counts in dB.",
        default=None,
        read=quantities.budget,
        python="A number is in the metric's unit.",
    )
    max_latency: float | None = option(
        "Instead of a budget: the most accurate network that takes at most 5ms, 800us or 0.005s.",
        default=None,
        read=quantities.milliseconds,
        python="In ms.",
    )
    frontier: bool = option(
        "Up to 8 bundles, from the most accurate to the fastest, in one run.", default=False, read=bool
    )
    confident: bool = option("Keep the budget with the whole 95 % interval of the loss.", default=False, read=bool)
    finetune: Labelled | None = option(
        "Also train with labels: file.py:factory of (images, labels) batches, e.g. a DataLoader.",
        default=None,
        python="Or the batches themselves (see `tvm_lowrank.data.training_data.load_training`).",
    )
    epochs: int = option("Of fine-tuning, for each plan that comes into question.", default=5, read=int)
    stages: int = option(
        "Decompose the network in so many parts, and fine-tune it after each part.", default=1, read=int
    )
    time_limit: float | None = option(
        "End with the best plan so far after 600s, 10m or 2h.",
        default=None,
        read=quantities.seconds,
        python="In seconds.",
    )
    resume: bool = option("Continue the search whose journal is in --out.", default=False, read=bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "epochs", "stages")
        if self.stages > 1 and self.finetune is None:
            raise UserError("--stages without --finetune; between stages the network is trained with labels")
        if self.time_limit is not None and self.time_limit <= 0:
            raise UserError("--time-limit must be positive; e.g. 600, 10m or 2h")
        if self.budget is not None:
            _ = self._budget  # UserError if it is none
        if self.budget is not None and self.max_latency is not None:
            raise UserError("--budget and --max-latency exclude each other; leave one out")
        if self.max_latency is not None and self.frontier:
            raise UserError("--max-latency and --frontier ask for different things; leave one out")
        if self.confident and (self.max_latency is not None or self.frontier):
            raise UserError(
                "--confident needs a --budget to keep; leave out --confident, or --max-latency and --frontier"
            )
        if self.frontier and self.model is not None and self.data is None:
            raise UserError("--frontier without --data; the accuracy that it weighs against time is not known")
        if self.finetune is not None and self.model is not None and self.data is None:
            raise UserError("--finetune without --data; the accuracy that it is to restore is not known")
        if self.model is None and self.data is not None:
            raise UserError("--data without --model; name the model that the data belongs to")

    def allowed(self, unit: str, metric: str) -> float:
        """The budget in a metric's unit.

        Raises
        ------
        UserError
            If it is in another one, or was left out where a point is none.
        """
        if self.budget is None:
            if unit != "points" and self.max_latency is None:
                raise UserError(f"{metric} counts in {unit}; give a --budget such as 0.5{unit}")
            return 1.0
        return self._budget.within(unit, metric)

    @property
    def _budget(self) -> quantities.Budget:
        """What was given, from Python perhaps as a text or a number."""
        given = self.budget
        if isinstance(given, quantities.Budget):
            return given
        return quantities.budget(given if isinstance(given, str) else f"{given:.9f}")


def grouped(options: type[Options]) -> Mapping[str, str]:
    """The title that each field of a class stands under, by its name; in the order in which ``--help`` shows them."""
    known = {own.name for own in fields(options)}
    found: dict[str, str] = {}
    for cls in options.__mro__:
        for name in get_annotations(cls):
            if issubclass(cls, Options) and name in known:
                found.setdefault(name, cls.TITLE)
    return dict(sorted(found.items(), key=lambda item: TITLES.index(item[1])))


def described(docstring: str, options: type[Options]) -> str:
    """The docstring of a function that has the options of a class, with the section of its parameters."""
    of = {own.name: said(own) for own in fields(options)}
    items = (f"{name} : {' '.join(filter(None, [of[name].help, of[name].python]))}" for name in grouped(options))
    section = "\n".join(["Parameters", "----------", *items])
    before, returns, after = cleandoc(docstring).partition("Returns\n")
    return f"{before}{section}\n\n{returns}{after}"
