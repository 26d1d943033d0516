"""TorchScript files to the canonical Relax function, by way of ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tvm.ir import IRModule

from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import condense
from tvm_lowrank.importers.compare import answered, bridged
from tvm_lowrank.importers.from_onnx import from_onnx_file
from tvm_lowrank.importers.from_torch import Shapes, quiet, quietly, tensors_of
from tvm_lowrank.tensors import Tensors

_REMEDY = "give file.py:factory that makes the module, or write a .pt2 with torch.export.save"


def from_torchscript(path: Path, shapes: Shapes | None) -> IRModule:
    """The canonical Relax module of a file that `torch.jit.save` wrote, for inputs of these shapes (N, …).

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
    if shapes is None:
        raise UserError(f"{path} needs an input shape; give N,C,H,W such as 1,3,224,224")
    images = tuple(torch.zeros((1, *shape[1:])) for shape in shapes)
    names = [f"x_{number}" for number in range(1, 1 + len(images))] if len(images) > 1 else ["x"]
    batch = {name: {0: "batch"} for name in names}
    options: dict[str, Any] = {"opset_version": 17, "input_names": names, "dynamic_axes": batch}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.onnx"
        quietly(
            lambda: torch.onnx.export(script, images, written, dynamo=False, **options),
            lambda e: f"torch cannot export {path}: {condense(e)}; {_REMEDY}",
        )
        mod = from_onnx_file(written, shapes)
    taken = Tensors.taken(mod["main"])

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = script(*taken.parted(torch.from_numpy(images)))
        return [output.numpy() for output in tensors_of(outputs)]

    with quiet(), torch.no_grad():
        same = answered(run, taken).excess(bridged(mod)) <= 1
    if not same:
        raise UserError(f"the import of {path} differs from it; {_REMEDY}")
    return mod
