"""The command line: a thin layer that parses options, prints tables and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_lowrank import console
from tvm_lowrank.cli.options import asking
from tvm_lowrank.errors import MeasurementError, UserError
from tvm_lowrank.options import (
    CompileOptions,
    ConnectionOptions,
    DecomposeOptions,
    GivenModel,
    InspectOptions,
    ProfileOptions,
    SearchOptions,
    VerifyOptions,
)
from tvm_lowrank.targets import commands
from tvm_lowrank.targets.toolchain import cache_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained CNN faster on your device by low-rank decomposition, within an accuracy budget.",
)

commands.mount(app)

BundleTarget = Annotated[str | None, typer.Option("--target", help="A device profile (else the manifest's).")]
Bundle = Annotated[Path, typer.Argument(help="The folder that search wrote.")]


@app.command()
@asking
def search(asked: SearchOptions) -> None:
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
    from tvm_lowrank.bundle.verify import print_frontier
    from tvm_lowrank.searching.commands import run

    found = run.search(asked)
    if int(os.environ.get("RANK", "0")):
        # of the workers that torchrun started, the first one tells; threads of gloo that are not at their end yet would
        # abort another one while its interpreter ends
        sys.stderr.flush()
        os._exit(0)
    if asked.frontier:
        print_frontier(found)
        print(f"bundles: {asked.out}/1 to {asked.out}/{len(found['bundles'])}")
    else:
        hint = f"(tvm_lowrank verify {asked.out} repeats the accuracy, bench {asked.out} the latency)"
        _print_bundle(asked.out, found, f"  {hint}")


@app.command()
@asking
def decompose(asked: DecomposeOptions) -> None:
    """Apply an explicit plan to a model, build it, and measure it.

    With --data the chains are fitted to the calibration images and the accuracy is measured; without, synthetic
    images stand in, and only the latency is measured.
    """
    from tvm_lowrank.searching.commands.apply import apply_plan

    _print_bundle(asked.out, apply_plan(asked, asked.plan, seed=asked.seed))


@app.command("compile")
@asking
def compile_model(asked: CompileOptions) -> None:
    """Tune and compile a model as it is, e.g. one that was trained low-rank.

    With --data the accuracy of the compiled library is measured as well.
    """
    from tvm_lowrank.searching.commands.apply import apply_plan

    _print_bundle(asked.out, apply_plan(asked, {}))


def _print_bundle(out: str | Path, manifest: dict[str, Any], hint: str = "") -> None:
    from tvm_lowrank.bundle.verify import print_manifest

    print_manifest(manifest)
    print(f"bundle: {out}{hint}")


@app.command()
@asking
def inspect(asked: InspectOptions) -> None:
    """List a model's sites: id, shape, MACs, and share of the time of the tuned dense network."""
    from tvm_lowrank.searching.commands.inspect import print_sites

    print_sites(asked)


@app.command()
@asking
def suggest(
    asked: GivenModel,
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    weakening: Annotated[float, typer.Option(help="From the estimated ranks (0) towards the full ones (1).")] = 0.0,
) -> None:
    """Estimate ranks from the weights alone (Tucker-2, variational Bayes: Kim et al. 2016) and write them as a plan.

    Give the plan to `tvm_lowrank decompose`. No accuracy is implied: `search` chooses ranks by what they cost there.
    """
    from tvm_lowrank.cli.suggest import write_suggestion
    from tvm_lowrank.graph import find_sites
    from tvm_lowrank.searching.commands.inputs import load_model

    if not 0 <= weakening <= 1:
        raise UserError(f"--weakening {weakening} is outside 0..1")
    write_suggestion(find_sites(load_model(asked)), out, weakening=weakening)


@app.command()
@asking
def profile(asked: ProfileOptions) -> None:
    """Tune a model's kernels ahead of a search, and tell where its time goes.

    Every kernel of the dense network is listed with its share of the time, and with how near it comes to the peaks of
    the device, which are measured as well. Then some forms that its layers may take are tuned.

    Interrupted? Run the same command again: what was measured is kept.
    """
    from tvm_lowrank.searching.commands import tune

    tune.profile(asked)


@app.command()
def tune(
    target: Annotated[str, typer.Option(help="A device profile, by name (x86) or as a .toml file.")] = "x86",
    emulate: Annotated[bool, typer.Option("--emulate", help="The database of emulated boards.")] = False,
    threads: Annotated[int, typer.Option(help="Threads that the kernels run with.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Folder of the database (else as for search).")] = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Write the database to this file.")] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Add the kernels of a file that --export wrote.")
    ] = None,
) -> None:
    """Say what the database of a target's measured kernels holds, and carry it from one machine to another."""
    from tvm_lowrank.searching.commands import tune

    tune.tune(
        target,
        cache_dir=cache_folder(cache),
        threads=threads,
        emulate=emulate,
        export_to=export_to,
        import_from=import_from,
    )


@app.command()
@asking
def bench(
    directory: Bundle,
    reached: ConnectionOptions,
    rounds: Annotated[int, typer.Option(help="Interleaved measurements of each library.")] = 30,
    threads: Annotated[int | None, typer.Option(help="Threads (else those of the manifest).")] = None,
    target: BundleTarget = None,
) -> None:
    """Measure the latency of a bundle's two libraries again, interleaved in one run, on the device it is for."""
    from tvm_lowrank.bundle.verify import print_latency
    from tvm_lowrank.searching.commands.libraries import measure_again
    from tvm_lowrank.searching.measure.device import device_of

    if rounds < 1:
        raise UserError(f"--rounds {rounds} is not possible; give at least 1")
    with device_of(directory, target, reached, threads=threads) as device:
        latency, speedup = measure_again(directory, device, rounds=rounds)
    print_latency(latency, speedup)


@app.command()
@asking
def verify(
    directory: Bundle,
    asked: VerifyOptions,
    images: Annotated[int | None, typer.Option(help="Look at so many images only.")] = None,
    target: BundleTarget = None,
) -> None:
    """Measure the accuracy of a bundle's two libraries again, on the device it is for.

    Exits with 1 when it is not the manifest's; on other or fewer images, when the drop is over the budget.
    """
    from tvm_lowrank.bundle.verify import print_verification
    from tvm_lowrank.bundle.verify import verify as repeat
    from tvm_lowrank.searching.measure.device import device_of

    if images is not None and images < 1:
        raise UserError(f"--images {images} is not possible; give at least 1")
    with device_of(directory, target, asked) as device:
        result = repeat(
            directory,
            data=asked.data,
            mean=asked.mean,
            std=asked.std,
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
    cache: Annotated[Path | None, typer.Option(help="Folder of runtimes (else as for search).")] = None,
) -> None:
    """Copy a bundle into a folder that runs on a clean device, with checksums (examples/ has applications)."""
    from tvm_lowrank.bundle.package import package as make

    make(directory, out, with_runtime=with_runtime, cache_dir=cache_folder(cache), force=force)
    print(f"package: {out}  (sha256sum --check SHA256SUMS, in the folder, checks a copy)")


@app.command()
def report(directory: Bundle) -> None:
    """Make a bundle's report.html again, from its manifest."""
    from tvm_lowrank.bundle.report import write_report

    print(f"report: {write_report(directory)}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The folder of a bundle.")],
    second: Annotated[Path, typer.Argument(help="The folder of another one.")],
) -> None:
    """Set two bundles side by side: latency, accuracy, and what became of each layer."""
    from tvm_lowrank.bundle.manifest import read_manifest
    from tvm_lowrank.bundle.verify import print_comparison

    print_comparison({str(path): read_manifest(path) for path in (first, second)})


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
