"""Run a canonical Relax function in PyTorch, differentiably, and write trained parameters back."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor, nn
from tvm import relax, tirx
from tvm.ir import Call, GenericConst, IRModule, Tuple, TupleGetItem

from tvm_lowrank.bridge.answers import Meaning
from tvm_lowrank.bridge.meaning import answers_of
from tvm_lowrank.bridge.rounded import Function, integer_product, rounder, weight_rounder
from tvm_lowrank.bridge.torch_nn import OPERATORS
from tvm_lowrank.bridge.torch_ops import Compute
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import bias_adds, bindings, is_site
from tvm_lowrank.precision import kept_operands, stored
from tvm_lowrank.tensors import Tensors

Tap = Callable[[str, Tensor, Tensor], None]
Watch = Sequence[tuple[relax.Var, Callable[[Tensor], None]]]
Dims = dict[str, int]
Evaluate = Callable[[list[Any], dict[str, Tensor], Dims], Any]

_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    tirx.Add: operator.add,
    tirx.Sub: operator.sub,
    tirx.Mul: operator.mul,
    tirx.FloorDiv: operator.floordiv,
    tirx.FloorMod: operator.mod,
    tirx.Div: operator.floordiv,
    tirx.Mod: operator.mod,
    tirx.Max: max,
    tirx.Min: min,
}
_CREATION = {"relax.zeros", "relax.ones", "relax.arange"}


@dataclass(frozen=True)
class SiteParameters:
    """The parameters of a site: weight (OIHW) and bias ((1, N, 1, 1)), None where the site has none."""

    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class _Step:
    compute: Compute | None  # None: the value of the single argument
    args: tuple[Evaluate, ...]
    out: int
    site: str | None
    free: tuple[int, ...]  # slots that nothing after this step reads
    operands: tuple[Function, ...] = ()  # what those of a site are rounded by
    kept: Function | None = None  # what the value is rounded by


@dataclass(frozen=True)
class _Run:
    """One run of the function: the values of its symbolic dimensions, and its constants."""

    dims: Dims
    constants: dict[str, Any]

    def step(self, step: _Step, env: list[Any]) -> tuple[list[Any], Any]:
        """Do a step in an environment, the values by slot; returns its arguments and its value."""
        args = [evaluate(env, self.constants, self.dims) for evaluate in step.args]
        if step.operands:
            args = [round(arg) for round, arg in zip(step.operands, args, strict=True)]
        value = args[0] if step.compute is None else step.compute(*args)
        if step.kept is not None:
            value = step.kept(value)
        env[step.out] = value
        for slot in step.free:
            env[slot] = None
        return args, value


@dataclass(frozen=True, eq=False)
class State:
    """A batch on its way through the function: what later steps read, by slot, after the first `position` steps."""

    position: int
    values: dict[int, Any]
    dims: Dims


class TorchBridge(nn.Module):
    """A canonical Relax function as a PyTorch module, at any batch size.

    What the function's convolutions read in half precision or int8 is rounded (`tvm_lowrank.precision`); gradients pass
    as if it were not. Without gradients, convolutions in int8 are computed in integers, exactly.

    Every float constant of one dimension or more is an `nn.Parameter` (``requires_grad=False`` to begin with);
    `site_parameters` finds those of a site. Weights are OIHW, activations NCHW; ``to(memory_format=channels_last)``
    works.

    Parameters
    ----------
    mod : the module that holds the function.
    name : the function's name.

    Raises
    ------
    UserError
        If the function has an operator (or an attribute of one) that the bridge does not know; the message names it.
    ValueError
        If two sites have the same id.
    """

    def __init__(self, mod: IRModule, name: str = "main") -> None:
        super().__init__()
        self._mod, self._name = mod, name
        function = mod[name]
        self._slots: dict[relax.Var, int] = {}
        self._input = _input_shape(function)
        self._slots[function.params[0]] = 0
        self._operands, self._kept = kept_operands(function), stored(function)
        steps = [self._step(i, binding) for i, binding in enumerate(bindings(function))]
        self._result = self._evaluator(function.body.body, "result")
        self._steps = _with_frees(steps, self._reads(function))
        self._creates = any(isinstance(b.value, Call) and str(_op(b.value)) in _CREATION for b in bindings(function))
        self._sites = self._site_names(function)

    @cached_property
    def inputs(self) -> Tensors:
        """The network's inputs, which `forward` takes joined where there are several."""
        return Tensors.taken(self.function)

    @cached_property
    def outputs(self) -> Tensors:
        """The outputs, which `forward` joins to one tensor where there are several."""
        return Tensors.of(self.function)

    @cached_property
    def answers(self) -> Meaning:
        """What the outputs mean."""
        return answers_of(self.function)

    @property
    def function(self) -> relax.Function:
        """The Relax function that the bridge was made from."""
        return self._mod[self._name]

    @property
    def sites(self) -> tuple[str, ...]:
        """The ids of the sites, in the order of execution."""
        return tuple(self._sites)

    def site_parameters(self, site: str) -> SiteParameters:
        """The parameters of a site.

        Raises
        ------
        KeyError
            If there is no such site.
        """
        weight, bias = self._sites[site]
        parameters = self._parameters
        return SiteParameters(parameters[weight], None if bias is None else parameters[bias])  # type: ignore[arg-type]

    def forward(self, x: Tensor, tap: Tap | None = None, watch: Watch = ()) -> Tensor:
        """Run the function on a batch (NCHW, float32); ``tap`` and ``watch`` are those of `resume`.

        Several outputs are joined to one tensor (`outputs`).
        """
        return self.result(self.resume(self.start(x), self.length, tap=tap, watch=watch))

    def forked(self, x: Tensor, site: str, instead: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """The outputs with each of these functions in the place of a site's convolution, without its bias.

        What comes before the site is computed once.

        Raises
        ------
        KeyError
            If there is no such site.
        """
        before = self.resume(self.start(x), self.position(site))
        return [self.result(self.resume(before, self.length, instead={site: own})) for own in instead]

    @property
    def length(self) -> int:
        """The number of steps, one for each binding of the function."""
        return len(self._steps)

    def position(self, site: str) -> int:
        """The number of steps before a site; KeyError if there is no such site."""
        if site not in self._sites:
            raise KeyError(site)
        return next(i for i, step in enumerate(self._steps) if step.site == site)

    def start(self, x: Tensor) -> State:
        """A batch (NCHW, float32) before the first step."""
        kept = self._kept.get(self.function.params[0])
        return State(0, {0: x if kept is None else rounder(kept)(x)}, self._dims(x))

    def resume(
        self,
        state: State,
        until: int,
        *,
        instead: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        tap: Tap | None = None,
        watch: Watch = (),
    ) -> State:
        """A batch after so many steps, from where it is; the state that is given stays as it is.

        ``instead`` are functions in the place of sites' convolutions, without their biases. ``tap(site, input,
        output)`` is called at every site; ``output`` is the convolution's, before its bias. ``watch`` lists variables
        of `function`, each with what to call as soon as it has its value.
        """
        watched: dict[int, list[Callable[[Tensor], None]]] = {}
        for var, call in watch:
            watched.setdefault(self._slots[var], []).append(call)
        run, env = self._running(state)
        if state.position == 0:
            for call in watched.get(0, ()):
                call(env[0])
        device = next((value.device for value in state.values.values() if isinstance(value, Tensor)), None)
        with torch.device(device) if self._creates and device else contextlib.nullcontext():
            for step in self._steps[state.position : until]:
                own = None if instead is None or step.site is None else instead.get(step.site)
                if own is not None:
                    step = replace(step, compute=lambda image, _weight, own=own: own(image))
                args, value = run.step(step, env)
                if tap is not None and step.site is not None:
                    tap(step.site, args[0], value)
                for call in watched.get(step.out, ()):
                    call(value)
        return State(until, {slot: value for slot, value in enumerate(env) if value is not None}, state.dims)

    def value(
        self,
        state: State,
        var: relax.Var,
        *,
        instead: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """The value of a variable, for a batch that has it or will have; at least one step is done."""
        slot, until = self._slots[var], state.position + 1
        if slot not in state.values:
            until = max(until, 1 + next(i for i, step in enumerate(self._steps) if step.out == slot))
        found: list[Tensor] = [state.values[slot]] if slot in state.values else []
        self.resume(state, until, instead=instead, tap=tap, watch=() if found else [(var, found.append)])
        return found[0]

    def result(self, state: State) -> Tensor:
        """The output for a batch that has done all steps; several are joined (`outputs`)."""
        run, env = self._running(state)
        return self.outputs.joined(self._result(env, run.constants, run.dims))

    def _running(self, state: State) -> tuple[_Run, list[Any]]:
        """What is needed to go on with a batch: the run, and the environment."""
        env = [state.values.get(slot) for slot in range(len(self._slots))]
        return _Run(state.dims, {**self._parameters, **self._buffers}), env

    def sizes(self) -> list[int]:
        """Numbers an image in the input and in what each step makes."""
        return [_size(var) for var in (self.function.params[0], *(b.var for b in bindings(self.function)))]

    def widths(self) -> list[int]:
        """Numbers an image that are alive before each step, and at the end."""
        sizes = self.sizes()
        alive, found = sizes[0], []
        for step in self._steps:
            found.append(alive)
            alive += sizes[step.out] - sum(sizes[slot] for slot in step.free)
        return [*found, alive]

    def to_relax(self) -> IRModule:
        """The module with the current parameters as the function's constants; everything else is the same."""
        function = self._mod[self._name]
        rewritten = [
            relax.VarBinding(b.var, self._written_back(b.value, f"c{i}")) for i, b in enumerate(bindings(function))
        ]
        body = relax.SeqExpr([relax.DataflowBlock(rewritten)], self._written_back(function.body.body, "result"))
        updated = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
        functions = dict(self._mod.functions.items())
        functions[self._mod.get_global_var(self._name)] = updated
        # a SeqExpr made by hand has no type yet
        return relax.transform.Normalize()(IRModule(functions, attrs=self._mod.attrs))

    def _written_back(self, expr: relax.Expr, path: str) -> relax.Expr:
        if isinstance(expr, GenericConst) and path in self._parameters:
            values = self._parameters[path].detach().to("cpu", torch.float32).numpy()  # type: ignore[union-attr]
            return relax.const(np.ascontiguousarray(values))
        if isinstance(expr, Tuple):
            return Tuple([self._written_back(field, f"{path}_{i}") for i, field in enumerate(expr.fields)])
        if isinstance(expr, Call):
            args = [self._written_back(arg, f"{path}_{i}") for i, arg in enumerate(expr.args)]
            return Call(expr.op, args, expr.attrs, expr.ty_args, ret_ty=expr.ty)
        return expr

    def _dims(self, x: Tensor) -> Dims:
        if len(x.shape) != len(self._input) or any(
            isinstance(want, int) and want != got for want, got in zip(self._input, x.shape, strict=True)
        ):
            raise ValueError(f"the function takes input of shape {self._input}, not {tuple(x.shape)}")
        return {want: got for want, got in zip(self._input, x.shape, strict=True) if isinstance(want, str)}

    def _step(self, index: int, binding: relax.VarBinding) -> _Step:
        value, path = binding.value, f"c{index}"
        compute: Compute | None = None
        if isinstance(value, Call):
            compute = _operator(value)
            args = tuple(self._evaluator(arg, f"{path}_{i}") for i, arg in enumerate(value.args))
        else:
            args = (self._evaluator(value, path),)
        out = self._slots[binding.var] = len(self._slots)
        site = binding.var.name if is_site(value) else None
        kept = self._operands.get(site) if site else None
        operands = () if kept is None else (rounder(kept), weight_rounder(kept))
        if kept is not None and kept.grid is not None and compute is not None:
            compute = integer_product(compute, kept.grid)
        stored_as = self._kept.get(binding.var)
        return _Step(compute, args, out, site, (), operands, None if stored_as is None else rounder(stored_as))

    def _evaluator(self, expr: relax.Expr, path: str) -> Evaluate:
        """What an argument evaluates to, as a closure over plain values (so that the module can be copied)."""
        if isinstance(expr, relax.Var) and expr in self._slots:
            slot = self._slots[expr]
            return lambda env, constants, dims: env[slot]
        if isinstance(expr, GenericConst):
            self._add_constant(path, expr)
            return lambda env, constants, dims: constants[path]
        if isinstance(expr, TupleGetItem):
            inner, index = self._evaluator(expr.tuple_value, f"{path}_0"), int(expr.index)
            return lambda env, constants, dims: inner(env, constants, dims)[index]
        if isinstance(expr, Tuple | relax.ShapeExpr):
            fields = expr.fields if isinstance(expr, Tuple) else expr.values
            parts = [self._evaluator(field, f"{path}_{i}") for i, field in enumerate(fields)]
            return lambda env, constants, dims: tuple(part(env, constants, dims) for part in parts)
        if isinstance(expr, tvm.ir.StringImm):
            text = str(expr.value)
            return lambda env, constants, dims: text
        if isinstance(expr, relax.Var) and isinstance(expr.ty, relax.TensorType):
            raise UserError(f"variable {expr.name!r} is not bound by a plain assignment; canonicalise the module first")
        number = _number(expr)
        return lambda env, constants, dims: number(dims)

    def _add_constant(self, path: str, constant: GenericConst) -> None:
        # a copy: the Relax constants must not change under training
        tensor = torch.from_numpy(np.array(constant.value.numpy()))
        if tensor.is_floating_point() and tensor.dim():
            self.register_parameter(path, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(path, tensor)

    def _site_names(self, function: relax.Function) -> dict[str, tuple[str, str | None]]:
        order = {b.var: i for i, b in enumerate(bindings(function))}
        adds = bias_adds(function)
        sites: dict[str, tuple[str, str | None]] = {}
        for binding in bindings(function):
            if not is_site(binding.value):
                continue
            if binding.var.name in sites:
                raise ValueError(f"two sites have the id {binding.var.name!r}")
            bias = f"c{order[adds[binding.var].var]}_1" if binding.var in adds else None
            sites[binding.var.name] = (f"c{order[binding.var]}_1", bias)
        return sites

    def _reads(self, function: relax.Function) -> list[set[int]]:
        """The slots that each binding, and finally the result, reads."""
        reads = []
        for expr in [*(b.value for b in bindings(function)), function.body.body]:
            slots: set[int] = set()

            def visit(e: relax.Expr, slots: set[int] = slots) -> None:
                if isinstance(e, relax.Var) and e in self._slots:
                    slots.add(self._slots[e])

            relax.analysis.post_order_visit(expr, visit)
            reads.append(slots)
        return reads


def _with_frees(steps: list[_Step], reads: list[set[int]]) -> list[_Step]:
    last: dict[int, int] = {}
    for i, slots in enumerate(reads):
        last.update(dict.fromkeys(slots, i))
    frees: list[list[int]] = [[] for _ in reads]
    for slot, i in last.items():
        frees[i].append(slot)
    return [replace(step, free=tuple(free)) for step, free in zip(steps, frees[:-1], strict=True)]


def _size(var: relax.Var) -> int:
    """Numbers of one image in a variable; 0 for what is no tensor of images."""
    shape = getattr(var.ty, "shape", None)
    dims = [] if shape is None else [int(d) if isinstance(d, tirx.IntImm) else None for d in list(shape)[1:]]
    return math.prod(d for d in dims if d is not None) if dims else 0


def _input_shape(function: relax.Function) -> tuple[int | str, ...]:
    if len(function.params) != 1:
        raise UserError(f"the function takes {len(function.params)} inputs; only models with one input are supported")
    return tuple(int(d) if isinstance(d, tirx.IntImm) else str(d.name) for d in function.params[0].ty.shape)


def _op(call: Call) -> str:
    return str(getattr(call.op, "name", None) or getattr(call.op, "name_hint", None) or call.op)


def _operator(call: Call) -> Compute:
    name = _op(call)
    if name == "relax.call_tir":
        raise UserError(f"kernel {call.args[0].name_hint!r} has no PyTorch form; re-export the model without it")
    if name not in OPERATORS:
        raise UserError(f"operator {name!r} is not supported by the PyTorch bridge; re-export the model without it")
    return OPERATORS[name](call.attrs)


def _number(expr: relax.Expr) -> Callable[[Dims], Any]:
    """A shape expression or scalar literal as a function of the symbolic dimensions."""
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        literal = expr.value
        return lambda dims: literal
    if isinstance(expr, relax.Var):
        name = str(expr.name)
        return lambda dims: dims[name]
    if type(expr) in _ARITHMETIC:
        compute, a, b = _ARITHMETIC[type(expr)], _number(expr.a), _number(expr.b)
        return lambda dims: compute(a(dims), b(dims))
    if isinstance(expr, tirx.Cast):
        return _number(expr.value)
    raise UserError(f"expression {expr} is not supported by the PyTorch bridge; re-export the model without it")
