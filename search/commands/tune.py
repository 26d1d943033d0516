"""`tvm_lowrank tune` and `tvm_lowrank profile`: the database of measured kernels, and what is in it for a model."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.codegen.lower import kernels_of
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import write_text
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.options import ProfileOptions
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import operand_formats, possible, with_formats
from tvm_lowrank.searching.candidates import candidates, site_macs
from tvm_lowrank.searching.commands.inputs import load, opened
from tvm_lowrank.searching.latency.cache import KernelCache, exported, how_to_tune, read_export
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.peaks import Peaks, measure_peaks
from tvm_lowrank.searching.latency.whole import operand_bytes
from tvm_lowrank.targets.profile import Profile, load_profile

SCHEMA = 2


def tune(
    target: str,
    *,
    cache_dir: Path,
    threads: int = 1,
    emulate: bool = False,
    export_to: Path | None = None,
    import_from: Path | None = None,
) -> None:
    """Export, import or describe the database of a target; says what was done on standard output.

    Raises
    ------
    UserError
        If both files are given, one cannot be used, or the database cannot; an import then changes nothing.
    """
    if export_to is not None and import_from is not None:
        raise UserError("--export and --import do not go together; give one, then the other")
    if threads < 1:
        raise UserError(f"--threads {threads} is not possible; give at least 1")
    profile = replace(load_profile(target), emulated=emulate)
    if profile.is_host and emulate:
        raise UserError(f"target {profile.name} is this machine; leave --emulate out")
    if import_from is not None:
        entries = read_export(import_from, profile, threads=threads)
        cache = KernelCache.open(cache_dir, profile, threads=threads)
        try:
            added = cache.merge(entries)
        except OSError as error:
            raise UserError(f"cannot write {cache.path}: {error.strerror}; make room and import again") from error
        print(f"{added} kernels added, {len(entries) - added} kept that had as many trials or more: {cache.path}")
        return
    cache = KernelCache.open(cache_dir, profile, threads=threads)
    if export_to is None:
        print(_described(cache, profile))
        return
    if not cache.entries:
        raise UserError(f"no kernels of target {profile.name} to export; {how_to_tune(profile, threads)}")
    if export_to.resolve() == cache.path.resolve():
        raise UserError(f"{export_to} is the database itself; export it to another file")
    write_text(export_to, exported(cache.entries.values(), profile, threads=threads))
    print(f"{len(cache.entries)} kernels exported: {export_to}")


def _described(cache: KernelCache, profile: Profile) -> str:
    """Where the database of a target lies, how much is in it, and what can be done with it."""
    entries = list(cache.entries.values())
    lines = [f"database of target {profile.name}: {cache.path}"]
    if entries:
        trials = sorted({entry.trials for entry in entries})
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.path.stat().st_mtime))
        lines.append(
            f"{len(entries)} kernels, {sum(entry.conv is not None for entry in entries)} of them convolutions, tuned "
            f"with {' to '.join(map(str, dict.fromkeys((trials[0], trials[-1]))))} trials; the newest of {written}"
        )
    else:
        lines.append("no kernels yet; tvm_lowrank profile fills it ahead of a search")
    lines.append("--export FILE writes it to one file; --import FILE adds what such a file has and it has not")
    return "\n".join(lines)


@dataclass(frozen=True)
class Timed:
    """A kernel of the dense network, or all of them.

    ``site`` is None where it is no convolution or linear layer, and then there are no ``products``: the MACs by number
    format; ``moved`` are the bytes of all its arguments; ``share`` is the part of the whole network's time.
    """

    name: str
    site: str | None
    ms: float
    share: float
    products: Mapping[str, int]
    moved: int

    @property
    def macs(self) -> int:
        return sum(self.products.values())

    @property
    def gflops(self) -> float:
        return 2e-6 * self.macs / self.ms

    @property
    def gb_per_s(self) -> float:
        return 1e-6 * self.moved / self.ms

    def above(self, peaks: Peaks) -> float:
        """Milliseconds above the roofline; negative where the caches make up for the memory."""
        return self.ms - peaks.ms(products=self.products, moved=self.moved)

    def of_peak(self, peaks: Peaks) -> float:
        """The part of its time that the products would take at the peak."""
        return peaks.ms(products=self.products, moved=0) / self.ms

    def to_json(self, peaks: Peaks) -> dict[str, Any]:
        return {
            "name": self.name,
            "site": self.site,
            "ms": self.ms,
            "share": self.share,
            "macs": self.macs,
            "macs_by_format": dict(self.products),
            "bytes": self.moved,
            "gflops": self.gflops,
            "of_peak_gflops": self.of_peak(peaks),
            "gb_per_s": self.gb_per_s,
            "of_peak_gb_per_s": self.gb_per_s / peaks.gb_per_s,
            "ms_above_roofline": self.above(peaks),
        }


def profile(asked: ProfileOptions) -> None:
    """Tune the dense network, print where its time goes, and tune candidates of the search as well.

    What is in the database is not measured again, and what is measured is there at once.

    Raises
    ------
    UserError
        If the input is bad.
    MeasurementError
        If the device fails.
    """
    inputs = load(asked)
    sites = inputs.sites
    try:
        with opened(inputs) as (device, oracle, times):
            console.phase(f"tuning the kernels of the dense network, of {len(sites)} layers")
            dense = times.fastest_dense(lambda site: possible(site.spec, inputs.formats))
            rows = timed_kernels(with_formats(inputs.mod, dense.formats), oracle, batch=asked.batch)
            console.phase("measuring the peaks of the device")
            peaks = measure_peaks(device.devices, device.profile, inputs.formats, threads=asked.threads)
            printed = _print_json if asked.json else _print_table
            printed(rows, peaks, asked, device.profile, device.how)
            wanted = likeliest(sites, rows, dense, asked, lanes=device.profile.lanes)
            if wanted:
                console.phase(f"tuning {len(wanted)} candidates of the search")
                times.measure(wanted)
    except KeyboardInterrupt:
        console.warn("interrupted; what was measured is kept, and the same command goes on from there")
        raise


def timed_kernels(mod: IRModule, oracle: LatencyOracle, *, batch: int) -> list[Timed]:
    """The kernels of the dense network in the order of execution; those that the database lacks are tuned."""
    found = kernels_of(mod, batch=batch, target=oracle.profile.tvm_target(oracle.threads))
    latencies = oracle.measure(kernel for kernel, _ in found)
    total = sum(latencies[kernel.key].ms for kernel, _ in found)
    formats = operand_formats(mod["main"])
    products: dict[str | None, dict[str, int]] = {
        site.id: {formats.get(site.id, FORMATS[FLOAT32]).name: batch * site.macs} for site in find_sites(mod)
    }
    rows = []
    for kernel, site in found:
        ms, moved = latencies[kernel.key].ms, sum(operand_bytes(kernel))
        rows.append(Timed(kernel.name, site, ms, ms / total, products.get(site, {}), moved))
    return rows


def likeliest(
    sites: Sequence[Site], rows: Sequence[Timed], dense: Plan, asked: ProfileOptions, *, lanes: int
) -> list[tuple[str, Choice]]:
    """What to tune for a later search: `spread`, the slowest sites first, in the formats of the dense network."""
    ms = {row.site: row.ms for row in rows}
    options = {site.id: candidates(site, methods=asked.methods, lanes=lanes) for site in sites}
    found = spread(sorted(sites, key=lambda site: -ms[site.id]), options, asked.candidates)
    return [(site, replace(choice, format=dense.get(site, choice).format)) for site, choice in found]


def spread(sites: Sequence[Site], options: Mapping[str, Sequence[Choice]], count: int) -> list[tuple[str, Choice]]:
    """At most ``count`` (site, choice) pairs: as many for each site, or one more for the first, by their order.

    A site's choices are spread evenly over the MACs of its options; among equal ones other methods come first.
    """
    shares: Counter[str] = Counter()
    for _ in range(min(count, sum(len(options[site.id]) for site in sites))):
        open_sites = [site.id for site in sites if shares[site.id] < len(options[site.id])]
        shares[min(open_sites, key=lambda id: shares[id])] += 1
    return [(site.id, choice) for site in sites for choice in _spread_macs(site, options[site.id], shares[site.id])]


def _spread_macs(site: Site, choices: Sequence[Choice], count: int) -> list[Choice]:
    macs = {choice: site_macs(site, choice) for choice in choices}
    least, most = min(macs.values(), default=0), max(macs.values(), default=0)
    found: list[Choice] = []
    for i in range(count):
        goal, used = least + (i + 0.5) / count * (most - least), Counter(choice.method for choice in found)
        left = [choice for choice in choices if choice not in found]
        found.append(min(left, key=lambda choice: (abs(macs[choice] - goal), used[choice.method])))
    return found


def _total(rows: Sequence[Timed]) -> Timed:
    products: Counter[str] = Counter()
    for row in rows:
        products.update(row.products)
    return Timed("total", None, sum(row.ms for row in rows), 1.0, products, sum(row.moved for row in rows))


def _worst(rows: Sequence[Timed], peaks: Peaks) -> Timed:
    return max(rows, key=lambda row: row.above(peaks))


def _print_json(rows: Sequence[Timed], peaks: Peaks, asked: ProfileOptions, target: Profile, how: str) -> None:
    document = {
        "schema": SCHEMA,
        "model": asked.model_name,
        "target": target.name,
        "how": how,
        "threads": asked.threads,
        "batch": asked.batch,
        "peaks": {"gflops": dict(peaks.gflops), "gb_per_s": peaks.gb_per_s},
        "kernels": [row.to_json(peaks) for row in rows],
        "total": _total(rows).to_json(peaks),
        "most_worth_improving": _worst(rows, peaks).to_json(peaks),
    }
    print(json.dumps(document, indent=2))


def _print_table(rows: Sequence[Timed], peaks: Peaks, asked: ProfileOptions, target: Profile, how: str) -> None:
    cells = [
        (
            row.site or row.name,
            " ".join(row.products),
            f"{row.ms:.4f}",
            f"{100 * row.share:.1f} %",
            f"{row.gflops:.1f}" if row.macs else "–",
            f"{100 * row.of_peak(peaks):.0f} %" if row.macs else "–",
            f"{row.gb_per_s:.1f}",
            f"{100 * row.gb_per_s / peaks.gb_per_s:.0f} %",
        )
        for row in (*rows, _total(rows))
    ]
    console.table(
        f"{asked.model_name} on {target.name}, {asked.threads} thread(s), batch {asked.batch}: "
        f"the dense network, {how}",
        ("kernel", "format", "ms", "of all", "GFLOPS", "of peak", "GB/s", "of peak"),
        cells,
    )
    gflops = ", ".join(f"{value:.1f} GFLOPS in {format}" for format, value in peaks.gflops.items())
    print(
        f"peaks of the device: {gflops}, and {peaks.gb_per_s:.1f} GB/s of memory, which what stays in the caches "
        "exceeds"
    )
    worst = _worst(rows, peaks)
    name, above = worst.site or worst.name, worst.above(peaks)
    if above > 0:
        whole = 100 * above / _total(rows).ms
        print(f"most worth improving: {name}, {above:.4f} ms above the roofline ({whole:.1f} % of the total)")
    else:
        print("no kernel is above the roofline: the caches are faster than the memory")
