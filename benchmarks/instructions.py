"""How many instructions a 64-bit ARM library executes for an image, in each number format: counted by an emulator.

    python benchmarks/instructions.py [--network resnet18 | resnet50 | vgg16] [--size 64] [--target rpi5]

Times of an emulator say nothing, but what it executes is what a board executes. The schedules are those that fill the
vectors best by their count of instructions; nothing is tuned. It needs qemu-aarch64-static and the cross compiler.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.models import ResNet18, ResNet50, Vgg16, randomised  # noqa: E402
from tvm_lowrank import console  # noqa: E402
from tvm_lowrank.bundle.manifest import write_manifest  # noqa: E402
from tvm_lowrank.bundle.package import package  # noqa: E402
from tvm_lowrank.codegen.link import export_library  # noqa: E402
from tvm_lowrank.codegen.lower import build, kernels, lower  # noqa: E402
from tvm_lowrank.graph import find_sites  # noqa: E402
from tvm_lowrank.importers.importer import import_model  # noqa: E402
from tvm_lowrank.precision import with_formats  # noqa: E402
from tvm_lowrank.searching.latency.tiles import first_schedules  # noqa: E402
from tvm_lowrank.targets.profile import Profile, load_profile  # noqa: E402
from tvm_lowrank.targets.toolchain import cache_folder, cross_compiler  # noqa: E402

NETWORKS = {"resnet18": ResNet18, "resnet50": ResNet50, "vgg16": Vgg16}
QEMU = "qemu-aarch64-static"
SYSTEM = "/usr/aarch64-linux-gnu"  # what the cross compiler links with
TRANSLATED = re.compile(r"^0x([0-9a-f]+):")
EXECUTED = re.compile(r"^Trace \d+: 0x[0-9a-f]+ \[[0-9a-f]+/([0-9a-f]+)/")


def bundle(network: torch.nn.Module, size: int, profile: Profile, format: str, folder: Path) -> Path:
    """A bundle of the dense network in a format, whose kernels have the first of their schedules."""
    mod = import_model(network, input_shape=(1, 3, size, size))
    mod = with_formats(mod, {site.id: format for site in find_sites(mod)})
    lowered = lower(mod, batch=1, target=profile.tvm_target())
    database = first_schedules(kernels(lowered), lanes=profile.lanes, registers=profile.registers)
    compiler, options = profile.linker()
    folder.mkdir()
    export_library(build(lowered, database, profile.tvm_target()), folder / "model.so", cc=compiler, options=options)
    none = {"median": 1.0, "p10": 1.0, "p90": 1.0}
    manifest = {
        "model": type(network).__name__,
        "target": {"name": profile.name, **profile.target},
        "budget": None,
        "input_shape": [1, 3, size, size],
        "data": None,
        "accuracy": None,
        "latency_ms": {"dense": none, "compressed": none, "threads": 1, "batch": 1, "how": "not measured"},
        "speedup": 1.0,
        "sites": [],
    }
    write_manifest(folder, manifest)
    return folder


def executed(program: Path, bundle: Path, images: Path) -> int:
    """The instructions of a run of the program, of which some hundred thousand are not the network's."""
    command = [QEMU, "-L", SYSTEM, "-d", "in_asm,exec,nochain", str(program), str(bundle), str(images)]
    lengths: Counter[str] = Counter()
    total, block = 0, ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("IN:"):
                block = ""
            elif found := TRANSLATED.match(line):
                if not block:
                    block = found[1].lstrip("0")
                    lengths[block] = 0
                lengths[block] += 1
            elif found := EXECUTED.match(line):
                total += lengths[found[1].lstrip("0")]
    assert running.returncode == 0, f"{QEMU} ended with {running.returncode}"
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--target", default="rpi5")
    args = parser.parse_args()
    if shutil.which(QEMU) is None:
        parser.error(f"no {QEMU}; install qemu-user-static")
    profile = load_profile(args.target)
    network = randomised(NETWORKS[args.network]()).eval()
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        one, two = root / "one.f32", root / "two.f32"
        for path, images in ((one, 1), (two, 2)):
            np.random.default_rng(0).standard_normal((images, 3, args.size, args.size)).astype("float32").tofile(path)
        for format in profile.formats:
            console.phase(f"{format}: building")
            made = package(
                bundle(network, args.size, profile, format, root / format),
                root / f"{format}-package",
                with_runtime=True,
                cache_dir=cache_folder(),
            )
            program, compiler = root / "classify", cross_compiler("aarch64-linux-gnu")
            source = ROOT / "examples" / "c" / "classify.c"
            options = [f"-I{made / 'include'}", f"-L{made / 'lib'}", "-ltlr", f"-Wl,-rpath,{made / 'lib'}"]
            options.append("-Wl,--allow-shlib-undefined")
            command = [compiler, "-x", "c", str(source), "-x", "none", *options, "-o", str(program)]
            subprocess.run(command, check=True)
            console.phase(f"{format}: counting")
            counts[format] = executed(program, made, two) - executed(program, made, one)
    first = next(iter(counts.values()))
    rows = [(format, f"{count / 1e6:.1f} M", f"{first / count:.2f}") for format, count in counts.items()]
    console.table(
        f"{args.network} at {args.size}x{args.size}, {profile.name}",
        ("format", "instructions an image", "fewer by"),
        rows,
    )


if __name__ == "__main__":
    main()
