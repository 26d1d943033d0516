"""The contest of `benchmarks/against_peers.py`, with contestants that are made up, and one runtime that is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from peers.contest import (
    COARSE,
    COLUMNS,
    EXACT,
    INT8,
    OURS,
    Contestant,
    Match,
    Result,
    compete,
    relative_error,
    rows,
    verdict,
)
from peers.runtimes import IMAGES, ONNX, Session
from tvm_lowrank import MeasurementError

ANSWER = np.array([[1.0, -2.0]], "float32")
WORSE = ANSWER * 1.01
WRONG = -ANSWER
# runtime: version, format, output, and what its turns take
SCRIPT: dict[str, tuple[str, str, np.ndarray, list[Any]]] = {
    "exact": ("1.2", "", ANSWER, [4.0, 2.0, 3.0]),
    "half": ("1.2", "bfloat16", WORSE, [2.0, 2.0, 2.0]),
    "small": ("1.2", "", WORSE, [0.5, 0.5, 0.5]),
    "wrong": ("0.1", "", WRONG, [0.1, 0.1, 0.1]),
    "dies": ("0.1", "", ANSWER, [0.1, MeasurementError("the worker ended with code -11")]),
    OURS: ("3", "", ANSWER, [1.0, 1.0, 1.0]),
}
PEERS = (
    Contestant("Exact", "float32", "exact", "onnx", "numpy", EXACT),
    Contestant("Exact", "default", "half", "onnx", "numpy"),
    Contestant("Exact", INT8, "small", "onnx", "numpy", COARSE),
    Contestant("Wrong", "float32", "wrong", "onnx", "numpy", EXACT),
    Contestant("Dies", "float32", "dies", "onnx", "numpy", EXACT),
    Contestant("Stuck", "float32", "exact", "stuck", "numpy", EXACT),
    Contestant("Stuck", "bfloat16", "exact", "stuck", "numpy"),
    Contestant("Absent", "float32", "exact", "onnx", "no_such_package", EXACT),
)
LIBRARIES = (
    Contestant(OURS, "float32", OURS, "/bundle/dense.so", "numpy", EXACT),
    Contestant(OURS, "float32", OURS, "/bundle/model.so", "numpy", EXACT, network="compressed"),
)


class Fake:
    """A process that does as `SCRIPT` says, and writes down what it was asked."""

    def __init__(self, asked: list[tuple[str, Any]]) -> None:
        self.asked = asked
        self.name = ""
        self.turns: Iterator[Any] = iter(())
        self.stopped = False

    def request(self, operation: str, *arguments: Any, timeout: float) -> Any:
        self.asked.append((operation, arguments[0]))
        if operation == "convert":
            if arguments[0] == "stuck":
                raise MeasurementError("unknown operator Whirl")
            return f"/files/{arguments[0]}"
        if operation == "open":
            self.name, path, _, threads, _ = arguments
            assert path == "/files/onnx" or self.name == OURS
            assert threads == 1
            version, format, output, turns = SCRIPT[self.name]
            self.turns = iter(turns)
            return version, format, output
        turn = next(self.turns)
        self.asked[-1] = (operation, self.name)
        if isinstance(turn, Exception):
            raise turn
        return turn

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def match(tmp_path: Path) -> Match:
    x = np.zeros((1, 3, 4, 4), "float32")
    return Match(tmp_path, x, {"dense": ANSWER, "compressed": ANSWER}, rounds=3)


def contest(contestants: tuple[Contestant, ...], match: Match) -> tuple[list[Result], list[tuple[str, Any]]]:
    """The results, and what was asked of the processes, all of which have ended."""
    asked: list[tuple[str, Any]] = []
    processes: list[Fake] = []

    def start() -> Fake:
        processes.append(Fake(asked))
        return processes[-1]

    results = compete(contestants, match, start, lambda line: None)
    assert all(process.stopped for process in processes)
    return results, asked


def test_contestants_take_turns_and_who_fails_is_out(match: Match) -> None:
    results, asked = contest((*PEERS, *LIBRARIES), match)
    assert [kind for operation, kind in asked if operation == "convert"] == ["onnx", "stuck"]  # each once
    first = ["exact", "half", "small", "wrong", "dies", OURS, OURS]
    rest = [name for name in first if name != "dies"]
    assert [name for operation, name in asked if operation == "time"] == [*first, *first, *rest]

    cells = {(row[0], row[1]): row[2:] for row in rows(results)}
    assert len(COLUMNS) == 8
    assert cells["Exact", "float32"] == ("1.2", "3.000", "2.200", "3.800", "0.0e+00", "agree")
    assert cells["Exact", "default: bfloat16"][-2:] == ("1.0e-02", "agree")
    assert cells["Wrong", "float32"][-1] == "WRONG, not compared"
    none = ("–",) * 4
    assert cells["Dies", "float32"] == ("0.1", *none, "did not run: the worker ended with code -11")
    for format in ("float32", "bfloat16"):
        assert cells["Stuck", format] == ("", *none, "did not run: unknown operator Whirl")
    missing = "did not run: no_such_package is not installed (pip install no_such_package)"
    assert cells["Absent", "float32"][-1] == missing
    assert (f"{OURS} compressed", "float32") in cells


def test_the_fastest_sound_peer_is_what_counts(match: Match) -> None:
    results, _ = contest((*PEERS, *LIBRARIES), match)
    assert list(verdict(results)) == [
        "the fastest peer: Exact, int8, 0.500 ms",
        "  over our dense library (float32, 1.000 ms): 0.50x",
        "  over our compressed library (float32, 1.000 ms): 0.50x",
        "the fastest without int8: Exact, default: bfloat16, 2.000 ms",
        "  over our dense library (float32, 1.000 ms): 2.00x",
        "  over our compressed library (float32, 1.000 ms): 2.00x",
    ]
    results, _ = contest((PEERS[0], PEERS[3], LIBRARIES[0]), match)
    assert list(verdict(results)) == [
        "the fastest peer: Exact, float32, 3.000 ms",
        "  over our dense library (float32, 1.000 ms): 3.00x",
    ]
    results, _ = contest((PEERS[3], LIBRARIES[0]), match)
    assert list(verdict(results)) == ["no peer has run: there is nothing to compare with"]


def test_an_output_that_is_not_a_number_or_not_there_is_wrong() -> None:
    assert relative_error(ANSWER[0], ANSWER) == 0
    assert relative_error(WORSE, ANSWER) == pytest.approx(0.01)
    assert relative_error(ANSWER[:, :1], ANSWER) == float("inf")
    assert not Result(PEERS[0], error=relative_error(ANSWER * np.nan, ANSWER), times=(1.0,)).agrees


def test_onnxruntime_runs_the_network_and_quantises_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.standard_normal((9, 1, 3, 8, 8)).astype("float32")
    weight = generator.standard_normal((4, 3, 1, 1)).astype("float32")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    np.save(tmp_path / IMAGES, images[:-1])
    session = Session()
    with pytest.raises(ValueError, match="could not write the network as ONNX"):
        session.convert("onnx", str(tmp_path))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / ONNX)
    expected = np.maximum(np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], images[-1]), 0)
    for kind, least, most in (("onnx", 0, EXACT), ("int8", EXACT, COARSE)):
        path = session.convert(kind, str(tmp_path))
        version, format, output = session.open("onnxruntime", path, images[-1], 1, {})
        assert version and not format
        assert least <= relative_error(output, expected) < most
        assert session.time(0.0) > 0
