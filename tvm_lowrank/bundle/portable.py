"""The compressed network for other tools: ``model.pt2`` (torch.export) and ``model.onnx``, with any batch size.

Both are what `TorchBridge` computes, which the compiled library was found to agree with, but in formats of their own:
``model.pt2`` is in float32, and so is ``model.onnx`` but for convolutions in int8 (`tvm_lowrank.bundle.qdq`). The
weights are those after recovery, the input is ``x`` (float32 NCHW), the output ``output``; of several, ``x_1``, ``x_2``
… and ``output_1``, ``output_2`` …
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.grids import folded
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import PORTABLE
from tvm_lowrank.bundle.qdq import check, marks, with_pairs
from tvm_lowrank.files import replaced
from tvm_lowrank.precision import without_formats
from tvm_lowrank.reference import summary
from tvm_lowrank.tensors import Tensors

PT2, ONNX = PORTABLE


class _Network(nn.Module):
    """A bridge that takes its inputs and returns its outputs apart, and after them the values of some variables."""

    def __init__(self, bridge: TorchBridge, also: Sequence[relax.Var] = ()) -> None:
        super().__init__()
        self.bridge, self.also = bridge, also

    def forward(self, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        seen: dict[relax.Var, Tensor] = {}
        watch = [(var, partial(seen.__setitem__, var)) for var in self.also]
        outputs = self.bridge.outputs.given(self.bridge(self.bridge.inputs.images(x), watch=watch))
        result: Tensor | tuple[Tensor, ...] = outputs
        if self.also:
            result = (*(outputs if isinstance(outputs, tuple) else (outputs,)), *(seen[var] for var in self.also))
        return result


def _names(tensors: Tensors, name: str) -> list[str]:
    return [name] if tensors.single else [f"{name}_{number}" for number in range(1, len(tensors.shapes) + 1)]


def write_portable(mod: IRModule, folder: Path) -> None:
    """Write a canonical module to both files, in the formats that they have (see this module).

    There is a warning instead of a file that its format has no form for, and of one that is not what the module is.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    mod = folded(mod)
    exact = without_formats(mod)
    bridge = TorchBridge(exact).eval().requires_grad_(False)
    exporter = logging.getLogger("torch.onnx")
    level, unwritten = exporter.level, list(PORTABLE)
    try:
        exporter.setLevel(logging.ERROR)  # it tells which packages it could use are not there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _exported(bridge)
            with replaced(folder / PT2) as file:
                torch.export.save(program, file)
            unwritten.remove(PT2)
            model = _onnx(bridge, program, mod)
            with replaced(folder / ONNX) as file:
                file.write(model.SerializeToString())
            unwritten.remove(ONNX)
    # the exporters have exceptions of their own for what they cannot express; the libraries are what is delivered
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        console.warn(f"the bundle has no {' and no '.join(unwritten)}: {summary(error)}")
        for name in unwritten:
            (folder / name).unlink(missing_ok=True)
    finally:
        exporter.setLevel(level)


def _exported(bridge: TorchBridge, also: Sequence[relax.Var] = ()) -> ExportedProgram:
    x = tuple(torch.zeros(2, *shape) for shape in bridge.inputs.shapes)  # 1 would be taken for a constant
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in x)
    return torch.export.export(_Network(bridge, also), x, dynamic_shapes=(dynamic,))


def _onnx(bridge: TorchBridge, program: ExportedProgram, mod: IRModule) -> ModelProto:
    """A network and its exported form, both in float32, in ONNX, with those convolutions in int8 that ``mod`` has."""
    also = marks(mod["main"])
    if also:
        program = _exported(bridge, also)
    inputs, outputs = _names(bridge.inputs, "x"), _names(bridge.outputs, "output")
    marked = [f"int8/{var.name}" for var in also]
    exported = torch.onnx.export(program, input_names=inputs, output_names=[*outputs, *marked], verbose=False)
    assert exported is not None  # without a file to write to
    model: ModelProto = exported.model_proto
    if also:
        model = with_pairs(model, mod, marked)
        check(model, mod)
    return model
