"""A packaged bundle on a clean system: in a root folder with nothing but the C library, here and under QEMU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_lowrank
from support import arm_python, packaged_network
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import sha256
from tvm_lowrank.bundle.package import package
from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.options import CompileOptions
from tvm_lowrank.searching.commands.apply import apply_plan
from tvm_lowrank.targets.toolchain import cross_compiler, host_arch, triple_of

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARM = pytest.param("aarch64", marks=pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
COUNT, SIZE = 5, 12


@dataclass(frozen=True)
class Made:
    """A package, and programs that use it, for one architecture; ``root`` is a clean system that has them."""

    arch: str
    package: Path
    root: Path
    images: np.ndarray
    classes: list[int]

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A program of the clean system, whose root folder is all that it sees."""
        emulator = [] if self.arch == host_arch() else ["/qemu"]
        return inside(self.root, *emulator, f"/bin/{program}", *arguments)


def inside(root: Path, *command: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing but a root folder."""
    enter = ["chroot"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "chroot"]
    variables = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run([*enter, root, *command], capture_output=True, text=True, env=variables, timeout=timeout)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, 3, SIZE, SIZE)).astype("float32")


@pytest.fixture(scope="module", params=[host_arch(), ARM] if host_arch() != "aarch64" else [host_arch()])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> Made:
    """A batch of two, so that five images end with half of one."""
    folder, arch = tmp_path_factory.mktemp(request.param), request.param
    model = f"{Path(packaged_network.__file__)}:model"
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "sites": {"2": {"method": "spatial", "rank": 16}}}))
    here = arch == host_arch()
    options: dict[str, Any] = {} if here else {"target": "arm", "emulate": True}
    asked = CompileOptions(
        out=folder / "bundle",
        model=model,
        input_shape=(1, 3, SIZE, SIZE),
        batch=2,
        trials=1,
        cache=folder / "cache",
        **options,
    )
    apply_plan(asked, plan)
    out = package(folder / "bundle", folder / "package", with_runtime=True, cache_dir=folder / "cache")
    root = clean_root(folder / "root", arch, out)
    compile_examples(arch, out, root)
    images.tofile(root / "images.f32")
    np.save(root / "images.npy", images)
    if here:
        scores = tvm_lowrank.load(folder / "bundle")(images)
    else:
        dense = predict(TorchBridge(import_model(model, input_shape=asked.input_shape)), images)
        scores = dense  # rank 16 of 16 channels: the same function
    return Made(arch, out, root, images, scores.argmax(axis=1).tolist())


def clean_root(root: Path, arch: str, package: Path) -> Path:
    """A root folder with a package, the C and C++ libraries, and QEMU where it is needed."""
    shutil.copytree(package, root / "package")
    (root / "bin").mkdir()
    triple = triple_of(arch)
    if arch != host_arch():
        qemu = shutil.which(f"qemu-{arch}-static")
        assert qemu is not None
        shutil.copy(qemu, root / "qemu")
    compiler = cross_compiler(triple)
    for name in ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6",
                 "libgcc_s.so.1", "libz.so.1"):  # fmt: skip
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if os.path.isabs(found):
            (root / "lib").mkdir(exist_ok=True)
            shutil.copy(os.path.realpath(found), root / "lib" / name)
    loader = {"x86_64": "lib64/ld-linux-x86-64.so.2", "aarch64": "lib/ld-linux-aarch64.so.1"}[arch]
    (root / loader).parent.mkdir(exist_ok=True)
    found = subprocess.run(
        [compiler, f"-print-file-name={Path(loader).name}"], capture_output=True, text=True
    ).stdout.strip()
    shutil.copy(os.path.realpath(found), root / loader)
    return root


def compile_examples(arch: str, package: Path, root: Path) -> None:
    compiler = cross_compiler(triple_of(arch))
    paths = [f"-I{package / 'include'}", f"-L{package / 'lib'}", "-ltlr"]
    # $ORIGIN would need /proc
    link = ["-Wl,-rpath,/package/lib", "-Wl,--allow-shlib-undefined"]
    sources = {"classify_cpp": (EXAMPLES / "cpp" / "classify.cc", "c++", "-std=c++17"),
               "classify_c": (EXAMPLES / "c" / "classify.c", "c", "-std=c99")}  # fmt: skip
    for name, (source, language, standard) in sources.items():
        command = [compiler, "-Wall", "-Werror", standard, "-x", language, str(source), "-x", "none", *paths, *link]
        subprocess.run([*command, "-o", str(root / "bin" / name)], check=True)


@pytest.mark.parametrize("program", ["classify_c", "classify_cpp"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_applications_on_a_clean_system(made: Made, program: str, threads: str) -> None:
    done = made.run(program, "/package", "/images.f32", threads)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == made.classes


@pytest.mark.parametrize("made", [host_arch()], indirect=True)
def test_python_needs_only_numpy(made: Made) -> None:
    program = EXAMPLES / "python" / "classify.py"
    arguments = [sys.executable, str(program), str(made.package), str(made.root / "images.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == made.classes


@pytest.mark.parametrize("made", [ARM], indirect=True)
def test_python_on_a_clean_arm_system(made: Made, tmp_path: Path) -> None:
    python = arm_python.make(tmp_path)
    qemu = shutil.which("qemu-aarch64-static")
    assert qemu is not None
    shutil.copy(qemu, tmp_path / "qemu")
    shutil.copytree(made.package, tmp_path / "package")
    shutil.copy(EXAMPLES / "python" / "classify.py", tmp_path)
    shutil.copy(made.root / "images.npy", tmp_path)
    command = ("/qemu", str(python), "/classify.py", "/package", "/images.npy")
    done = inside(tmp_path, *command, timeout=300, PYTHONPATH="/packages")
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == made.classes


def test_checksums_are_those_of_the_files(made: Made) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made.package, capture_output=True)
    assert done.returncode == 0
    listed = {line.split()[1] for line in (made.package / "SHA256SUMS").read_text().splitlines()}
    present = {str(path.relative_to(made.package)) for path in made.package.rglob("*") if path.is_file()}
    assert listed == present - {"SHA256SUMS"}
    assert {"lib/libtlr.so", "lib/libtvm_runtime.so", "include/tlr.h", "model.so", "manifest.json"} <= listed


def test_wrong_input_is_an_error(made: Made) -> None:
    (made.root / "odd.f32").write_bytes(b"\0" * 40)
    done = made.run("classify_cpp", "/package", "/odd.f32")
    assert done.returncode == 1 and "an image has 432 floats; 10 are not a number of images" in done.stderr


def _text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        path = bundle / "manifest.json"
        path.write_text(change(path.read_text()))

    return damage


def _entry(**changes: Any) -> Callable[[Path], None]:
    def change(text: str) -> str:
        manifest = {**json.loads(text), **changes}
        return json.dumps({key: value for key, value in manifest.items() if value is not ...})

    return _text(change)


def _library(change: Callable[[bytes], bytes], *, hashed: bool = False) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        path = bundle / "model.so"
        path.write_bytes(change(path.read_bytes()))
        if hashed:
            files = json.loads((bundle / "manifest.json").read_text())["files"]
            _entry(files={**files, "model.so": sha256(path)})(bundle)

    return damage


def _flipped(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(share * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


def _machine(number: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:18] + number.to_bytes(2, "little") + content[20:]


def _removed(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def _folder(bundle: Path) -> None:
    (bundle / "model.so").unlink()
    (bundle / "model.so").mkdir()


def damages() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Ways in which a bundle can be unusable."""
    yield "no manifest", _removed("manifest.json")
    yield "no library", _removed("model.so")
    yield "library is a folder", _folder
    for share in (0.0, 0.3, 0.7, 0.99):
        yield f"manifest cut at {share}", _text(lambda text, share=share: text[: int(share * len(text))])
    for name, text in {"a list": "[]", "a number": "1", "null": "null", "no JSON": "{,}", "binary": "\x00\x01"}.items():
        yield f"manifest is {name}", _text(lambda _, text=text: text)
    yield "manifest is nested deeply", _text(lambda _: "[" * 1_000_000)
    for schema in (0, -1, 2, 99, "1", None, [1]):
        yield f"schema is {schema!r}", _entry(schema=schema)
    shapes = (
        [1, 3, 12],
        [0, 3, 12, 12],
        [-1, 3, 12, 12],
        ["1", 3, 12, 12],
        [1, 3, 12, 12, 12],
        None,
        {},
        [2, 3, 12, 1.5],
    )
    for shape in shapes:
        yield f"input_shape is {shape!r}", _entry(input_shape=shape)
    for files in ({}, None, [], {"model.so": 5}, {"model.so": None}, {"model.so": ""}):
        yield f"files is {files!r}", _entry(files=files)
    yield "no schema", _entry(schema=...)
    yield "no files", _entry(files=...)
    yield "no input_shape", _entry(input_shape=...)
    for share in (0.0, 0.1, 0.5, 0.999):
        yield f"library cut at {share}", _library(lambda content, share=share: content[: int(share * len(content))])
        yield f"library changed at {share}", _library(_flipped(share))
    yield "library is longer", _library(lambda content: content + b"\0")
    for number, name in ((3, "i386"), (8, "MIPS"), (22, "S390"), (243, "RISC-V")):
        yield f"library for {name}", _library(_machine(number), hashed=True)
    yield "library is no library", _library(lambda _: b"no library at all, but with the right checksum", hashed=True)
    yield "library is empty, hashed", _library(lambda _: b"", hashed=True)


CASES = dict(damages())


@pytest.mark.parametrize("case", CASES)
def test_an_unusable_bundle_is_an_error_and_no_crash(made: Made, case: str) -> None:
    """In C (on the clean system) and in Python."""
    bundle = made.root / "damaged"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(made.root / "package", bundle, ignore=shutil.ignore_patterns("lib", "include"))
    CASES[case](bundle)
    done = made.run("classify_c", "/damaged", "/images.f32")
    assert done.returncode == 1 and done.stdout == "", (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if made.arch == host_arch():
        with pytest.raises(UserError) as error:
            tvm_lowrank.load(bundle)
        assert "\n" not in str(error.value)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("made", [ARM], indirect=True)
def test_a_bundle_for_another_architecture(made: Made) -> None:
    """Its own libraries, with which the package is consistent, on a machine of another kind."""
    with pytest.raises(UserError, match="is it built for this kind of machine"):
        tvm_lowrank.load(made.package)


@pytest.mark.parametrize("made", [host_arch()], indirect=True)
def test_without_runtime(made: Made, tmp_path: Path) -> None:
    out = package(made.package, tmp_path / "plain", with_runtime=False, cache_dir=tmp_path)
    assert not (out / "lib").exists() and (out / "model.so").is_file()
    with pytest.raises(UserError, match="not empty; use --force"):
        package(made.package, out, with_runtime=False, cache_dir=tmp_path)
    with pytest.raises(UserError, match="is the bundle itself"):
        package(out, out, with_runtime=False, cache_dir=tmp_path, force=True)
