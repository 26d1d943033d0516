"""The command line: a thin layer that parses options, prints tables and turns errors into exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tvm_lowrank import console
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.targets import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained CNN faster on your device by low-rank decomposition, within an accuracy budget.",
)

commands.mount(app)

Model = Annotated[str | None, typer.Option(help="file.py:factory, pkg.module:factory, model.pt2 or model.onnx.")]
InputShape = Annotated[str | None, typer.Option(help="The model's input, e.g. 1,3,224,224 (for a factory).")]
Data = Annotated[
    str | None,
    typer.Option(
        help="file.py:factory (a mapping of calibration, selection, evaluation), file.npz, or a folder with "
        "calibration/, selection/ and evaluation/."
    ),
]
Mean = Annotated[str | None, typer.Option(help="Mean of each channel for uint8 images, e.g. 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Standard deviation of each channel for uint8 images.")]
Target = Annotated[str, typer.Option(help="A device profile, by name (x86) or as a .toml file.")]
Threads = Annotated[int, typer.Option(help="Threads that the library runs with.")]
Trials = Annotated[int, typer.Option(help="Schedules tried for each kernel.")]
Batch = Annotated[int, typer.Option(help="Images in one call of the library.")]
Methods = Annotated[str | None, typer.Option(help="Methods to choose from, e.g. spatial,btd (see docs/methods.md).")]
Cache = Annotated[Path | None, typer.Option(help="Folder of measurements (else $TVM_LOWRANK_CACHE or ~/.cache).")]
Tracker = Annotated[
    str | None,
    typer.Option(
        "--rpc-tracker", help="HOST:PORT of the boards' RPC tracker (else $TVM_TRACKER_HOST:$TVM_TRACKER_PORT)."
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--rpc-key", envvar="TVM_TRACKER_KEY", help="The boards' key at the tracker (else the target's)."),
]
Emulate = Annotated[bool, typer.Option("--emulate", help="Use emulated boards; their times mean nothing.")]
BundleTarget = Annotated[str | None, typer.Option("--target", help="A device profile (else the manifest's).")]
Bundle = Annotated[Path, typer.Argument(help="The folder that search wrote.")]


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="Folder for the bundle and the journal.")] = Path("bundle"),
    budget: Annotated[
        str | None, typer.Option(help="Accuracy that may be lost, in points: 1% (the default) or 0.5%.")
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(help="Instead of a budget: the most accurate network that takes at most 5ms, 800us or 0.005s."),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Up to 8 bundles, from the most accurate to the fastest, in one run.")
    ] = False,
    target: Target = "x86",
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    model: Model = None,
    input_shape: InputShape = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    metric: Annotated[str, typer.Option(help="top1, top5 or file.py:function.")] = "top1",
    methods: Methods = None,
    trials: Trials = 12,
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    confident: Annotated[
        bool, typer.Option("--confident", help="Keep the budget with the whole 95 % interval of the loss.")
    ] = False,
    finetune: Annotated[
        str | None,
        typer.Option(help="Also train with labels: file.py:factory of (images, labels) batches, e.g. a DataLoader."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of fine-tuning, for each plan that comes into question.")] = 5,
    stages: Annotated[
        int, typer.Option(help="Decompose the network in so many parts, and fine-tune it after each part.")
    ] = 1,
    time_limit: Annotated[str | None, typer.Option(help="End with the best plan so far after 600s, 10m or 2h.")] = None,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a bundle in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search whose journal is in --out.")] = False,
) -> None:
    """Find the fastest low-rank form of a model within an accuracy budget, and write it as a compiled library.

    Without --model and --data the bundled example runs: a CIFAR-10 network with real images.

    A plan (a method and a rank for each convolution) is chosen by the time that tuned code takes on the target, is
    fitted to the dense network on unlabelled calibration images, and must keep the budget on the selection images. The
    compiled library is then checked on the evaluation images, which no decision looked at.

    With --max-latency the most accurate network within a latency is looked for instead, and the measured median keeps
    it. With --frontier, OUT/1, OUT/2, ... receive networks that lose up to five times the budget.

    With --model but without --data, synthetic images stand in for the calibration images. The plan is then chosen by
    predicted damage (0.01 nats for each point of the budget), and the accuracy is not measured.

    Interrupted? Run the same command again with --resume. A search without --finetune can be resumed with it.

    With several GPUs, or machines, `torchrun -m tvm_lowrank.cli search ...` shares the fine-tuning among its workers.
    """
    from tvm_lowrank import api
    from tvm_lowrank.bundle.verify import print_frontier, print_manifest
    from tvm_lowrank.data.metric import parse_budget
    from tvm_lowrank.importers.importer import parse_input_shape

    if budget is not None and max_latency is not None:
        raise UserError("--budget and --max-latency exclude each other; leave one out")
    found = api.search(
        out=out,
        budget=parse_budget("1%" if budget is None else budget),
        max_latency=None if max_latency is None else milliseconds(max_latency),
        frontier=frontier,
        model=model,
        data=data,
        input_shape=None if input_shape is None else parse_input_shape(input_shape),
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        metric=metric,
        target=target,
        rpc_tracker=rpc_tracker,
        rpc_key=rpc_key,
        emulate=emulate,
        trials=trials,
        threads=threads,
        batch=batch,
        seed=seed,
        confident=confident,
        finetune=finetune,
        epochs=epochs,
        stages=stages,
        time_limit=None if time_limit is None else _seconds(time_limit),
        cache=cache,
        force=force,
        resume=resume,
        methods=_methods(methods),
    )
    if int(os.environ.get("RANK", "0")):
        return  # of the workers that torchrun started, the first one tells
    if frontier:
        print_frontier(found)
        print(f"bundles: {out}/1 to {out}/{len(found['bundles'])}")
        return
    print_manifest(found)
    print(f"bundle: {out}  (tvm_lowrank verify {out} repeats the accuracy, bench {out} the latency)")


@app.command()
def decompose(
    plan: Annotated[Path, typer.Option(help="What becomes of each site: a plan.json (see plans/).")],
    model: Annotated[str | None, typer.Argument(help="As --model of search; none is the bundled example.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("bundle"),
    target: Target = "x86",
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    input_shape: InputShape = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    metric: Annotated[str, typer.Option(help="top1, top5 or file.py:function.")] = "top1",
    trials: Trials = 12,
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a bundle in --out.")] = False,
) -> None:
    """Apply an explicit plan to a model, build it, and measure it.

    With --data the chains are fitted to the calibration images and the accuracy is measured; without, synthetic
    images stand in, and only the latency is measured.
    """
    from tvm_lowrank import api
    from tvm_lowrank.bundle.verify import print_manifest
    from tvm_lowrank.importers.importer import parse_input_shape

    manifest = api.decompose(
        out=out,
        plan=plan,
        model=model,
        data=data,
        input_shape=None if input_shape is None else parse_input_shape(input_shape),
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        metric=metric,
        target=target,
        rpc_tracker=rpc_tracker,
        rpc_key=rpc_key,
        emulate=emulate,
        trials=trials,
        threads=threads,
        batch=batch,
        seed=seed,
        cache=cache,
        force=force,
    )
    print_manifest(manifest)
    print(f"bundle: {out}")


@app.command("compile")
def compile_model(
    model: Annotated[str | None, typer.Argument(help="As --model of search; none is the bundled example.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("bundle"),
    target: Target = "x86",
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    input_shape: InputShape = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    metric: Annotated[str, typer.Option(help="top1, top5 or file.py:function.")] = "top1",
    trials: Trials = 12,
    threads: Threads = 1,
    batch: Batch = 1,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a bundle in --out.")] = False,
) -> None:
    """Tune and compile a model as it is, e.g. one that was trained low-rank.

    With --data the accuracy of the compiled library is measured as well.
    """
    from tvm_lowrank import api
    from tvm_lowrank.bundle.verify import print_manifest
    from tvm_lowrank.importers.importer import parse_input_shape

    manifest = api.compile(
        out=out,
        model=model,
        data=data,
        input_shape=None if input_shape is None else parse_input_shape(input_shape),
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        metric=metric,
        target=target,
        rpc_tracker=rpc_tracker,
        rpc_key=rpc_key,
        emulate=emulate,
        trials=trials,
        threads=threads,
        batch=batch,
        cache=cache,
        force=force,
    )
    print_manifest(manifest)
    print(f"bundle: {out}")


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="As --model of search; none is the bundled example.")] = None,
    input_shape: InputShape = None,
    target: Target = "x86",
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    threads: Threads = 1,
    trials: Trials = 12,
    cache: Cache = None,
) -> None:
    """List a model's sites: id, shape, MACs, and share of the time of the tuned dense network."""
    from tvm_lowrank.importers.importer import parse_input_shape
    from tvm_lowrank.searching.commands.inspect import print_sites
    from tvm_lowrank.searching.commands.run import Connection, Request

    print_sites(
        Request(
            out=Path(),
            model=model,
            input_shape=None if input_shape is None else parse_input_shape(input_shape),
            target=target,
            connection=Connection(rpc_tracker, rpc_key, emulate),
            threads=threads,
            trials=trials,
            cache=cache,
        )
    )


@app.command()
def suggest(
    model: Annotated[str | None, typer.Argument(help="As --model of search; none is the bundled example.")] = None,
    input_shape: InputShape = None,
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    weakening: Annotated[float, typer.Option(help="From the estimated ranks (0) towards the full ones (1).")] = 0.0,
) -> None:
    """Estimate ranks from the weights alone (Tucker-2, variational Bayes: Kim et al. 2016) and write them as a plan.

    Give the plan to `tvm_lowrank decompose`. No accuracy is implied: `search` chooses ranks by what they cost there.
    """
    from tvm_lowrank.cli.suggest import write_suggestion
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.importers.importer import parse_input_shape
    from tvm_lowrank.searching.commands.run import Request, load_model

    if not 0 <= weakening <= 1:
        raise UserError(f"--weakening {weakening} is outside 0..1")
    shape = None if input_shape is None else parse_input_shape(input_shape)
    write_suggestion(find_sites(load_model(Request(out=out, model=model, input_shape=shape))), out, weakening=weakening)


@app.command()
def profile(
    target: Target = "x86",
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    model: Model = None,
    input_shape: InputShape = None,
    methods: Methods = None,
    trials: Trials = 12,
    threads: Threads = 1,
    batch: Batch = 1,
    candidates: Annotated[int, typer.Option(help="Forms of layers to tune as well, for a later search.")] = 40,
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tune a model's kernels ahead of a search, and tell where its time goes.

    Every kernel of the dense network is listed with its share of the time, and with how near it comes to the peaks of
    the device, which are measured as well. Then some forms that its layers may take are tuned.

    Interrupted? Run the same command again: what was measured is kept.
    """
    from tvm_lowrank.importers.importer import parse_input_shape
    from tvm_lowrank.searching.commands import tune
    from tvm_lowrank.searching.commands.run import Request
    from tvm_lowrank.searching.measure.device import Connection

    request = Request(
        out=Path(),
        model=model,
        input_shape=None if input_shape is None else parse_input_shape(input_shape),
        target=target,
        connection=Connection(rpc_tracker, rpc_key, emulate),
        trials=trials,
        threads=threads,
        batch=batch,
        cache=cache,
        methods=_methods(methods),
    )
    tune.profile(request, count=candidates, as_json=as_json)


@app.command()
def tune(
    target: Target = "x86",
    emulate: Emulate = False,
    threads: Threads = 1,
    cache: Cache = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Write the database to this file.")] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Add the kernels of a file that --export wrote.")
    ] = None,
) -> None:
    """Say what the database of a target's measured kernels holds, and carry it from one machine to another."""
    from tvm_lowrank.searching.commands import tune
    from tvm_lowrank.targets.toolchain import cache_folder

    tune.tune(
        target,
        cache_dir=cache or cache_folder(),
        threads=threads,
        emulate=emulate,
        export_to=export_to,
        import_from=import_from,
    )


@app.command()
def bench(
    directory: Bundle,
    rounds: Annotated[int, typer.Option(help="Interleaved measurements of each library.")] = 30,
    threads: Annotated[int | None, typer.Option(help="Threads (else those of the manifest).")] = None,
    target: BundleTarget = None,
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    cache: Cache = None,
) -> None:
    """Measure the latency of a bundle's two libraries again, interleaved in one run, on the device it is for."""
    from tvm_lowrank.bundle.verify import print_latency
    from tvm_lowrank.searching.commands.deliver import measure_again
    from tvm_lowrank.searching.measure.device import Connection, device_of
    from tvm_lowrank.targets.toolchain import cache_folder

    if rounds < 1:
        raise UserError(f"--rounds {rounds} is not possible; give at least 1")
    connection = Connection(rpc_tracker, rpc_key, emulate)
    with device_of(directory, target, connection, threads=threads, cache_dir=cache or cache_folder()) as device:
        latency, speedup = measure_again(directory, device, rounds=rounds)
    print_latency(latency, speedup)


@app.command()
def verify(
    directory: Bundle,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    images: Annotated[int | None, typer.Option(help="Look at so many images only.")] = None,
    target: BundleTarget = None,
    rpc_tracker: Tracker = None,
    rpc_key: Key = None,
    emulate: Emulate = False,
    cache: Cache = None,
) -> None:
    """Measure the accuracy of a bundle's two libraries again, on the device it is for.

    Exits with 1 when it is not the manifest's; on other or fewer images, when the drop is over the budget.
    """
    from tvm_lowrank.bundle.verify import print_verification
    from tvm_lowrank.bundle.verify import verify as repeat
    from tvm_lowrank.searching.measure.device import Connection, device_of
    from tvm_lowrank.targets.toolchain import cache_folder

    if images is not None and images < 1:
        raise UserError(f"--images {images} is not possible; give at least 1")
    connection = Connection(rpc_tracker, rpc_key, emulate)
    with device_of(directory, target, connection, cache_dir=cache or cache_folder()) as device:
        result = repeat(
            directory,
            data=data,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
            open_model=device.model,
            chunk=device.chunk,
            limit=images,
        )
    print_verification(result)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def package(
    directory: Bundle,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("package"),
    with_runtime: Annotated[
        bool, typer.Option("--with-runtime", help="Add TVM's runtime and the C interface, for the bundle's target.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a package in --out.")] = False,
    cache: Cache = None,
) -> None:
    """Copy a bundle into a folder that runs on a clean device, with checksums (examples/ has applications)."""
    from tvm_lowrank.bundle.package import package as make
    from tvm_lowrank.targets.toolchain import cache_folder

    make(directory, out, with_runtime=with_runtime, cache_dir=cache or cache_folder(), force=force)
    print(f"package: {out}  (sha256sum --check SHA256SUMS, in the folder, checks a copy)")


@app.command()
def report(directory: Bundle) -> None:
    """Make a bundle's report.html again, from its manifest and the journal of its search."""
    from tvm_lowrank.bundle.report import write_report

    print(f"report: {write_report(directory)}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The folder of a bundle.")],
    second: Annotated[Path, typer.Argument(help="The folder of another one.")],
) -> None:
    """Set two bundles side by side: latency, accuracy, and what became of each layer."""
    from tvm_lowrank.bundle.bundle import read_manifest
    from tvm_lowrank.bundle.verify import print_comparison

    print_comparison({str(path): read_manifest(path) for path in (first, second)})


def _methods(text: str | None) -> Sequence[str]:
    from tvm_lowrank.searching.commands.run import DEFAULT_METHODS

    return DEFAULT_METHODS if text is None else [name.strip() for name in text.split(",")]


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers; e.g. 0.485,0.456,0.406") from error


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match:
        raise UserError(f"--time-limit {text!r} is not a time; e.g. 600, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def milliseconds(text: str) -> float:
    """A latency in ms: ``5ms``, ``800us``, ``0.005s`` or ``5`` (ms as well).

    Raises
    ------
    UserError
        If the text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|µs|ms|s|)", text.strip(), re.ASCII)
    if not match or float(match[1]) == 0:
        raise UserError(f"--max-latency {text!r} is not a time above 0; e.g. 5ms, 800us or 0.005s")
    value = float(match[1])
    return {"us": value / 1e3, "µs": value / 1e3, "s": value * 1e3}.get(match[2], value)


class _Interrupted(BaseException):
    """Ctrl-C; click would catch KeyboardInterrupt and say no more than "Aborted!"."""


def main() -> None:
    """Entry point: one line for what goes wrong; exit code 2 if the user can fix it, 130 when interrupted."""
    interrupted = False

    def interrupt(signal_number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise _Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except (Exception, _Interrupted) as error:
        if interrupted:  # what is raised in a callback of TVM's comes out of it as a RuntimeError
            message, code = "interrupted; what was measured is kept, and a search goes on with --resume", 130
        elif isinstance(error, UserError):
            message, code = str(error), 2
        elif isinstance(error, MeasurementError):
            message, code = str(error), 1
        else:
            raise
        console.error(message)
        sys.exit(code)
    finally:
        signal.signal(signal.SIGINT, before)
