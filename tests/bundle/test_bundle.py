from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_lowrank.bundle import library, verify
from tvm_lowrank.bundle.library import CompiledModel
from tvm_lowrank.bundle.manifest import prepare_out, read_manifest, write_manifest
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.data.metric import evaluate, load_metric, paired_drop
from tvm_lowrank.data.splits import fingerprint, load_data
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import write_text
from tvm_lowrank.plan import Choice, Plan

BATCH = 2
SHAPE = (BATCH, 3, 4, 4)
rng = np.random.default_rng(0)
WEIGHT = rng.normal(size=(48, 5)).astype("float32")
NOISE = rng.normal(size=(48, 5)).astype("float32") * 0.4
COUNTED = {"ms": 1.5, "predicted": 0.01, "damage": 0.02, "drop": 1, "error": 0.4, "expected": 0.9}
TRIED = {"plan": {"schema": 1, "sites": {}}, "fit": "decomposed", **COUNTED}


def compiled(weight: np.ndarray) -> Any:
    """main(x): flatten (2, 3, 4, 4) and multiply with ``weight``."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            flat = builder.emit(relax.op.reshape(x, (BATCH, 48)))
            y = builder.emit_output(builder.emit(relax.op.matmul(flat, relax.const(weight))))
        builder.emit_func_output(y)
    return tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm"}))


def manifest(splits: Any, dense: np.ndarray, compressed: np.ndarray) -> dict[str, Any]:
    drop, ci95 = paired_drop(dense, compressed)
    quantiles = {"median": 2.0, "p10": 1.9, "p90": 2.2}
    site = {"id": "conv[1]", "method": "spatial", "rank": 16, "ms": 0.5, "dense_ms": 1.0, "macs": 10, "dense_macs": 20}
    return {
        "model": {"source": "tiny"},
        "target": {"kind": "llvm"},
        "budget": 1.0,
        "input_shape": list(SHAPE),
        "data": {
            "source": splits.name,
            "mean": None,
            "std": None,
            "evaluation_sha256": fingerprint(splits),
        },
        "accuracy": {
            "metric": "top1",
            "n": len(dense),
            "dense": 100 * dense.mean(),
            "compressed": 100 * compressed.mean(),
            "drop": drop,
            "ci95": ci95,
            "looks": 1,
            "on_device": 1,
        },
        "latency_ms": {"dense": quantiles, "compressed": quantiles, "threads": 1, "batch": BATCH, "how": "measured"},
        "speedup": np.float32(1.5),
        "sites": [{**site, "reason": "fastest within the budget"}],
    }


def write_data(path: Path, *, seed: int = 1, noise: float = 0.0) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(41, 3, 4, 4)).astype("float32")
    y = (x.reshape(41, 48) @ WEIGHT).argmax(1)
    y[:4] = (y[:4] + 1) % 5
    x += noise * random.normal(size=x.shape).astype("float32")
    np.savez(path, calibration_x=x, selection_x=x, selection_y=y, evaluation_x=x, evaluation_y=y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete bundle and the data that it names."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root / "data.npz")
    out = prepare_out(root / "bundle")
    export_library(compiled(WEIGHT + NOISE), out / "model.so")
    export_library(compiled(WEIGHT), out / "dense.so")
    write_text(out / "plan.json", Plan({"conv[1]": Choice("spatial", 16)}).to_json())
    splits = load_data(root / "data.npz", input_shape=(3, 4, 4))
    metric = load_metric("top1")
    dense, compressed = (
        evaluate(CompiledModel(out / name, SHAPE), *splits.evaluation, metric) for name in ("dense.so", "model.so")
    )
    write_manifest(out, manifest(splits, dense, compressed))
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value) and "; " in str(error.value)


# the output folder


def test_out_is_created_and_empty_is_fine(tmp_path: Path) -> None:
    assert prepare_out(tmp_path / "new").is_dir()
    prepare_out(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_out_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty; use --force") as error:
        prepare_out(tmp_path)
    one_line(error)
    prepare_out(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = [
        (tmp_path / "file", "is a file"),
        (tmp_path / "a" / "b", "does not exist"),
        (Path("/proc/x"), "cannot write"),
    ]
    for out, message in places:
        with pytest.raises(UserError, match=message) as error:
            prepare_out(out, force=True)
        one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        prepare_out(tmp_path)


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "first ä\n")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device; make room"):
        write_text(path, "second\n")
    assert path.read_text() == "first ä\n"
    assert list(tmp_path.iterdir()) == [path]


def test_linking_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = compiled(WEIGHT)
    for compiler, message in (
        ("no-such-g++", "no C\\+\\+ compiler \\(no-such-g\\+\\+\\)"),
        ("false", "false cannot link"),
    ):
        with pytest.raises(UserError, match=message) as error:
            export_library(executable, tmp_path / "model.so", cc=compiler)
        one_line(error)
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        export_library(executable, tmp_path / "model.so")
    assert list(tmp_path.iterdir()) == []


# the manifest


def test_manifest_is_stable_and_readable(finished: Path) -> None:
    text = (finished / "manifest.json").read_text()
    read = read_manifest(finished)
    assert text == json.dumps(read, indent=2, sort_keys=True) + "\n"
    assert read["schema"] == 1 and read["speedup"] == 1.5
    assert set(read["files"]) == {"model.so", "dense.so", "plan.json"}
    assert read["versions"]["apache-tvm"].startswith("0.")
    assert sorted(path.name for path in finished.iterdir()) == ["dense.so", "manifest.json", "model.so", "plan.json"]


def test_manifest_of_a_careless_caller_is_refused(finished: Path, copy: Path) -> None:
    good = {key: value for key, value in read_manifest(finished).items() if key not in ("schema", "files")}
    (copy / "manifest.json").unlink()
    for change in (
        {"accuracy": {"metric": "top1"}},
        {"speedup": float("nan")},
        {"sites": [{"id": "a"}]},
        {"plans": [{**TRIED, "ms": None}]},
    ):
        with pytest.raises(ValueError):
            write_manifest(copy, {**good, **change})
    with pytest.raises(TypeError, match="ndarray"):
        write_manifest(copy, {**good, "speedup": np.ones(2)})
    assert not (copy / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[]", "no valid 'schema'"),
        ('{"schema": "1"}', "no valid 'schema'"),
        ('{"schema": 2}', "schema 2, this version reads 1; update"),
        ('{"schema": 1}', "has no 'model'"),
    ],
)
def test_bad_manifests(copy: Path, text: str | None, message: str) -> None:
    path = copy / "manifest.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_manifest(copy)
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": {}}, "no 'metric' in 'accuracy'"),
        ({"accuracy": 3}, "no 'metric' in 'accuracy'"),
        ({"sites": [{"id": "conv7"}]}, "no 'method' in site 'conv7'"),
        ({"sites": None}, "no list of 'sites'"),
        ({"plans": None}, "no list of 'plans'"),
        ({"plans": {"a": TRIED}}, "no list of 'plans'"),
        ({"plans": [TRIED, "b"]}, "no list of 'plans'"),
        ({"plans": [TRIED, {}]}, "no valid 'plan' in plan 2"),
        ({"plans": [{**TRIED, "plan": Plan().to_json()}]}, "no valid 'plan' in plan 1"),
        ({"plans": [{**TRIED, "fit": 1}]}, "no valid 'fit' in plan 1"),
        ({"plans": [{**TRIED, "ms": "1.5"}]}, "no valid 'ms' in plan 1"),
        ({"plans": [TRIED, {**TRIED, "damage": None}]}, "no valid 'damage' in plan 2"),
        ({"plans": [{**TRIED, "drop": math.nan}]}, "no valid 'drop' in plan 1"),
        ({"plans": [{**TRIED, "error": -math.inf}]}, "no valid 'error' in plan 1"),
        ({"plans": [{**TRIED, "expected": 10**400}]}, "no valid 'expected' in plan 1"),
        ({"input_shape": [3, 4, 4]}, "input_shape"),
        ({"files": {"model.so": "0"}}, "is not the file"),
    ],
)
def test_edited_manifests(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(UserError, match=message) as error:
        library.load(copy)
    one_line(error)


def test_missing_and_damaged_libraries(copy: Path) -> None:
    with pytest.raises(UserError, match="no such bundle"):
        library.load(copy / "elsewhere")
    (copy / "dense.so").unlink()
    library.load(copy)
    with pytest.raises(UserError, match=r"has no dense\.so"):
        library.load(copy, which="dense")
    content = (copy / "model.so").read_bytes()
    (copy / "model.so").unlink()  # it is loaded: changing its content would crash this process
    (copy / "model.so").write_bytes(content[:-1])
    with pytest.raises(UserError, match="is not the file"):
        library.load(copy)
    (copy / "model.so").write_text("no library")
    with pytest.raises(UserError, match="cannot load") as error:
        CompiledModel(copy / "model.so", SHAPE)
    one_line(error)
    (copy / "model.so").unlink()
    with pytest.raises(UserError, match=r"has no model\.so"):
        library.load(copy)


# running


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_number_of_images(finished: Path, n: int) -> None:
    x = rng.normal(size=(n, 3, 4, 4)).astype("float32")
    dense = library.load(finished, which="dense")
    np.testing.assert_allclose(dense(x), x.reshape(n, 48) @ WEIGHT, rtol=1e-4, atol=1e-4)
    model = library.load(str(finished), threads=1)
    strided = np.asfortranarray(x)
    np.testing.assert_allclose(model(strided), x.reshape(n, 48) @ (WEIGHT + NOISE), rtol=1e-4, atol=1e-4)
    assert model.path == finished / "model.so"
    assert model.manifest["budget"] == 1.0


def test_a_library_that_took_the_place_of_another_is_loaded_anew(tmp_path: Path) -> None:
    x = rng.normal(size=SHAPE).astype("float32")
    models = []
    for weight in (WEIGHT, -WEIGHT):
        export_library(compiled(weight), tmp_path / "model.so")
        models.append(CompiledModel(tmp_path / "model.so", SHAPE))
    first, second = models[0](x), models[1](x)
    np.testing.assert_array_equal(first, -second)


def test_threads_leave_the_process_where_it_was(finished: Path) -> None:
    cores = os.sched_getaffinity(0)
    for threads in (1, 2):
        library.load(finished, threads=threads)
        assert os.sched_getaffinity(0) == cores


def test_other_inputs_are_refused(finished: Path) -> None:
    model = library.load(finished)
    wrong: list[Any] = [np.zeros((1, 3, 4, 4)), np.zeros((1, 4, 4, 3), "float32"), np.zeros((3, 4, 4), "float32")]
    for x in [*wrong, np.zeros((0, 3, 4, 4), "float32"), [[1.0]]]:
        with pytest.raises(UserError, match=r"takes a float32 numpy array of shape \(n, 3, 4, 4\)") as error:
            model(x)
        one_line(error)
    with pytest.raises(UserError, match="at least 1"):
        library.load(finished, threads=0)


# repeating the accuracy


def test_verify_repeats_the_accuracy(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify.verify(finished)
    assert result.ok and result.n == 41
    assert result.dense == pytest.approx(100 * 37 / 41) and result.compressed < result.dense
    verify.print_verification(result)
    verify.print_manifest(read_manifest(finished))
    printed = capsys.readouterr().out
    for text in ("the accuracy is that of the manifest", "90.24", "conv[1]", "1.50", "looked at 1 time"):
        assert text in printed


def test_verify_notices_another_accuracy(copy: Path) -> None:
    stated = json.loads((copy / "manifest.json").read_text())["accuracy"]
    edit(copy, accuracy={**stated, "compressed": stated["compressed"] + 0.01})
    result = verify.verify(copy)
    assert not result.ok and "NOT that of the manifest" in result.verdict


def test_verify_notices_other_data(finished: Path, copy: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "other.npz", seed=2)
    result = verify.verify(finished, data=tmp_path / "other.npz")
    assert result.ok == (result.drop <= 1.0)
    assert "on these other images" in result.verdict
    described = json.loads((copy / "manifest.json").read_text())["data"]
    edit(copy, data={**described, "source": str(tmp_path / "other.npz")})
    result = verify.verify(copy)
    assert not result.ok and "CHANGED" in result.verdict
    edit(copy, data={**described, "source": "in memory"})
    with pytest.raises(UserError, match="given in memory; name it with --data"):
        verify.verify(copy)
