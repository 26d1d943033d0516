"""Which convolutions of a canonical function are computed in half precision, and what is rounded for them.

The function's values stay float32; its attribute ``formats`` names the format of each site that has another one. A
convolution in a format reads its weights and its input rounded to it, and adds up in float32. What it reads is also
kept in that format, for all who read it: so it takes half the memory, and is rounded once. PyTorch
(`tvm_lowrank.bridge`) and the compiled code (`tvm_lowrank.codegen`) both follow what is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.formats import FLOAT32, FORMATS, Format
from tvm_lowrank.graph import bindings, chain_of, conv_spec, is_site, with_attribute
from tvm_lowrank.methods import ConvSpec

ATTRIBUTE = "formats"
NARROW = 8  # channels; groups that have fewer do not fill the vectors, and are interleaved in float32


def with_formats(mod: IRModule, formats: Mapping[str, str], *, name: str = "main") -> IRModule:
    """A copy of the module whose function computes each of these sites in a format, by its name; others as they were.

    Factors of a chain have the format of their site.

    Raises
    ------
    KeyError
        If there is no such format.
    """
    function = mod[name]
    all = {**formats_of(function), **{site: FORMATS[format].name for site, format in formats.items()}}
    chosen = {site: format for site, format in all.items() if format != FLOAT32}
    if chosen == formats_of(function):
        return mod
    return with_attribute(mod, ATTRIBUTE, chosen, name=name)


def formats_of(function: relax.Function) -> dict[str, str]:
    """Site to the name of its format, where that is not float32."""
    attributes = function.attrs or {}
    return {str(site): str(format) for site, format in attributes.get(ATTRIBUTE, {}).items()}


def applies(spec: ConvSpec) -> bool:
    """Whether a convolution may be computed in half precision: all but those of narrow groups; depthwise ones may."""
    inside, outside = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return spec.groups == 1 or inside == outside == 1 or min(inside, outside) >= NARROW


def possible(spec: ConvSpec, formats: Sequence[str], largest: float = 0.0) -> Sequence[str]:
    """Those of the formats, by name, in which a convolution may be computed; float32 if there are none.

    ``largest`` is the largest absolute value among its operands, if that is known.
    """
    found = [format for format in formats if applies(spec) and largest <= FORMATS[format].largest]
    return found or (FLOAT32,)


def operand_formats(function: relax.Function) -> dict[str, Format]:
    """The convolutions, by name, that read rounded operands, and the format of these."""
    sites = formats_of(function)
    if not sites:
        return {}
    return {
        binding.var.name: FORMATS[sites[chain_of(binding.var.name)]]
        for binding in bindings(function)
        if is_site(binding.value) and chain_of(binding.var.name) in sites and applies(conv_spec(binding.value))
    }


def stored(function: relax.Function) -> dict[relax.Var, Format]:
    """The variables that are kept in another format, for they are read in this one and no second."""
    formats = operand_formats(function)
    read: dict[relax.Var, set[Format]] = {}
    for binding in bindings(function):
        if is_site(binding.value) and binding.var.name in formats:
            read.setdefault(binding.value.args[0], set()).add(formats[binding.var.name])
    return {var: found.pop() for var, found in read.items() if len(found) == 1}
