"""From Python what the command line does: `search`, `decompose` and `compile` write bundles.

They are in `tvm_lowrank` itself; all arguments are keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.commands import run
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.searching.commands.run import DEFAULT_METHODS
from tvm_lowrank.searching.measure.device import Connection

Model: TypeAlias = str | Path | nn.Module | None
Data: TypeAlias = str | Path | Mapping[str, Any] | None
Labelled: TypeAlias = str | Callable[[int], Iterable[Any]] | Iterable[Any]


def search(
    *,
    out: str | Path,
    model: Model = None,
    input_shape: tuple[int, ...] | None = None,
    data: Data = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: str = "top1",
    budget: float = 1.0,
    max_latency: float | None = None,
    frontier: bool = False,
    confident: bool = False,
    target: str = "x86",
    rpc_tracker: str | None = None,
    rpc_key: str | None = None,
    emulate: bool = False,
    threads: int = 1,
    batch: int = 1,
    methods: Sequence[str] = DEFAULT_METHODS,
    finetune: Labelled | None = None,
    epochs: int = 5,
    stages: int = 1,
    trials: int = 12,
    time_limit: float | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Find the fastest low-rank form of a model within an accuracy budget, and write it as a compiled library.

        manifest = tvm_lowrank.search(model=net, input_shape=(1, 3, 224, 224), data=splits, out="bundle")
        scores = tvm_lowrank.load("bundle")(images)

    Parameters
    ----------
    out : folder of the bundle and of the search's journal.
    model : a torch module, ``file.py:factory``, ``pkg.module:factory``, ``model.pt2`` or ``model.onnx``; None is the
        bundled CIFAR-10 network.
    input_shape : (N, C, H, W), needed for torch modules and factories.
    data : a mapping with ``calibration`` (images), ``selection`` and ``evaluation`` (pairs of images and labels), or
        where to read one (`tvm_lowrank.data.splits.load_data`). None is the bundled images if ``model`` is None; else
        synthetic images stand in, and the accuracy is not measured.
    mean, std : per channel, on the scale 0 to 1, for uint8 NHWC images; float images are NCHW and taken as they are.
    metric : ``top1``, ``top5`` or ``file.py:function``, with ``function(logits, labels)`` from 0 to 1 for each image.
    budget : points of the metric that may be lost.
    max_latency : ms; takes the place of the budget: the most accurate network that is as fast.
    frontier : write up to 8 bundles, ``out/1``, ``out/2``, …, from the most accurate to the fastest.
    confident : keep the budget with the whole 95 % interval of the loss.
    target : a device profile, by name (`tvm_lowrank targets` lists them) or as a ``.toml`` file.
    rpc_tracker, rpc_key : HOST:PORT where boards are registered, and as what; see docs/devices.md.
    emulate : use emulated boards, whose times mean nothing.
    threads, batch : threads that the library runs with, images in one call of it.
    methods : names from `tvm_lowrank.methods.METHODS`.
    finetune : labelled batches to learn from, in one of the forms of `tvm_lowrank.data.training_data.load_training`.
    epochs, stages : of fine-tuning, for each plan that comes into question; decompose the network in so many parts,
        and train after each.
    trials : schedules tried for each kernel.
    time_limit : seconds, after which the best plan so far is delivered.
    seed : of everything drawn at random.
    cache : folder of measurements, else ``$TVM_LOWRANK_CACHE`` or ``~/.cache/tvm_lowrank``.
    force, resume : overwrite what is in ``out``, or go on with it.

    Returns
    -------
    What `manifest.json` holds: ``latency_ms``, ``speedup``, ``accuracy``, ``sites`` and more; with ``frontier`` what
    `frontier.json` holds. Under `torchrun` every worker must call this, and gets the same.

    Raises
    ------
    UserError
        If the input is bad (before the long work starts), or the output cannot be written.
    MeasurementError
        If the device does not compute what PyTorch does, or cannot be measured.
    """
    options = dict(locals())
    return run.search(_request(options))


def decompose(
    *,
    out: str | Path,
    plan: Mapping[str, Choice] | str | Path,
    model: Model = None,
    input_shape: tuple[int, ...] | None = None,
    data: Data = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: str = "top1",
    target: str = "x86",
    rpc_tracker: str | None = None,
    rpc_key: str | None = None,
    emulate: bool = False,
    threads: int = 1,
    batch: int = 1,
    trials: int = 12,
    seed: int = 0,
    cache: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Apply an explicit plan to a model, build it, measure it, and write the bundle; returns its manifest.

        tvm_lowrank.decompose(model="net.onnx", plan={"layer2.0.conv1": Choice("spatial", 48)}, out="bundle")

    With ``data`` the factors are fitted to the calibration images, and the accuracy of the compiled library is
    measured on the evaluation images; without, synthetic images stand in, and only the latency is measured. The
    parameters are those of `search`; ``plan`` is a mapping from the names of layers, or the path of a ``plan.json``.

    Raises
    ------
    UserError
        If the plan does not fit the model, the other input is bad, or the output cannot be written.
    MeasurementError
        If the device does not compute what PyTorch does, or cannot be measured.
    """
    options = dict(locals())
    return apply_plan(_request(options), options.pop("plan"))


def compile(
    *,
    out: str | Path,
    model: Model = None,
    input_shape: tuple[int, ...] | None = None,
    data: Data = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: str = "top1",
    target: str = "x86",
    rpc_tracker: str | None = None,
    rpc_key: str | None = None,
    emulate: bool = False,
    threads: int = 1,
    batch: int = 1,
    trials: int = 12,
    cache: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Tune and compile a model as it is: for one that was compressed already, e.g. trained low-rank by `constrain`.

    The parameters, what is returned and what is raised are as for `decompose` with an empty plan.
    """
    options = dict(locals())
    return apply_plan(_request(options), Plan())


def _request(options: Mapping[str, Any]) -> run.Request:
    """The request of a function's arguments."""
    own = {name: value for name, value in options.items() if name not in ("plan", "rpc_tracker", "rpc_key", "emulate")}
    own["out"] = Path(own["out"])
    own["cache"] = None if own["cache"] is None else Path(own["cache"])
    connection = Connection(options["rpc_tracker"], options["rpc_key"], options["emulate"])
    return run.Request(**own, connection=connection)
