"""A plan from the weights alone: ranks estimated by variational Bayes, as Kim et al. 2016 choose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tvm_lowrank import console
from tvm_lowrank.files import write_text
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS, chain_macs, grouped
from tvm_lowrank.methods.solvers.evbmf import evbmf_rank, suggest_ranks
from tvm_lowrank.plan import Choice, Plan


def suggest_plan(sites: Sequence[Site], *, weakening: float = 0.0) -> Plan:
    """Tucker-2 for convolutions and two factors for 1 x 1 convolutions and linear layers, at their EVBMF ranks.

    The first layer (at most four input channels), the last, grouped convolutions, and sites that would gain no MACs
    stay dense.

    Parameters
    ----------
    weakening : how far to go from the estimated ranks (0) back to the full ones (1).

    Raises
    ------
    ValueError
        If weakening is outside 0..1.
    """
    choices = {}
    for site in console.track(sites[:-1], "estimating ranks"):
        spec = site.spec
        if spec.in_channels <= 4 or spec.groups > 1:
            continue
        if max(spec.kernel) > 1:
            choice = Choice("tucker2", suggest_ranks(site.weight, weakening=weakening))
        else:
            found, full = evbmf_rank(grouped(site.weight, spec)[0]), min(spec.weight_shape[:2])
            choice = Choice("svd", max(1, round(found + weakening * (full - found))))
        assert choice.rank is not None
        if chain_macs(METHODS[choice.method].chain_specs(spec, choice.rank), site.size) < site.macs:
            choices[site.id] = choice
    return Plan(choices)


def write_suggestion(sites: Sequence[Site], out: Path, *, weakening: float = 0.0) -> Plan:
    """Write the suggested plan to a file, and print it as a table with the MACs of each site."""
    plan = suggest_plan(sites, weakening=weakening)
    write_text(out, plan.to_json())
    rows, dense, compressed = [], 0, 0
    for site in sites:
        choice = plan.get(site.id, Choice())
        specs = (site.spec,) if choice.rank is None else METHODS[choice.method].chain_specs(site.spec, choice.rank)
        macs = chain_macs(specs, site.size)
        dense, compressed = dense + site.macs, compressed + macs
        rows.append((site.id, str(choice), f"{site.macs / 1e6:.1f}", f"{macs / 1e6:.1f}", f"{site.macs / macs:.2f}"))
    console.table("ranks estimated from the weights", ("site", "becomes", "M MACs", "then", "ratio"), rows)
    print(f"{dense / compressed:.2f}x fewer MACs in all; plan: {out}")
    return plan
