"""`DecomposeConv2D`: the Relax pass that replaces convolutions with constant weights by low-rank chains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_lowrank.graph import bias_adds, bindings, conv_spec, factor_names, find_sites, is_site
from tvm_lowrank.methods import METHODS, AnyMoments, Chain, Conv, decompose
from tvm_lowrank.plan import DENSE, Choice, Plan, formats_in
from tvm_lowrank.precision import with_formats


@mutator
class _ReplaceSites(PyExprMutator):
    """Emits a chain in place of each site named in `chains`, and its bias correction with the site's bias."""

    def __init__(self, mod: IRModule, function: relax.Function, chains: Mapping[str, Chain]) -> None:
        super().__init__(mod)
        self.chains = chains
        self.bias_add = bias_adds(function)
        self.site_of_add = {binding.var: site for site, binding in self.bias_add.items()}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if is_site(binding.value) and binding.var.name in self.chains:
            chain = self.chains[binding.var.name]
            result = self._emit_chain(binding, chain)
            if chain.bias_correction is not None and binding.var not in self.bias_add:
                bias = _per_channel(chain.bias_correction, binding.value)
                result = self._emit(relax.op.add(result, bias), f"{binding.var.name}.bias")
            self.set_var_remap(binding.var, result)
        elif binding.var in self.site_of_add and self.site_of_add[binding.var].name in self.chains:
            site = self.site_of_add[binding.var]
            correction = self.chains[site.name].bias_correction
            if correction is None:
                super().visit_var_binding_(binding)
                return
            value = binding.value
            bias = value.args[1].value.numpy() + correction.reshape(value.args[1].value.shape)
            added = relax.op.add(self.visit_expr(value.args[0]), relax.const(bias.astype(correction.dtype)))
            self.set_var_remap(binding.var, self._emit(added, binding.var.name))
        else:
            super().visit_var_binding_(binding)

    def _emit_chain(self, binding: relax.VarBinding, chain: Chain) -> relax.Expr:
        call, attrs = binding.value, binding.value.attrs
        result = self.visit_expr(call.args[0])
        for name, conv in zip(factor_names(binding.var.name, len(chain.convs)), chain.convs, strict=True):
            axes = ["OIHW".index(axis) for axis in str(attrs.kernel_layout)]
            value = relax.op.nn.conv2d(
                result,
                relax.const(np.ascontiguousarray(conv.weight.transpose(axes))),
                strides=conv.spec.strides,
                padding=conv.spec.padding,
                dilation=conv.spec.dilation,
                groups=conv.spec.groups,
                data_layout=attrs.data_layout,
                kernel_layout=attrs.kernel_layout,
                out_layout=attrs.out_layout,
            )
            result = self._emit(value, name)
        return result

    def _emit(self, value: relax.Expr, name: str) -> relax.DataflowVar:
        """Bind a value to a variable of exactly this name (`BlockBuilder.emit` would replace the dots)."""
        value = self.builder_.normalize(value)
        var = relax.DataflowVar(name, value.ty)
        self.builder_.emit_normalized(relax.VarBinding(var, value))
        return var


def _per_channel(values: np.ndarray, call: relax.Call) -> relax.Constant:
    layout = str(call.attrs.out_layout or call.attrs.data_layout)
    return relax.const(values.reshape([-1 if axis == "C" else 1 for axis in layout]))


def replace_sites(
    mod: IRModule, chains: Mapping[str, Chain], *, formats: Mapping[str, str] | None = None, name: str = "main"
) -> IRModule:
    """A copy of the module whose function `name` computes each named site by its chain.

    ``formats`` are those of `tvm_lowrank.precision.with_formats`, also of sites that have no chain.

    Raises
    ------
    ValueError
        If a chain names a site that the function does not have; the message lists those it has.
    """
    function = mod[name]
    present = [b.var.name for b in bindings(function) if is_site(b.value)]
    unknown = sorted(set(chains) - set(present))
    if unknown:
        raise ValueError(f"no site {', '.join(map(repr, unknown))}; sites are {', '.join(present)}")
    rewriter = _ReplaceSites(mod, function, chains)
    rewritten = dict(mod.functions.items())
    rewritten[mod.get_global_var(name)] = rewriter.visit_expr(function)
    return with_formats(IRModule(rewritten, attrs=mod.attrs), formats or {}, name=name)


def shape_chains(mod: IRModule, plan: Mapping[str, Choice], *, name: str = "main") -> dict[str, Chain]:
    """Chains of the plan's shapes with zero weights: enough to lower, tune and time a plan."""
    chains = {}
    for binding in bindings(mod[name]):
        choice = plan.get(binding.var.name, Choice())
        if not is_site(binding.value) or choice.rank is None:
            continue
        specs = METHODS[choice.method].chain_specs(conv_spec(binding.value), choice.rank)
        convs = tuple(Conv(spec, np.zeros(spec.weight_shape, np.float32)) for spec in specs)
        chains[binding.var.name] = Chain(convs, np.zeros(specs[-1].out_channels, np.float32))
    return chains


def shaped(mod: IRModule, plan: Mapping[str, Choice], *, name: str = "main") -> IRModule:
    """The module under a plan, with `shape_chains`."""
    return replace_sites(mod, shape_chains(mod, plan, name=name), formats=formats_in(plan), name=name)


@tvm.transform.module_pass(opt_level=0, name="DecomposeConv2D")
class DecomposeConv2D:
    """Replace convolutions with constant weights by the chains that a plan chooses.

        mod = tvm.transform.Sequential([DecomposeConv2D(plan), relax.transform.LegalizeOps()])(mod)

    Works on any data and kernel layout, symbolic shapes, strides, dilation, groups and asymmetric padding. A site is
    named by the variable that its ``relax.nn.conv2d`` is bound to; `tvm_lowrank.graph.find_sites` lists them.

    Parameters
    ----------
    plan : the choice for each site; sites that are not named stay as they are.
    moments : input statistics of sites; where given, the expected output error is minimised and the bias corrected.
    name : the function to rewrite.

    Raises
    ------
    ValueError
        When run: a site that the function does not have, a rank outside its range, an unknown method.
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Choice],
        *,
        moments: Mapping[str, AnyMoments] | None = None,
        name: str = "main",
    ) -> None:
        self.plan = plan
        self.moments = moments or {}
        self.name = name

    def transform_module(self, mod: IRModule, _: tvm.transform.PassContext) -> IRModule:
        sites = {site.id: site for site in find_sites(mod, self.name)}
        chains: dict[str, Chain] = {}
        for id, choice in self.plan.items():
            if id not in sites:
                raise ValueError(f"no site {id!r}; sites are {', '.join(sites)}")
            if choice.method != DENSE:
                site = sites[id]
                recipe = {"method": choice.method, "rank": choice.rank, "moments": self.moments.get(id)}
                try:
                    chains[id] = decompose(site.weight, site.spec, **recipe)  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"site {id!r}: {error}") from error
        return replace_sites(mod, chains, formats=formats_in(self.plan), name=self.name)


@relax.register_pipeline("tvm_lowrank")
def pipeline(
    *,
    plan: Mapping[str, Choice] | str | Path,
    moments: Mapping[str, AnyMoments] | None = None,
    name: str = "main",
) -> tvm.transform.Pass:
    """What TVM's default pipeline makes of a module whose sites are chains, under TVM's name for it.

        library = tvm.compile(mod, "llvm", relax_pipeline=relax.get_pipeline("tvm_lowrank", plan="plan.json"))

    It is there once this module is imported, which taking `DecomposeConv2D` from `tvm_lowrank` does.

    Parameters
    ----------
    plan : the choice for each site, or the path of a ``plan.json``.
    moments, name : as of `DecomposeConv2D`.

    Raises
    ------
    UserError
        If the plan cannot be read.
    ValueError
        When run, as `DecomposeConv2D`.
    """
    decompose = DecomposeConv2D(Plan.of(plan), moments=moments, name=name)
    return tvm.transform.Sequential([decompose, relax.get_pipeline("default_build")], name="tvm_lowrank")
