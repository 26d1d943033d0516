"""Torch modules and exported programs to the canonical Relax function."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from tvm.ir import IRModule
from tvm.relax.frontend.torch import from_exported_program

from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import canonicalise, check_sites, condense
from tvm_lowrank.importers.compare import answered, bridged
from tvm_lowrank.importers.linear import weight_digest
from tvm_lowrank.importers.torch_operators import CONVERTERS, decompositions
from tvm_lowrank.tensors import Tensors

T = TypeVar("T")
Shapes = tuple[tuple[int, ...], ...]  # of the inputs, (N, …)

# torch.export fixes dimensions of size 1 at that size, so the batch of the example must not be 1
_EXAMPLE_BATCH = 2
_HALVES = {torch.float16: 30.0, torch.bfloat16: 90.0}  # how coarse they are, see `tvm_lowrank.importers.compare`


def from_module(model: nn.Module, shapes: Shapes) -> IRModule:
    """The canonical Relax module of a torch module for inputs of these shapes, (N, C, H, W) if it is one.

    The module is used in evaluation mode and put back into the mode that it was in.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes - {torch.float32, *_HALVES}:
        raise UserError(f"the model's parameters are {_names(dtypes)}, not float32; call float() on it")
    if dtypes - {torch.float32} or any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu().float()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _imported(_exported(model, [_random(shape) for shape in shapes]), shapes)
    finally:
        for module, training in modes.items():
            module.training = training


def from_pt2(path: Path, shapes: Shapes | None) -> IRModule:
    """The canonical Relax module of a file that `torch.export.save` wrote.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    program = quietly(
        lambda: torch.export.load(path),
        lambda error: f"cannot load {path}: {condense(error)}; write it with torch.export.save",
    )
    return _imported(program, shapes)


def _exported(model: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    shape = " and ".join("x".join(map(str, x.shape)) for x in inputs)
    with torch.no_grad():
        output = quietly(
            lambda: model(*inputs),
            lambda e: f"the model does not take input of shape {shape}: {condense(e)}; check the input shape",
        )
        tensors_of(output)
        try:
            batch = torch.export.Dim("batch")
            with quiet():
                dynamic = tuple({0: batch} for _ in inputs)
                return torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic, strict=False)
        except Exception:
            # the model's code fixes the batch; `canonicalise` frees it again where that is possible
            return quietly(
                lambda: torch.export.export(model, tuple(inputs), strict=False),
                lambda e: f"torch.export cannot export the model: {condense(e)}; see torch.export's documentation",
            )


def _imported(program: ExportedProgram, shapes: Shapes | None) -> IRModule:
    _check_inputs(program, shapes)

    def decompose_and_import() -> tuple[ExportedProgram, IRModule]:
        # without decompositions TVM's frontend reads batch_norm's arguments wrongly (eps from momentum's place)
        decomposed = _in_float32(program).run_decompositions(decompositions())
        mod = from_exported_program(
            decomposed,
            unwrap_unit_return_tuple=True,
            run_ep_decomposition=False,
            custom_convert_map=CONVERTERS,
        )
        return decomposed, mod

    decomposed, mod = quietly(decompose_and_import, _unsupported)
    result = canonicalise(mod, _conv_ids(decomposed), _linear_ids(decomposed))
    _check_same(program, result)
    return check_sites(result)


def _users(program: ExportedProgram) -> list[str]:
    return [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def _inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """The inputs by name, as tensors that have their types and shapes."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return {name: values[name] for name in _users(program)}


def _dtypes(program: ExportedProgram) -> set[torch.dtype]:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    found = {t.dtype for t in (*tensors, *_inputs(program).values()) if isinstance(t, Tensor)}
    fx.node.map_aggregate(
        [(node.args, node.kwargs) for node in program.graph.nodes],
        lambda a: found.add(a) if isinstance(a, torch.dtype) else None,
    )
    return found


def _coarseness(program: ExportedProgram) -> float:
    """That of the program's numbers, see `tvm_lowrank.importers.compare`."""
    return max([1.0, *(_HALVES[dtype] for dtype in _dtypes(program) if dtype in _HALVES)])


def _in_float32(program: ExportedProgram) -> ExportedProgram:
    """The program with numbers in half precision read as float32."""
    if not _dtypes(program) & set(_HALVES):
        return program
    values, module = list(_inputs(program).values()), copy.deepcopy(program.module(check_guards=False)).float()

    def real(a: Any) -> Any:
        return torch.float32 if a in _HALVES else a

    for node in module.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(own, real) for own in (node.args, node.kwargs))
    for name, constant in vars(module).items():
        if isinstance(constant, Tensor) and constant.dtype in _HALVES:
            setattr(module, name, constant.float())
    module.recompile()
    fixed = [isinstance(value.shape[0], int) for value in values]
    batches = [int(value.shape[0]) if own else _EXAMPLE_BATCH for value, own in zip(values, fixed, strict=True)]
    inputs = tuple(torch.zeros([n, *value.shape[1:]]) for n, value in zip(batches, values, strict=True))
    batch = torch.export.Dim("batch")
    shapes = None if any(fixed) else tuple({0: batch} for _ in values)
    return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def _check_inputs(program: ExportedProgram, shapes: Shapes | None) -> None:
    values = _inputs(program)
    for name, value in values.items():
        if value.dtype not in (torch.float32, *_HALVES):
            raise UserError(f"input {name!r} is {_names({value.dtype})}, not float32; export the model in float32")
    if shapes is not None and len(shapes) != len(values):
        names = ", ".join(values)
        raise UserError(f"the model has {len(values)} inputs ({names}), not {len(shapes)}; give the shape of each")
    for value, given in zip(values.values(), shapes or (), strict=False):
        if [str(d) for d in value.shape[1:]] != [str(d) for d in given[1:]]:
            own, has = ("x".join(map(str, shape[1:])) for shape in (given, value.shape))
            raise UserError(f"the program was exported for images of {has}, not {own}; leave the input shape out")


def _check_same(program: ExportedProgram, mod: IRModule) -> None:
    """Compare the import with the program on random images: a wrong translation must not go unnoticed."""
    values, taken = list(_inputs(program).values()), Tensors.taken(mod["main"])
    module = program.module(check_guards=False)
    batch = next((int(value.shape[0]) for value in values if isinstance(value.shape[0], int)), None)

    def run(images: np.ndarray) -> list[np.ndarray]:
        size = batch or len(images)
        parts = [np.resize(images[i : i + size], (size, *images.shape[1:])) for i in range(0, len(images), size)]
        outputs = []
        for part in parts:
            inputs = zip(taken.parted(torch.from_numpy(part)), values, strict=True)
            outputs.append(tensors_of(module(*(own.to(value.dtype) for own, value in inputs))))
        return [torch.cat(own)[: len(images)].float().numpy() for own in zip(*outputs, strict=True)]

    with quiet(), torch.no_grad():
        expected = answered(run, taken, _coarseness(program))
        excess = expected.excess(bridged(mod))
    if excess > 1:
        raise UserError(
            f"the import differs from torch, by {excess:.0f} times what rounding explains; export the model to ONNX, "
            "whose import names the operator"
        )


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a model returns, in the order in which torch.export lists them."""
    leaves = pytree.tree_leaves(output)
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor):
        leaves = pytree.tree_leaves(vars(leaves[0])) if hasattr(leaves[0], "__dict__") else []
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise UserError(f"the model returns {type(output).__name__}, no tensor; return what it computes")
    return tensors


def _conv_ids(program: ExportedProgram) -> list[str | None]:
    """The id of each 2-D convolution, in order: the path of its module, or of the parameter it reads."""
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs}
    ids = []
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name not in ("convolution.default", "conv2d.default") or node.meta["val"].dim() != 4:
            continue
        if name == "convolution.default" and node.args[6]:  # transposed
            continue
        ids.append(_module_path(node) or _parameter_path(targets.get(getattr(node.args[1], "name", ""))))
    return ids


def _linear_ids(program: ExportedProgram) -> dict[str, str | None]:
    """The paths of the linear layers, by weight."""
    matrices = {path: value for path, value in program.state_dict.items() if value.dim() == 2}
    return {weight_digest(value.detach().numpy()): _parameter_path(path) for path, value in matrices.items()}


def _module_path(node: fx.Node) -> str | None:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack or not str(stack[-1][1]).rsplit(".", 1)[-1].startswith("Conv"):
        return None  # the convolution is called by function, perhaps several in one module
    return str(stack[-1][0]) or None


def _parameter_path(target: str | None) -> str | None:
    return None if target in (None, "weight") else str(target).removesuffix(".weight")


def _unsupported(error: Exception) -> str:
    reason = condense(error)
    if "Unsupported function types" in reason:
        names = reason.partition("[")[2].rstrip("]").replace("'", "")
        return f"operator {names} is not supported by TVM's importer; replace it in the model"
    return f"TVM cannot import the model: {reason}; replace the operator in the model"


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def _random(input_shape: tuple[int, ...]) -> Tensor:
    shape = (max(input_shape[0], _EXAMPLE_BATCH), *input_shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quietly(make: Callable[[], T], explain: Callable[[Exception], str]) -> T:
    """The result of `make`, without the noise of the exporters; `explain` words the `UserError` if it fails."""
    with quiet():
        try:
            return make()
        except Exception as error:
            message = explain(error)
        gc.collect()  # destroys the failed builder, about which TVM prints a warning, while nobody can see it
    raise UserError(message)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and prints, those of C++ included, away from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with (
            open(os.devnull, "w") as sink,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            os.dup2(sink.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        logging.disable(previous)
