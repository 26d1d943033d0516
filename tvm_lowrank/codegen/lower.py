"""From the canonical Relax function to compiled code.

`lower` makes one loop nest (PrimFunc) of every convolution with its bias, activation and residual; `kernels` lists
them; `build` schedules each, packs the weights and compiles. The latency oracle and the shipped library both go
through here: what was measured is what ships.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, IRModule, Op
from tvm.relax import transform
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.tirx import PrimFunc
from tvm_ffi import structural_hash

from tvm_lowrank.codegen import schedule
from tvm_lowrank.codegen.kept import format_kept
from tvm_lowrank.codegen.rounding import ASTYPE, astype, round_operands
from tvm_lowrank.codegen.schedule import Tiling
from tvm_lowrank.codegen.vectors import CONV2D, conv2d, integer_convolutions, vectorise_groups
from tvm_lowrank.formats import FLOAT32, FORMATS, LARGEST
from tvm_lowrank.graph import bindings, is_site
from tvm_lowrank.precision import PLACEHOLDER, has_integers, operand_formats, with_grids

# Part of the key of every cache of measurements: raise it when lowering or the schedule template changes.
LOWERING_VERSION = 5

CALL_TIR = Op.get("relax.call_tir")
PERMUTE_DIMS = Op.get("relax.permute_dims")
CLIP = Op.get("relax.clip")
LAYOUTS = {"relax.nn.conv2d": ["NHWC", "HWIO"], "relax.nn.conv2d_transpose": ["NCHW", "IOHW"]}
CONV_BLOCK = "conv2d_n"  # conv2d_nhwc, group_conv2d_nhwc, conv2d_nchw; not conv2d_transpose
# weights that number the convolutions are larger than any others: the bits of the first one in each format, and how far
# the next one is; in int8 it is their scale, for which there are fewer bits
MARKS = {"float32": (0x4D800000, 1), "bfloat16": (0x6000, 1), "float16": (0x7800, 1), "int8": (0x4E800000, 1024)}
KEPT_ATTRIBUTES = ("layout_free_buffers", "tirx.noalias")


@dataclass(frozen=True, eq=False)
class Kernel:
    """One loop nest of the lowered model.

    ``key`` identifies the task, in every process; ``name`` is for people; ``is_conv`` says whether the kernel computes
    a ``relax.nn.conv2d``; ``func`` holds the unscheduled PrimFunc as ``main``.
    """

    key: str
    name: str
    is_conv: bool
    func: IRModule


def lower(mod: IRModule, *, batch: int, target: tvm.target.Target) -> IRModule:
    """Lower the canonical function ``main(x)`` to fused loop nests in NHWC, ready for tuning.

    The input of ``main`` stays NCHW; its batch, if symbolic, becomes ``batch``.
    """
    dimension = mod["main"].params[0].ty.shape[0]
    if isinstance(dimension, tvm.tirx.Var):
        mod = transform.BindSymbolicVars({dimension.name: batch}, "main")(mod)
    legalisations = {CONV2D.name: conv2d(target), ASTYPE.name: astype}
    integers: list[tvm.transform.Pass] = []
    if has_integers(mod["main"]):
        integers = [integer_convolutions(target)]
    passes = [
        round_operands(target),
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        expand_clip,
        # ConvertLayout crashes on constants that are still expressions
        transform.FoldConstant(),
        transform.DeadCodeElimination(),
        transform.ConvertLayout(LAYOUTS),
        fold_transposes,
        # no constants that happen to be equal become one: kernels would depend on their values
        transform.CanonicalizeBindings(),
        # an input with two uses is transposed twice
        transform.EliminateCommonSubexpr(),
        transform.CanonicalizeBindings(),
        transform.FoldConstant(),
        transform.DeadCodeElimination(),
        vectorise_groups,
        *integers,
        transform.LegalizeOps(legalisations),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.AttachAttrLayoutFreeBuffers(),
        transform.DeadCodeElimination(),
    ]
    with target:
        return tvm.transform.Sequential(passes)(mod)


@mutator
class _Transposer(PyExprMutator):
    def visit_call_(self, op: relax.Call) -> relax.Expr:
        call = super().visit_call_(op)
        if call.op == PERMUTE_DIMS and isinstance(call.args[0], GenericConst):
            array = call.args[0].value.numpy()
            axes = [int(a) for a in call.attrs.axes] if call.attrs.axes else None
            return relax.const(np.ascontiguousarray(array.transpose(axes)), str(array.dtype))
        return call


@mutator
class _Clipper(PyExprMutator):
    def visit_call_(self, op: relax.Call) -> relax.Expr:
        call = super().visit_call_(op)
        if call.op != CLIP:
            return call
        low, high = (relax.const(float(bound.value), "float32") for bound in call.args[1:])
        return relax.op.minimum(self.builder_.emit(relax.op.maximum(call.args[0], low)), high)


def _rewrite_main(mod: IRModule, rewriter: type[PyExprMutator]) -> IRModule:
    changed = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    changed.update_func(mod.get_global_var("main"), rewriter(mod).visit_expr(mod["main"]))
    return changed


@tvm.transform.module_pass(opt_level=0, name="FoldTransposes")
def fold_transposes(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
    """Transpose constants here and now; FoldConstant compiles a kernel for each, which is most of lowering's time."""
    return _rewrite_main(mod, _Transposer)


@tvm.transform.module_pass(opt_level=0, name="ExpandClip")
def expand_clip(mod: IRModule, _context: tvm.transform.PassContext) -> IRModule:
    """Clip as maximum and minimum; ConvertLayout puts transposes around relax.clip, and it would not fuse."""
    return _rewrite_main(mod, _Clipper)


def kernels(lowered: IRModule) -> list[Kernel]:
    """The loop nests that ``main`` calls, in the order of execution; one that is called twice appears twice."""
    return [kernel for kernel, _ in _calls(lowered)]


def kernels_of(mod: IRModule, *, batch: int, target: tvm.target.Target) -> list[tuple[Kernel, str | None]]:
    """The `kernels` that a canonical module is lowered to, each with the name of its convolution, None if it has none.

    Not the order tells which is which: a convolution into which a residual addition is fused comes after those of the
    other branch. So the module is lowered with weights that number the convolutions. Its grids do not matter, and some
    may be missing.
    """
    names = [binding.var.name for binding in bindings(mod["main"]) if is_site(binding.value)]
    grids = dict.fromkeys(operand_formats(mod["main"]), PLACEHOLDER)
    marked = with_grids(_rewrite_main(mod, _Marker), grids) if grids else _rewrite_main(mod, _Marker)
    found = _calls(lower(marked, batch=batch, target=target))
    return [(kernel, names[_mark(constants)] if kernel.is_conv else None) for kernel, constants in found]


@mutator
class _Marker(PyExprMutator):
    """Gives the weights of every convolution one value, which numbers it."""

    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self.formats = operand_formats(mod["main"])
        self.number = 0

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if not is_site(value):
            return super().visit_var_binding_(binding)
        format = self.formats.get(binding.var.name, FORMATS[FLOAT32])
        first, step = MARKS[format.name]
        type = np.dtype(FLOAT32) if format.whole else format.type
        mark = np.array(first + step * self.number, f"uint{8 * type.itemsize}").view(type).astype(FLOAT32)
        number, self.number = self.number, self.number + 1
        shape = [int(extent) for extent in value.args[1].ty.shape]
        weight = np.full(shape, mark, FLOAT32)
        if format.whole:  # equal bytes of two convolutions that read the same would make them one
            weight *= np.random.default_rng(number).integers(-LARGEST, LARGEST, shape, endpoint=True)
            weight[:, :1, :1, :1] = mark * LARGEST
        call = relax.Call(value.op, [value.args[0], relax.const(weight)], value.attrs, ret_ty=value.ty)
        super().visit_var_binding_(relax.VarBinding(binding.var, call))
        return None


def _mark(constants: list[np.ndarray]) -> int:
    """The number of the convolution whose weights are among the constants; they may have been padded with zeros."""
    numbers = []
    for constant in constants:
        format = FORMATS.get(format_kept(str(constant.dtype)))
        if format is None or format.whole:
            continue
        bits = int(constant.max(initial=0).astype(constant.dtype).view(f"uint{8 * format.bytes}"))
        scale = format.name == FLOAT32 and bits >= MARKS["int8"][0]
        first, step = MARKS["int8" if scale else format.name]
        numbers += [(bits - first) // step] if bits >= first else []
    [number] = numbers
    return number


def _calls(lowered: IRModule) -> list[tuple[Kernel, list[np.ndarray]]]:
    """The kernels that ``main`` calls, in the order of execution, with the constants that they are given."""
    found: dict[str, Kernel] = {}
    calls = []
    for binding in bindings(lowered["main"]):
        value = binding.value
        if isinstance(value, relax.Call) and value.op == CALL_TIR:
            name = str(value.args[0].name_hint)
            if name not in found:
                found[name] = _kernel(name, lowered[name])
            constants = [arg.value.numpy() for arg in value.args[1] if isinstance(arg, GenericConst)]
            calls.append((found[name], constants))
    return calls


def _kernel(name: str, function: PrimFunc) -> Kernel:
    func = _normalised(function)
    names = schedule.block_names(func)
    # the structural hash leaves names out, but two kernels with other block names are not scheduled alike
    label = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    key = f"{structural_hash(func) & (2**64 - 1):016x}-{label}"
    return Kernel(key, name, any(CONV_BLOCK in n for n in names), func)


def _normalised(function: PrimFunc) -> IRModule:
    """The function alone in a module, as ``main``, with the attributes that matter to its code only."""
    for attribute in list(function.attrs.keys() if function.attrs else ()):
        if attribute not in KEPT_ATTRIBUTES:
            function = function.without_attr(attribute)
    return IRModule({"main": function.with_attr("global_symbol", "main")})


def build(
    lowered: IRModule, database: Mapping[str, Tiling | None], target: tvm.target.Target, *, threads: int = 1
) -> relax.VMExecutable:
    """Compile a lowered module to a library whose function ``main(x)`` takes and returns plain tensors.

    Parameters
    ----------
    database
        Kernel key to tuned schedule (`LatencyOracle.database`); a kernel that it lacks gets a default schedule.
    threads
        The number of threads that the library is meant to run with.
    """
    scheduled = IRModule(dict(lowered.functions_items()), attrs=lowered.attrs)
    for kernel in {k.name: k for k in kernels(lowered)}.values():
        if kernel.key in database:
            func = schedule.apply(kernel.func, database[kernel.key], target=target, threads=threads)
        else:
            func = schedule.apply_default(kernel.func, target=target, threads=threads)
        function = func["main"].without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
        scheduled.update_func(lowered.get_global_var(kernel.name), function)
    packing = [transform.SplitLayoutRewritePreproc(), transform.LiftTransformParams(), transform.FoldConstant()]
    with target:
        scheduled = tvm.transform.Sequential(packing)(scheduled)
    return tvm.compile(scheduled, target)
