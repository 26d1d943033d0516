"""Which convolutions of a canonical function are computed in half precision or int8, and what is rounded for them.

The function's values stay float32; its attribute ``formats`` names the format of each site that has another one, and
``grids`` the numbers that a convolution in int8 reads. A convolution in a format reads its weights and its input
rounded to it, and adds up in float32 (int32). What it reads is also kept in that format, for all who read it: so it
takes less memory, and is rounded once. PyTorch (`tvm_lowrank.bridge`) and the compiled code (`tvm_lowrank.codegen`)
both follow what is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tvm import relax
from tvm.ir import Call, IRModule, Op

from tvm_lowrank.formats import FLOAT32, FORMATS, LARGEST, LEVELS, Format, Grid
from tvm_lowrank.graph import bindings, chain_of, conv_spec, is_site, with_attribute
from tvm_lowrank.methods import ConvSpec

ATTRIBUTE, GRIDS = "formats", "grids"
PLACEHOLDER = Grid(1.0, 0)  # where only time matters
CHOOSING = {Op.get(f"relax.{name}") for name in ("nn.max_pool2d", "concat")}
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


def without_formats(mod: IRModule, *, name: str = "main") -> IRModule:
    """A copy of the module whose function computes everything in float32."""
    return with_formats(mod, dict.fromkeys(formats_of(mod[name]), FLOAT32), name=name)


def formats_of(function: relax.Function) -> dict[str, str]:
    """Site to the name of its format, where that is not float32."""
    attributes = function.attrs or {}
    return {str(site): str(format) for site, format in attributes.get(ATTRIBUTE, {}).items()}


def applies(spec: ConvSpec) -> bool:
    """Whether a convolution may be computed in half precision: all but those of narrow groups; depthwise ones may."""
    inside, outside = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return spec.groups == 1 or inside == outside == 1 or min(inside, outside) >= NARROW


def possible(spec: ConvSpec, formats: Sequence[str], largest: float = 0.0, *, gridded: bool = True) -> Sequence[str]:
    """Those of the formats, by name, in which a convolution may be computed; float32 if there are none.

    ``largest`` is the largest absolute value among its operands, if that is known; ``gridded`` says whether there is a
    grid for what it reads.
    """
    most = prod(spec.weight_shape[1:]) * LEVELS * LARGEST  # of a sum of products of bytes
    whole = gridded and most < 2**31

    def fits(format: Format) -> bool:
        return applies(spec) and (whole if format.whole else largest <= format.largest)

    return [format for format in formats if fits(FORMATS[format])] or (FLOAT32,)


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


def has_integers(function: relax.Function) -> bool:
    """Whether a convolution is computed in whole numbers."""
    return any(format.whole for format in operand_formats(function).values())


@dataclass(frozen=True)
class Kept:
    """How the numbers are kept that a convolution reads: in a format, and on a grid where that has whole numbers."""

    format: Format
    grid: Grid | None = None


def with_grids(mod: IRModule, grids: Mapping[str, Grid], *, name: str = "main") -> IRModule:
    """A copy of the module in which these convolutions, by name, read these numbers in int8; others as they were."""
    texts = {conv: str(grid) for conv, grid in {**grids_of(mod[name]), **grids}.items()}
    return with_attribute(mod, GRIDS, texts, name=name)


def grids_of(function: relax.Function) -> dict[str, Grid]:
    """The grids of what convolutions read in int8, by their names."""
    return parsed(grid_texts(function))


def grid_texts(function: relax.Function) -> dict[str, str]:
    """`grids_of` as texts, to be stored or sent."""
    attributes = function.attrs or {}
    return {str(conv): str(text) for conv, text in attributes.get(GRIDS, {}).items()}


def parsed(texts: Mapping[str, str]) -> dict[str, Grid]:
    """The grids that `grid_texts` wrote."""
    return {conv: Grid.parse(text) for conv, text in texts.items()}


def kept_operands(function: relax.Function) -> dict[str, Kept]:
    """The convolutions, by name, that read rounded operands, and how these are kept.

    Raises
    ------
    ValueError
        If a convolution in int8 has no grid.
    """
    formats = operand_formats(function)
    grids = grids_of(function)
    missing = [name for name, format in formats.items() if format.whole and name not in grids]
    if missing:
        raise ValueError(f"no grid for {', '.join(missing)}; tvm_lowrank.bridge.grids.calibrated finds them")
    return {name: Kept(format, grids[name] if format.whole else None) for name, format in formats.items()}


def placeholders(mod: IRModule, *, name: str = "main") -> IRModule:
    """The module with some grid wherever one is missing: enough to build and time it, not to compute with it."""
    known = grids_of(mod[name])
    missing = [conv for conv, format in operand_formats(mod[name]).items() if format.whole and conv not in known]
    return with_grids(mod, dict.fromkeys(missing, PLACEHOLDER), name=name) if missing else mod


def stored(function: relax.Function) -> dict[relax.Var, Kept]:
    """The variables that are kept in another format, for they are read in this one and no second.

    So are those of which only such variables on grids are made, by operators that choose among numbers (`CHOOSING`):
    whether these are rounded before or after makes no difference.
    """
    operands = kept_operands(function)
    if not operands:
        return {}
    read: dict[relax.Var, set[Kept]] = {}
    readers: dict[relax.Var, list[relax.VarBinding]] = {}
    for binding in bindings(function):
        if is_site(binding.value) and binding.var.name in operands:
            read.setdefault(binding.value.args[0], set()).add(operands[binding.var.name])
        for var in set(relax.analysis.free_vars(binding.value)):
            readers.setdefault(var, []).append(binding)
    found = {var: kept.pop() for var, kept in read.items() if len(kept) == 1}
    results = set(relax.analysis.free_vars(function.body.body))
    for binding in reversed(bindings(function)):
        kept = found.get(binding.var)
        if kept is None or kept.grid is None or not chooses(binding.value):
            continue
        among = set(relax.analysis.free_vars(binding.value))
        others = [reader for var in among - set(found) for reader in readers[var]]
        alike = all(chooses(reader.value) and found.get(reader.var) == kept for reader in others)
        if alike and not among & results and all(found.get(var, kept) == kept for var in among):
            found.update(dict.fromkeys(among, kept))
    return found


def chooses(value: relax.Expr) -> bool:
    """Whether a value has only numbers that its operands have."""
    return isinstance(value, Call) and value.op in CHOOSING
