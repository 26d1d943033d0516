"""Turn a trained model (torch module, ``.pt2``, ``.onnx``) into the canonical Relax function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tvm.ir import IRModule

from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import condense
from tvm_lowrank.quantities import Shape, checked_shapes

_REMEDY = "use pkg.module:factory, file.py:factory, model.pt2 or model.onnx"


def import_model(source: str | Path | nn.Module, *, input_shape: Shape | tuple[Shape, ...] | None = None) -> IRModule:
    """The canonical Relax module of a model: one function ``main(x)``, see `tvm_lowrank.graph`.

    Parameters
    ----------
    source : ``pkg.module:factory`` or ``file.py:factory`` (called without arguments, returns a torch module),
        ``model.pt2`` (torch.export), ``model.onnx``, ``model.pt`` (TorchScript), or a torch module.
    input_shape : (N, C, H, W), or a tuple of the shapes (N, …) of several inputs; needed for torch modules and
        TorchScript. N is symbolic in the result, whatever is given here. Several inputs become one
        (`tvm_lowrank.tensors`).

    Raises
    ------
    UserError
        If the source cannot be found or loaded, does not take this input, has an operator that cannot be imported,
        has other inputs than floating-point numbers, has weights that are not finite, has no convolution, or if the
        import's outputs are not the source's.
    """
    shapes = None if input_shape is None else checked_shapes(input_shape)
    if isinstance(source, nn.Module):
        return _import_module(source, type(source).__name__, shapes)
    text = str(source)
    path, colon, factory = text.rpartition(":")
    if colon and factory.isidentifier():
        return _import_module(_made(path, factory), text, shapes)
    if Path(text).suffix not in _READERS:
        hint = "the name of the factory is missing" if Path(text).suffix == ".py" else "it is none of the known kinds"
        raise UserError(f"cannot import {text!r}: {hint}; {_REMEDY}")
    if not Path(text).is_file():
        raise UserError(f"model {text} does not exist; {_REMEDY}")
    return _READERS[Path(text).suffix](Path(text), shapes)


def _read_pt2(path: Path, shapes: tuple[Shape, ...] | None) -> IRModule:
    from tvm_lowrank.importers.from_torch import from_pt2

    return from_pt2(path, shapes)


def _read_onnx(path: Path, shapes: tuple[Shape, ...] | None) -> IRModule:
    from tvm_lowrank.importers.from_onnx import from_onnx_file

    return from_onnx_file(path, shapes)


def _read_torchscript(path: Path, shapes: tuple[Shape, ...] | None) -> IRModule:
    from tvm_lowrank.importers.from_torchscript import from_torchscript

    return from_torchscript(path, shapes)


_READERS = {
    ".onnx": _read_onnx,
    ".pt": _read_torchscript,
    ".pt2": _read_pt2,
    ".pth": _read_torchscript,
    ".torchscript": _read_torchscript,
}


def _import_module(model: nn.Module, name: str, shapes: tuple[Shape, ...] | None) -> IRModule:
    from tvm_lowrank.importers.from_torch import from_module

    if shapes is None:
        raise UserError(f"{name} needs an input shape; give N,C,H,W such as 1,3,224,224")
    return from_module(model, shapes)


def _made(path: str, factory: str) -> nn.Module:
    """Call the factory of a module or file."""
    what = f"{path}:{factory}"
    make = getattr(_loaded(path), factory, None)
    if make is None:
        raise UserError(f"{path} has no {factory!r}; name a function in it that returns a torch.nn.Module")
    if isinstance(make, nn.Module):
        return make
    if not isinstance(make, Callable):  # type: ignore[arg-type]
        raise UserError(f"{what} is a {type(make).__name__}; name a function that returns a torch.nn.Module")
    try:
        model = make()
    except Exception as error:
        raise UserError(
            f"{what} raised {type(error).__name__}: {condense(error)}; it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{what} returned a {type(model).__name__}, not a torch.nn.Module; return the model itself")
    return model


def _loaded(path: str) -> Any:
    is_file = path.endswith(".py")
    if is_file and not Path(path).is_file():
        raise UserError(f"file {path} does not exist; {_REMEDY}")
    with _on_path(str(Path(path).resolve().parent) if is_file else str(Path.cwd())):
        try:
            if not is_file:
                return importlib.import_module(path)
            spec = importlib.util.spec_from_file_location(f"_tvm_lowrank_{Path(path).stem}", path)
            assert spec is not None and spec.loader is not None  # a .py file always has a loader
            module = importlib.util.module_from_spec(spec)
            # dataclasses and pickles of the file look their module up by name
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
        except Exception as error:
            reason = f"{type(error).__name__}: {condense(error)}"
            raise UserError(f"cannot import {path}: {reason}; {_REMEDY}") from error


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """Let a model's own imports find their neighbours, as `python file.py` would."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
