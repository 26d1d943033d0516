"""TorchScript files to the canonical Relax function, by way of ONNX."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import torch
from tvm.ir import IRModule

from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import condense
from tvm_lowrank.importers.compare import answered, bridged
from tvm_lowrank.importers.from_onnx import from_onnx
from tvm_lowrank.importers.from_torch import quiet, quietly

_REMEDY = "give file.py:factory that makes the module, or write a .pt2 with torch.export.save"


def from_torchscript(path: Path, input_shape: tuple[int, ...] | None) -> IRModule:
    """The canonical Relax module of a file that `torch.jit.save` wrote.

    Raises
    ------
    UserError
        If the file holds anything else, such as weights without their network; otherwise see
        `tvm_lowrank.importers.importer.import_model`.
    """
    script = quietly(
        lambda: torch.jit.load(path, map_location="cpu").eval().float(),
        lambda e: f"{path} is no TorchScript program; if it holds weights only, {_REMEDY}",
    )
    if input_shape is None:
        raise UserError(f"{path} needs an input shape; give N,C,H,W such as 1,3,224,224")
    written = io.BytesIO()
    quietly(
        lambda: torch.onnx.export(
            script,
            (torch.zeros((1, *input_shape[1:])),),
            written,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        ),
        lambda e: f"torch cannot export {path}: {condense(e)}; {_REMEDY}",
    )
    mod = from_onnx(onnx.load_from_string(written.getvalue()), input_shape)

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [script(torch.from_numpy(images)).numpy()]

    with quiet(), torch.no_grad():
        same = answered(run, input_shape[1:]).excess(bridged(mod)) <= 1
    if not same:
        raise UserError(f"the import of {path} differs from it; {_REMEDY}")
    return mod
