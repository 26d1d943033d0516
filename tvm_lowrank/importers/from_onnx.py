"""ONNX files to the canonical Relax function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tvm import tirx
from tvm.ir import IRModule

from tvm_lowrank.console import phase, warn
from tvm_lowrank.errors import UserError
from tvm_lowrank.importers.canonical import canonicalise, check_sites, condense
from tvm_lowrank.importers.compare import Answered, answered, bridged, telling
from tvm_lowrank.importers.from_torch import quiet, quietly
from tvm_lowrank.importers.onnx_graph import Skeleton, channels_first, cut, inputs_of, shapes_folded, skeleton
from tvm_lowrank.importers.onnx_names import conv_ids, linear_ids
from tvm_lowrank.importers.onnx_operators import Importer
from tvm_lowrank.importers.onnx_pairs import without_pairs
from tvm_lowrank.importers.onnx_run import runner
from tvm_lowrank.quantities import Shape, checked_shapes
from tvm_lowrank.tensors import Tensors

# a batch that no other dimension of a network is likely to have, for graphs that TVM imports with a fixed one only
_UNUSUAL_BATCH = 61
_BACK = 8  # values that are looked through for one that tells something
_PROBABILITIES = {"Sigmoid", "Softmax"}  # what they give was rounded at 1
# how coarse numbers are, see `tvm_lowrank.importers.compare`
_TYPES = {
    onnx.TensorProto.FLOAT: 1.0,
    onnx.TensorProto.DOUBLE: 1.0,
    onnx.TensorProto.FLOAT16: 30.0,
    onnx.TensorProto.BFLOAT16: 90.0,
}


@dataclass(frozen=True, eq=False)
class _Source:
    """A model as it was written, but for its rounding to int8, and the same as one that TVM imports.

    Its inputs' shapes (N, …) by name, N being 0 if it is open; the values that the file has channels last; how coarse
    its numbers are; and how many of its values are rounded to int8.
    """

    written: onnx.ModelProto
    ready: Skeleton
    shapes: Mapping[str, Shape]
    turned: frozenset[str]
    coarseness: float
    rounded: int

    @property
    def batch(self) -> int:
        """The number of images that the file fixes, or 0."""
        return max(shape[0] for shape in self.shapes.values())

    @property
    def inputs(self) -> Tensors:
        return Tensors(tuple(shape[1:] for shape in self.shapes.values()))

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.ready.model.graph.output]

    def part(self, names: Sequence[str]) -> _Source:
        """The part that makes some values."""
        return replace(self, written=cut(self.written, names), ready=self.ready.part(names))


def from_onnx_file(path: Path, input_shape: Shape | tuple[Shape, ...] | None) -> IRModule:
    """The canonical Relax module of an ONNX file.

    `input_shape`, (N, C, H, W) or (N, …) of each of several inputs, fills in dimensions that it leaves open.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    model = quietly(
        lambda: onnx.load(str(path)),
        lambda e: f"cannot load {path}: {condense(e)}; is it an ONNX file with its external data?",
    )
    return from_onnx(model, input_shape)


def from_onnx(model: onnx.ModelProto, input_shape: Shape | tuple[Shape, ...] | None = None) -> IRModule:
    """The canonical Relax module of a loaded ONNX model, the outputs of which have been compared with the model's own.

    Raises
    ------
    UserError
        See `tvm_lowrank.importers.importer.import_model`.
    """
    source = _source(model, None if input_shape is None else checked_shapes(input_shape))
    expected = _answered(source)
    mod, batch = _imported(source, expected)
    check_sites(mod)
    if expected is None:
        warn("the file gave no outputs for random images (ONNX Runtime, ONNX's evaluator): the import was not compared")
    _say_what_changed(source, batch)
    return mod


def _source(model: onnx.ModelProto, given: tuple[Shape, ...] | None) -> _Source:
    inputs = inputs_of(model)
    if not inputs or (given is not None and len(given) != len(inputs)):
        names, wanted = ", ".join(i.name for i in inputs), 1 if given is None else len(given)
        raise UserError(f"the model has {len(inputs)} inputs ({names}), not {wanted}; give the shape of each")
    kinds = {i.name: i.type.tensor_type.elem_type for i in inputs}
    for name, kind in kinds.items():
        if kind not in _TYPES:
            dtype = onnx.TensorProto.DataType.Name(kind).lower()
            raise UserError(f"input {name!r} is {dtype}, not float32; export the model in float32")
    tensors = (*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute))
    numbers = [*kinds.values(), *(tensor.data_type for tensor in tensors)]
    coarseness = max(_TYPES.get(kind, 1.0) for kind in numbers)
    model, rounded = without_pairs(model)
    ready, turned = quietly(
        lambda: channels_first(skeleton(model)),
        lambda e: f"cannot read the model: {condense(e)}; check it with onnx.checker.check_model",
    )
    _check_operators(ready.model)
    shapes = _shapes(ready.model.graph.input, given, bool(turned))
    return _Source(model, ready, shapes, turned, coarseness, rounded)


def _check_operators(model: onnx.ModelProto) -> None:
    """Refuse what is known to have no import, with a way on."""
    for node in model.graph.node:
        if node.op_type in ("GRU", "LSTM", "RNN"):
            raise UserError(
                f"the model has a recurrent layer ({node.op_type}), which TVM's importer lacks; "
                "cut the graph in front of it with onnx.utils.extract_model"
            )
        if "Quantize" in node.op_type or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            raise UserError(
                f"the model computes in whole numbers ({node.op_type}); give the float32 model that it was made from"
            )


def _shapes(
    values: Sequence[onnx.ValueInfoProto], given: tuple[Shape, ...] | None, turned: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes (N, …) of the inputs; an open batch is 0."""
    if len(values) == 1:
        return {values[0].name: _image(values[0], None if given is None else given[0], turned)}
    shapes = {}
    for value, own in zip(values, given or [None] * len(values), strict=True):
        dims = _dims(value) or [0] * len(own or ())
        if len(dims) < 2:
            raise UserError(
                f"input {value.name!r} has {len(dims)} dimensions; those of several have the batch and more"
            )
        shapes[value.name] = _filled(value.name, dims, own)
    fixed = {name: shape[0] for name, shape in shapes.items() if shape[0]}
    if len(set(fixed.values())) > 1:
        said = ", ".join(f"{name!r} {count}" for name, count in fixed.items())
        raise UserError(f"the inputs fix different batches ({said}); the first dimension of each must be the batch")
    return shapes


def _image(value: onnx.ValueInfoProto, given: Shape | None, turned: bool) -> tuple[int, ...]:
    """The shape (N, C, H, W) of the only input. One that is given may have the file's order."""
    dims = _dims(value) or [0, 0, 0, 0]
    if len(dims) != 4:
        raise UserError(f"input {value.name!r} has {len(dims)} dimensions; images are N,C,H,W")
    if given is not None and turned and not _fits(dims, given):
        given = (given[0], given[3], given[1], given[2])
    return _filled(value.name, dims, given)


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [int(d.dim_value) for d in value.type.tensor_type.shape.dim]


def _filled(name: str, dims: Sequence[int], given: Shape | None) -> tuple[int, ...]:
    """The shape of an input, with what it leaves open as it is given."""
    if given is not None and not _fits(dims, given):
        sizes, has = "x".join(map(str, given[1:])), "x".join(map(str, dims[1:]))
        raise UserError(f"the model takes images of {has}, not {sizes}; leave the input shape out")
    filled = (dims[0], *(d or (given or dims)[i] for i, d in enumerate(dims[1:], 1)))
    if not all(filled[1:]):
        raise UserError(f"the model leaves the size of {name!r} open; give N,C,H,W such as 1,3,224,224")
    return filled


def _fits(dims: Sequence[int], given: Sequence[int]) -> bool:
    return len(dims) == len(given) and all(not d or d == g for d, g in zip(dims[1:], given[1:], strict=True))


def _imported(source: _Source, expected: Answered | None) -> tuple[IRModule, int]:
    """The module, and the batch that it was imported with, 0 if that was open.

    Shape arithmetic that TVM cannot follow symbolically becomes constants when the batch is fixed; where 1 image is
    baked into it, that must be the batch.
    """
    fixed = source.batch
    reasons = []
    for batch in [fixed] if fixed else [0, _UNUSUAL_BATCH, 1]:
        try:
            mod = _canonical(source, batch)
        except UserError as error:
            reasons.append(error)
            continue
        where = None if expected is None else _difference(source, expected, mod, batch)
        if where is None:
            return mod, batch
        reasons.append(
            UserError(f"the import differs from the file, first at {where}; replace it, or report this model")
        )
    raise reasons[min(1, len(reasons) - 1)]


def _canonical(source: _Source, batch: int) -> IRModule:
    count: Any = batch or tirx.Var("batch", "int64")
    shapes = {name: [count, *shape[1:]] for name, shape in source.shapes.items()}

    def run() -> tuple[Skeleton, IRModule]:
        folded = shapes_folded(source.ready, shapes) if batch else source.ready
        return folded, Importer(folded, shapes).imported()

    folded, mod = quietly(run, _unsupported)
    return canonicalise(mod, conv_ids(folded), linear_ids(folded))


def _unsupported(error: Exception) -> str:
    reason = condense(error)
    marker = "not supported for frontend ONNX:"
    if marker in reason:
        names = reason.partition(marker)[2].strip()
        return f"operator {names} is not supported by TVM's importer; replace it in the model"
    return f"TVM cannot import the model: {reason}; replace the operator in the model"


def _answered(source: _Source) -> Answered | None:
    """What the file makes of random images, or None if nothing can run it."""
    with quiet():
        try:
            return answered(_file(source), source.inputs, source.coarseness, _sizes(source))
        except Exception:
            return None


def _sizes(source: _Source) -> list[float]:
    """At which size the outputs are rounded, see `tvm_lowrank.importers.compare.Answered`."""
    made = {name: node.op_type for node in source.ready.model.graph.node for name in node.output}
    return [1.0 if made.get(name) in _PROBABILITIES else 0.0 for name in source.outputs]


def _file(source: _Source) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The model as it was written, as a function of what a canonical one takes; a batch that it fixes is kept."""
    run, inputs, fixed = runner(source.written), source.inputs, source.batch
    kinds = {given.name: given.type.tensor_type.elem_type for given in inputs_of(source.written)}
    dtypes = {name: onnx.helper.tensor_dtype_to_np_dtype(kinds[name]) for name in source.shapes}

    def batch(x: np.ndarray) -> list[np.ndarray]:
        x = x.transpose(0, 2, 3, 1) if source.turned else x
        outputs = run({name: own.astype(dtypes[name]) for name, own in zip(dtypes, inputs.parted(x), strict=True)})
        if any(y.ndim == 0 or len(y) != len(x) for y in outputs):
            raise ValueError("an output without the batch")
        return outputs

    def apart(x: np.ndarray, size: int) -> list[np.ndarray]:
        parts = [np.resize(x[i : i + size], (size, *x.shape[1:])) for i in range(0, len(x), size)]
        return [np.concatenate(ys)[: len(x)] for ys in zip(*map(batch, parts), strict=True)]

    def compute(x: np.ndarray) -> list[np.ndarray]:
        if fixed:
            outputs = apart(x, fixed)
        else:
            try:
                outputs = batch(x)
            except Exception:  # a batch of 1 is baked into it
                outputs = apart(x, 1)
        return [y if y.dtype.kind in "iub" else y.astype(np.float32) for y in outputs]

    return compute


def _difference(source: _Source, expected: Answered, mod: IRModule, batch: int) -> str | None:
    """The first operator of the file whose value differs from the import's, in words; None if there is none."""
    differs, suspects = expected.excess(bridged(mod)) > 1, source.outputs
    if not differs:
        answers = zip(source.outputs, expected.outputs, _sizes(source), strict=True)
        blind = [name for name, y, size in answers if not telling(y, size)]
        suspects = [earlier for name in blind if (earlier := _earlier(source, name))]
    for name in suspects:
        if _differs(source, name, batch):
            node = _first_different(source, name, batch)
            return f"operator {node.op_type} ({node.name or node.output[0]})"
    return "its output" if differs else None


def _values(source: _Source, end: str) -> list[str]:
    """What both forms of the model compute on the way to a value, which is the last, in order."""
    written = {name for node in source.written.graph.node for name in node.output}
    nodes = source.ready.part([end]).model.graph.node
    read = {name for node in nodes for name in node.input} & written - source.turned | {end}
    return [name for node in nodes for name in node.output if name in read]


def _differs(source: _Source, name: str, batch: int) -> bool:
    """Whether a value of the import differs from the file's; False for what is no image or cannot be imported."""
    part = source.part([name])
    expected = _answered(part)
    try:
        return expected is not None and expected.excess(bridged(_canonical(part, batch))) > 1
    except UserError:
        return False


def _first_different(source: _Source, end: str, batch: int) -> onnx.NodeProto:
    """The operator whose value differs although those that it reads do not, by bisection."""
    while True:
        names = _values(source, end)
        low, high = 0, len(names) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _differs(source, names[middle], batch) else (middle + 1, high)
        node = next(node for node in source.ready.model.graph.node if names[high] in node.output)
        wrong = [name for name in node.input if name in names[:high] and _differs(source, name, batch)]
        if not wrong:
            return node
        end = wrong[0]


def _earlier(source: _Source, end: str) -> str | None:
    """The last value on the way to an output that depends on the images by more than rounding, if there is one."""
    for name in reversed(_values(source, end)[-_BACK:-1]):
        found = _answered(source.part([name]))
        if found is not None and telling(found.outputs[0]):
            return name
    return None


def _say_what_changed(source: _Source, batch: int) -> None:
    if source.rounded:
        phase("the file's int8 activations are read as float32; --precision int8 rounds them again")
    if source.turned:
        (name,) = source.shapes
        phase(f"the file takes {name!r} as N x H x W x C; here images are N x C x H x W, data may be either")
    if source.coarseness > 1:
        phase("the file's numbers in half precision are read as float32")
    if batch == 1 and not source.batch:
        phase("the file fixes the batch to 1; the import takes any, and was compared with it image by image")
