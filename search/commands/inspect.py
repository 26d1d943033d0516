"""`tvm_lowrank inspect`: the sites of a model and where its time goes."""

from __future__ import annotations

from tvm_lowrank import console
from tvm_lowrank.options import InspectOptions
from tvm_lowrank.plan import Choice
from tvm_lowrank.precision import possible
from tvm_lowrank.searching.commands.inputs import load, opened


def print_sites(asked: InspectOptions) -> None:
    """Tune the dense network's kernels (or take them from the cache) and print a table of its sites."""
    inputs = load(asked)
    sites = inputs.sites
    with opened(inputs) as (device, _, times):
        formats = times.fastest_dense(lambda site: possible(site.spec, inputs.formats))
        others = times.measure_others(formats)
        dense = {site.id: times.estimate(site.id, formats.get(site.id, Choice())) for site in sites}
    total = sum(dense.values()) + others
    macs = sum(site.macs for site in sites)
    rows = [
        (
            site.id,
            f"{site.spec.in_channels} -> {site.spec.out_channels}",
            f"{site.spec.kernel[0]}x{site.spec.kernel[1]}" + (f" /{site.spec.groups}" if site.spec.groups > 1 else ""),
            f"{site.size[0]}x{site.size[1]}",
            formats.get(site.id, Choice()).format,
            f"{site.macs / 1e6:.2f} M",
            f"{100 * site.macs / macs:.1f} %",
            f"{dense[site.id]:.4f}",
            f"{100 * dense[site.id] / total:.1f} %",
            f"{2 * site.macs / dense[site.id] / 1e6:.0f}",
        )
        for site in sites
    ]
    rows.append(("(other)", "", "", "", "", "", "", f"{others:.4f}", f"{100 * others / total:.1f} %", ""))
    console.table(
        f"{asked.model_name} on {inputs.profile.name}, {asked.threads} thread(s), batch {asked.batch}: "
        f"{macs / 1e6:.1f} M MACs, {device.how}",
        ("site", "channels", "kernel", "input", "format", "MACs", "of all", "ms", "of all", "GFLOPS"),
        rows,
    )
