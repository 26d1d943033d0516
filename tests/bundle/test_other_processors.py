"""Bundles on processors that lack what their code needs: a line that names it, and never a signal."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import tvm_lowrank
from support.command import Run
from tvm_lowrank.bundle.manifest import read_manifest, write_manifest
from tvm_lowrank.bundle.package import package
from tvm_lowrank.codegen import processor
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.errors import UserError
from tvm_lowrank.targets.toolchain import cross_compiler, host_arch, triple_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_arch() != "x86_64", reason="the bundles are for x86-64"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHAPE = (2, 3, 4, 4)
MISSING = "avx512f, avx512dq, avx512cd, avx512bw, avx512vl"
HASWELL = "flags\t\t: pni ssse3 sse4_1 sse4_2 popcnt movbe abm bmi1 bmi2 avx avx2 fma f16c\n"


def compiled(cpu: str, *, seed: int = 0) -> Any:
    """main(x): flatten (2, 3, 4, 4), and multiply with weights, for a processor."""
    weight = np.random.default_rng(seed).normal(size=(48, 64)).astype("float32")
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            flat = builder.emit(relax.op.reshape(x, (2, 48)))
            y = builder.emit_output(builder.emit(relax.op.nn.relu(relax.op.matmul(flat, relax.const(weight)))))
        builder.emit_func_output(y)
    # full vectors: the hidden ones of an emulated processor must be met
    return tvm.compile(
        builder.get(), target=tvm.target.Target({"kind": "llvm", "mcpu": cpu, "mattr": ["-prefer-256-bit"]})
    )


def make_bundle(folder: Path, cpu: str) -> Path:
    folder.mkdir()
    for name in ("model.so", "dense.so"):
        export_library(compiled(cpu), folder / name)
    (folder / "plan.json").write_text('{"schema": 1, "sites": {}}')
    quantiles = {"median": 2.0, "p10": 1.9, "p90": 2.2}
    write_manifest(
        folder,
        {
            "model": {"source": "tiny"},
            "target": {"name": "x86", "kind": "llvm", "mcpu": cpu},
            "budget": 1.0,
            "input_shape": list(SHAPE),
            "data": None,
            "accuracy": None,
            "latency_ms": {"dense": quantiles, "compressed": quantiles, "threads": 1, "batch": 2, "how": "measured"},
            "speedup": 1.0,
            "sites": [],
        },
    )
    return folder


@dataclass(frozen=True)
class Made:
    """A bundle for AVX-512, one for AVX2, one for AVX-512 that says nothing of it; and an application in C.

    ``levels`` has libraries for AVX-512, for AVX2 and for SSE4.2, with other weights each.
    """

    avx512: Path
    avx2: Path
    silent: Path
    levels: Path
    program: Path
    images: Path

    def run(self, cpu: str, bundle: Path) -> subprocess.CompletedProcess[str]:
        """The application on an emulated processor."""
        qemu = shutil.which("qemu-x86_64-static")
        assert qemu is not None
        command = [qemu, "-cpu", cpu, self.program, bundle, self.images]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("processors")
    avx512 = make_bundle(folder / "avx512", "skylake-avx512")
    avx2 = make_bundle(folder / "avx2", "haswell")
    silent = Path(shutil.copytree(avx512, folder / "silent"))
    compiled("skylake-avx512").export_library(str(silent / "model.so"))
    manifest = read_manifest(silent)
    del manifest["processor"]
    write_manifest(silent, manifest)
    out = package(avx2, folder / "package", with_runtime=True, cache_dir=folder / "cache")
    program, images = folder / "classify", folder / "images.f32"
    paths = [f"-I{out / 'include'}", f"-L{out / 'lib'}", "-ltlr", f"-Wl,-rpath,{out / 'lib'}"]
    command = [cross_compiler(triple_of("x86_64")), "-x", "c", "-std=c99", str(EXAMPLES / "c" / "classify.c")]
    command += ["-x", "none", *paths, "-Wl,--allow-shlib-undefined", "-o", str(program)]
    subprocess.run(command, check=True)
    np.random.default_rng(1).standard_normal((3, *SHAPE[1:])).astype("float32").tofile(images)
    return Made(avx512, avx2, silent, with_levels(avx512, folder / "levels"), program, images)


def with_levels(avx512: Path, folder: Path) -> Path:
    """The bundle for AVX-512 with levels below it."""
    shutil.copytree(avx512, folder)
    levels = [("x86-64-v4", ""), ("x86-64-v3", "x86-64-v3"), ("x86-64-v2", "x86-64-v2")]
    for seed, (cpu, name) in enumerate(levels):
        (folder / name).mkdir(exist_ok=True)
        export_library(compiled(cpu, seed=seed), folder / name / "model.so")
        shutil.copy(folder / name / "model.so", folder / name / "dense.so")
    entries = [{"target": {"name": cpu}, "folder": name, "latency_ms": None} for cpu, name in levels]
    write_manifest(folder, {**read_manifest(folder), "levels": entries})
    return folder


@pytest.fixture
def haswell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine tells that it has AVX2, and no more."""
    path = tmp_path / "cpuinfo"
    path.write_text(HASWELL)
    monkeypatch.setattr(processor, "CPUINFO", path)


def test_the_manifest_names_features(made: Made) -> None:
    found = read_manifest(made.avx512)["processor"]
    assert found["arch"] == "x86_64" and set(MISSING.split(", ")) < set(found["features"])
    assert set(read_manifest(made.avx2)["processor"]["features"]) == set(HASWELL.split()[2:])
    assert "processor" not in read_manifest(made.silent)


@pytest.mark.parametrize("which", ["model", "dense"])
def test_python_names_what_is_missing(made: Made, haswell: None, which: Any) -> None:
    tvm_lowrank.load(made.avx2, which=which)
    with pytest.raises(UserError) as error:
        tvm_lowrank.load(made.avx512, which=which)
    assert f"{which}.so needs a processor with {MISSING}, which this one does not have; " in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_exits_with_2(made: Made, haswell: None, run: Run, tmp_path: Path) -> None:
    done = run("bench", made.avx512, "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ") and f"dense.so needs a processor with {MISSING}, which this one" in line, done


def test_so_does_code_for_a_processor_that_was_named(
    made: Made, haswell: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_LOWRANK_HOST_CPU", "skylake-avx512")
    done = run("bench", made.avx2, "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 2 and f"needs a processor with {MISSING}" in done.stderr


@pytest.mark.needs("qemu-x86_64-static")
def test_an_application_on_an_older_processor(made: Made) -> None:
    done = made.run("Haswell", made.avx512)
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("qemu-x86_64-static: warning: TCG")]
    assert lines == [
        f"error: {made.avx512}/model.so needs a processor with {MISSING}, which this one does not have",
    ]
    done = made.run("Haswell", made.avx2)
    assert done.returncode == 0 and len(done.stdout.split()) == 3


@pytest.mark.needs("qemu-x86_64-static")
def test_without_the_text_it_would_be_a_signal(made: Made) -> None:
    """Else the test above could not fail."""
    assert made.run("Haswell", made.silent).returncode == -signal.SIGILL


def test_manifests_without_it_are_read(made: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.avx2, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["processor"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert tvm_lowrank.load(copy)(np.zeros(SHAPE, "float32")).shape == (2, 64)


def answers(seed: int, images: np.ndarray) -> np.ndarray:
    """What the library with these weights computes."""
    weight = np.random.default_rng(seed).normal(size=(48, 64)).astype("float32")
    return np.maximum(images.reshape(len(images), -1) @ weight, 0)


def test_python_takes_the_best_level(made: Made, haswell: None, tmp_path: Path) -> None:
    x = np.fromfile(made.images, "float32").reshape(-1, *SHAPE[1:])
    model = tvm_lowrank.load(made.levels)
    assert model.path == made.levels / "x86-64-v3" / "model.so"
    np.testing.assert_allclose(model(x), answers(1, x), rtol=1e-5, atol=1e-5)
    processor.CPUINFO.write_text("flags\t\t: pni ssse3 sse4_1 sse4_2 popcnt\n")
    np.testing.assert_allclose(tvm_lowrank.load(made.levels, which="dense")(x), answers(2, x), rtol=1e-5, atol=1e-5)
    # what nobody needs may be deleted
    processor.CPUINFO.write_text(HASWELL)
    copy = Path(shutil.copytree(made.levels, tmp_path / "copy"))
    shutil.rmtree(copy / "x86-64-v3")
    np.testing.assert_allclose(tvm_lowrank.load(copy)(x), answers(2, x), rtol=1e-5, atol=1e-5)
    processor.CPUINFO.write_text("flags\t\t: pni\n")
    with pytest.raises(UserError, match=r"x86-64-v2/model.so needs a processor with ssse3, .*sse4_2, "):
        tvm_lowrank.load(made.levels)


def test_packages_have_all_levels_and_damaged_ones_are_found(made: Made, tmp_path: Path) -> None:
    out = package(made.levels, tmp_path / "package", with_runtime=False, cache_dir=tmp_path / "cache")
    assert sorted(str(path.parent.relative_to(out)) for path in out.rglob("model.so")) == [
        ".",
        "x86-64-v2",
        "x86-64-v3",
    ]
    damaged = Path(shutil.copytree(made.levels, tmp_path / "damaged"))
    (damaged / "x86-64-v2" / "dense.so").write_bytes(b"")
    with pytest.raises(UserError, match=r"x86-64-v2/dense.so is not the file"):
        package(damaged, tmp_path / "other", with_runtime=False, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("folder", ["..", "../avx2", "/tmp", 3, None])
def test_levels_are_folders_of_the_bundle(made: Made, tmp_path: Path, folder: object) -> None:
    copy = Path(shutil.copytree(made.levels, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["levels"][1]["folder"] = folder
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no valid 'folder' in level 2"):
        tvm_lowrank.load(copy)
    done = subprocess.run([made.program, copy, made.images], capture_output=True, text=True)
    assert done.returncode == 1 and "has no valid 'levels'; restore it" in done.stderr


@pytest.mark.needs("qemu-x86_64-static")
@pytest.mark.parametrize(("cpu", "seed"), [("Haswell", 1), ("Nehalem", 2)])
def test_an_application_takes_the_best_level(made: Made, cpu: str, seed: int) -> None:
    x = np.fromfile(made.images, "float32").reshape(-1, *SHAPE[1:])
    done = made.run(cpu, made.levels)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == answers(seed, x).argmax(1).tolist()


@pytest.mark.needs("qemu-x86_64-static")
def test_an_application_where_there_is_no_level(made: Made) -> None:
    done = made.run("core2duo", made.levels)
    assert done.returncode == 1
    assert f"{made.levels}/x86-64-v2/model.so needs a processor with " in done.stderr and "sse4_2" in done.stderr
