"""The compressed network for other tools: ``model.pt2`` (torch.export) and ``model.onnx``, with any batch size.

Both are what `TorchBridge` computes, which the compiled library was found to agree with, but all in float32: the
weights are those after recovery, the input is ``x`` (float32 NCHW), the output ``output``; of several, ``x_1``,
``x_2`` … and ``output_1``, ``output_2`` …
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.manifest import PORTABLE
from tvm_lowrank.files import replaced
from tvm_lowrank.formats import FLOAT32
from tvm_lowrank.precision import formats_of, with_formats
from tvm_lowrank.reference import summary
from tvm_lowrank.tensors import Tensors

PT2, ONNX = PORTABLE


class _Network(nn.Module):
    """A bridge that takes its inputs and returns its outputs apart."""

    def __init__(self, bridge: TorchBridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = self.bridge.outputs.given(self.bridge(self.bridge.inputs.images(x)))
        return result


def _names(tensors: Tensors, name: str) -> list[str]:
    return [name] if tensors.single else [f"{name}_{number}" for number in range(1, len(tensors.shapes) + 1)]


def write_portable(mod: IRModule, folder: Path) -> None:
    """Write a canonical module to both files, without its number formats.

    There is a warning instead of a file that its format has no form for.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    exact = with_formats(mod, dict.fromkeys(formats_of(mod["main"]), FLOAT32))
    bridge = TorchBridge(exact).eval().requires_grad_(False)
    inputs, outputs = _names(bridge.inputs, "x"), _names(bridge.outputs, "output")
    exporter = logging.getLogger("torch.onnx")
    level, unwritten = exporter.level, list(PORTABLE)
    try:
        exporter.setLevel(logging.ERROR)  # it tells which packages it could use are not there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = [torch.zeros(2, *shape) for shape in bridge.inputs.shapes]  # 1 would be taken for a constant
            dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in x)
            program = torch.export.export(_Network(bridge), tuple(x), dynamic_shapes=(dynamic,))
            with replaced(folder / PT2) as file:
                torch.export.save(program, file)
            unwritten.remove(PT2)
            exported = torch.onnx.export(program, input_names=inputs, output_names=outputs, verbose=False)
            assert exported is not None  # without a file to write to
            with replaced(folder / ONNX) as file:
                file.write(exported.model_proto.SerializeToString())
            unwritten.remove(ONNX)
    # the exporters have exceptions of their own for what they cannot express; the libraries are what is delivered
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        console.warn(f"the bundle has no {' and no '.join(unwritten)}: {summary(error)}")
        for name in unwritten:
            (folder / name).unlink(missing_ok=True)
    finally:
        exporter.setLevel(level)
