"""The commands about targets: `targets`, `doctor`, `device emulate` and `device build`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tvm_lowrank import console
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import copy
from tvm_lowrank.targets.toolchain import cache_folder

device = typer.Typer(no_args_is_help=True, help="The server that runs on a device, and emulated devices.")

Arch = Annotated[str, typer.Option(help="aarch64 or x86_64.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of built servers (else $TVM_LOWRANK_CACHE or ~/.cache).")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(targets)
    app.command()(doctor)
    app.add_typer(device, name="device")


def targets() -> None:
    """List the device profiles that come with the tool."""
    from tvm_lowrank.targets.profile import EXAMPLE, known_profiles, load_profile

    rows = []
    for profile in map(load_profile, known_profiles()):
        try:
            compiler = profile.linker()[0]
        except UserError:
            compiler = "missing"
        vectors = f"{profile.registers} × {profile.lanes}"
        made = (profile.code, profile.cores, vectors, ", ".join(profile.formats), compiler)
        rows.append((profile.name, profile.description, *made, profile.rpc_key or "this machine"))
    columns = ("target", "device", "code", "cores", "vectors", "formats", "compiler", "RPC key")
    console.table("", columns, rows)
    console.results.print(
        "Vectors: registers × float32 lanes. Formats: what --precision may be. For a device of your own, write a "
        f"profile and give its path: --target my.toml ({EXAMPLE} is an example). tvm_lowrank doctor --target T says "
        "what is missing.",
        soft_wrap=True,
    )


def doctor(
    target: Annotated[str, typer.Option(help="A device profile, by name (see targets) or as a .toml file.")] = "x86",
    rpc_tracker: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the boards' tracker (else $TVM_TRACKER_HOST:$TVM_TRACKER_PORT)."),
    ] = None,
    rpc_key: Annotated[
        str | None,
        typer.Option(envvar="TVM_TRACKER_KEY", help="What the boards are registered as (else the profile's)."),
    ] = None,
    emulate: Annotated[
        bool,
        typer.Option("--emulate", help="Use an emulated board: one at --rpc-tracker, or else one that is started."),
    ] = False,
    cache: Cache = None,
) -> None:
    """Check all that a search on a target needs, from the compiler to the device; exits with 1 if something fails."""
    from tvm_lowrank.targets import doctor as examination
    from tvm_lowrank.targets.emulate import emulated
    from tvm_lowrank.targets.profile import load_profile
    from tvm_lowrank.targets.tracker import tracker_address

    profile, tracker = load_profile(target), tracker_address(rpc_tracker)
    if profile.is_host and (emulate or rpc_tracker):
        raise UserError(f"target {profile.name} is this machine; leave --emulate and --rpc-tracker out")
    with ExitStack() as stack:
        if emulate and rpc_tracker is None:
            boards = stack.enter_context(emulated(profile.arch, cache_dir=cache_folder(cache), key=rpc_key))
            tracker, rpc_key, emulate = (boards.host, boards.port), boards.key, boards.emulated
        profile = replace(profile, emulated=emulate)
        well = examination.doctor(profile, tracker=tracker, key=rpc_key)
    raise typer.Exit(0 if well else 1)


@device.command()
def emulate(
    arch: Arch = "aarch64",
    boards: Annotated[int, typer.Option(help="How many.")] = 1,
    key: Annotated[str | None, typer.Option(help="What they are registered as (else emulated-ARCH).")] = None,
    cache: Cache = None,
) -> None:
    """Run a tracker and emulated boards until Ctrl-C."""
    from tvm_lowrank.targets.emulate import emulate as run

    run(arch, boards=boards, cache_dir=cache_folder(cache), key=key)


@device.command()
def build(
    arch: Arch = "aarch64",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("board"),
    cache: Cache = None,
) -> None:
    """Build the server for a device, as a folder to be copied there; the device needs no Python."""
    from tvm_lowrank.targets.server import PROGRAM, build_server

    folder = build_server(arch, cache_dir=cache_folder(cache))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder with --out") from error
    for file in folder.iterdir():
        copy(file, out / file.name)
    print(f"{out}: copy it to the device and run {out.name}/{PROGRAM} --tracker HOST:PORT --key KEY there")
