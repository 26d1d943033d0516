"""From Python what the command line does: `search`, `decompose` and `compile` write bundles.

They are in `tvm_lowrank` itself; all arguments are keywords, the fields of a class of `tvm_lowrank.options`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from tvm_lowrank.options import CompileOptions, DecomposeOptions, Options, SearchOptions, described, grouped
from tvm_lowrank.searching.commands import run
from tvm_lowrank.searching.commands.apply import apply_plan

P = ParamSpec("P")
Asked = TypeVar("Asked")
Result = TypeVar("Result")


def asking(options: Callable[P, Asked]) -> Callable[[Callable[[Asked], Result]], Callable[P, Result]]:
    """A function of options as one of keywords: the fields of their class, which its docstring then lists."""

    def decorated(function: Callable[[Asked], Result]) -> Callable[P, Result]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            return function(options(*args, **kwargs))

        of = cast(type[Options], options)
        keywords = [inspect.signature(of).parameters[name] for name in grouped(of)]
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            keywords, return_annotation=inspect.signature(function, eval_str=True).return_annotation
        )
        call.__doc__ = described(call.__doc__ or "", of)
        return call

    return decorated


@asking(SearchOptions)
def search(asked: SearchOptions) -> dict[str, Any]:
    """Find the fastest low-rank form of a model within an accuracy budget, and write it as a compiled library.

        manifest = tvm_lowrank.search(model=net, input_shape=(1, 3, 224, 224), data=splits, out="bundle")
        scores = tvm_lowrank.load("bundle")(images)

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
    return run.search(asked)


@asking(DecomposeOptions)
def decompose(asked: DecomposeOptions) -> dict[str, Any]:
    """Apply an explicit plan to a model, build it, measure it, and write the bundle.

        tvm_lowrank.decompose(model="net.onnx", plan={"layer2.0.conv1": Choice("spatial", 48)}, out="bundle")

    With ``data`` the factors are fitted to the calibration images, and the accuracy of the compiled library is
    measured on the evaluation images; without, synthetic images stand in, and only the latency is measured.

    Returns
    -------
    What `manifest.json` holds.

    Raises
    ------
    UserError
        If the plan does not fit the model, the other input is bad, or the output cannot be written.
    MeasurementError
        If the device does not compute what PyTorch does, or cannot be measured.
    """
    return apply_plan(asked, asked.plan, seed=asked.seed)


@asking(CompileOptions)
def compile(asked: CompileOptions) -> dict[str, Any]:
    """Tune and compile a model as it is: for one that was compressed already, e.g. trained low-rank by `constrain`.

    Returns
    -------
    What `manifest.json` holds.

    Raises
    ------
    UserError
        If the input is bad, or the output cannot be written.
    MeasurementError
        If the device does not compute what PyTorch does, or cannot be measured.
    """
    return apply_plan(asked, {})
