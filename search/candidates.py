"""Candidates: which (method, rank) a site may become, and what that costs in MACs."""

from __future__ import annotations

from collections.abc import Iterable

from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS, ConvSpec, chain_macs
from tvm_lowrank.methods.moments import wide
from tvm_lowrank.plan import Choice

# MACs relative to dense; a dearer chain has never been measured faster
DEAREST = 0.95


def candidates(site: Site, *, methods: Iterable[str], lanes: int) -> list[Choice]:
    """Every method at every rank worth considering that costs fewer MACs than the site does."""
    choices = []
    for name in methods:
        method = METHODS[name]
        if skipped(site) or not method.applies(site.spec) or (wide(site.spec) and not method.wide):
            continue
        for rank in method.ranks(site.spec, lanes):
            if chain_macs(method.chain_specs(site.spec, rank), site.size) <= DEAREST * site.macs:
                choices.append(Choice(name, rank))
    return choices


def skipped(site: Site) -> bool:
    """Sites left alone: first layers (at most four input channels) and depthwise convolutions."""
    return site.spec.in_channels <= 4 or site.spec.groups == site.spec.in_channels


def chain_specs(site: Site, choice: Choice) -> tuple[ConvSpec, ...]:
    """The geometry of the convolutions that a site becomes."""
    if choice.rank is None:
        return (site.spec,)
    return METHODS[choice.method].chain_specs(site.spec, choice.rank)


def site_macs(site: Site, choice: Choice) -> int:
    """MACs for one image of a site under a choice."""
    return chain_macs(chain_specs(site, choice), site.size)
