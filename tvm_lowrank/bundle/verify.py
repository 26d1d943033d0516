"""What a bundle claims: repeat its accuracy, and print its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.bundle.library import CompiledModel, Which, library
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.console import phase, table
from tvm_lowrank.data.form import Stats
from tvm_lowrank.data.images import part
from tvm_lowrank.data.measure import POINTS, unit_called
from tvm_lowrank.data.metric import evaluate, load_metric, tried
from tvm_lowrank.data.parts import take
from tvm_lowrank.data.splits import IN_MEMORY, fingerprint, load_data
from tvm_lowrank.errors import UserError
from tvm_lowrank.formats import FLOAT32

# a point is 0.01 of the images: this is far less than one image; of values that change gradually, another share
TOLERANCE, GRADUAL = 1e-6, 1e-4
OpenModel = Callable[[Path, tuple[int, int, int, int]], Callable[[np.ndarray], Any]]


@dataclass(frozen=True)
class Verification:
    """Values of the metric and their drop, in percent and points or in its own unit.

    ``stated`` is the manifest's ``accuracy``.

    ``ok``: on the manifest's images the figures are the manifest's; on others the drop is within the budget.
    ``verdict`` says which, in one line.
    """

    dense: float
    compressed: float
    drop: float
    ci95: tuple[float, float]
    n: int
    stated: Mapping[str, Any]
    ok: bool
    verdict: str


def verify(
    directory: Path,
    *,
    data: str | Path | Mapping[str, Any] | None = None,
    mean: Stats = None,
    std: Stats = None,
    open_model: OpenModel = CompiledModel,
    chunk: int | None = 64,
    limit: int | None = None,
) -> Verification:
    """Measure the accuracy of a bundle's two libraries again.

    Parameters
    ----------
    data : None repeats it on the data that the manifest names, with its mean and standard deviation.
    open_model : makes a function of any number of images of a library and its input shape (N, C, H, W); for a device
        that is not this machine, see `tvm_lowrank.searching.measure.device`.
    chunk : images that such a function is given at once; None is all of them.
    limit : look at so many images only.

    Raises
    ------
    UserError
        If the bundle or the data cannot be read.
    """
    manifest = read_manifest(directory)
    stated = manifest["accuracy"]
    if stated is None:
        raise UserError(f"{directory} was made without data, so it states no accuracy; decompose again with --data")
    repeat = data is None
    if data is None:
        data, mean, std = (manifest["data"][key] for key in ("source", "mean", "std"))
        if data == IN_MEMORY:
            raise UserError(f"the data of {directory} was given in memory; name it with --data")
    batch, channels, height, width = manifest["input_shape"]
    inputs = manifest.get("inputs") or (channels, height, width)
    metric = load_metric(stated["metric"])
    splits = load_data(data, input_shape=inputs, mean=mean, std=std, labelled=metric.labelled)
    images, targets = part(splits.evaluation[0], slice(limit)), take(splits.evaluation[1], slice(limit))
    phase(f"accuracy of both libraries on {len(images)} images of {splits.name}")

    def opened(which: Which) -> Callable[[Any], Any]:
        return open_model(library(directory, manifest, which), (batch, channels, height, width))

    if metric.function is not None:
        metric = tried(metric, lambda count: opened("dense")(images[:count]), targets)
    judged = partial(evaluate, images=images, targets=targets, metric=metric, chunk=chunk)
    dense = judged(opened("dense"), description="dense.so")
    compressed = judged(opened("model"), description="model.so")
    drop, ci95 = metric.drop(dense, compressed)
    same_data = fingerprint(splits) == manifest["data"]["evaluation_sha256"]
    measured = {"dense": metric.value(dense), "compressed": metric.value(compressed, dense), "drop": drop}
    if same_data and len(images) == stated["n"]:
        near = TOLERANCE if metric.counted else GRADUAL * max(1.0, abs(measured["dense"]))
        ok = all(abs(measured[key] - stated[key]) <= near for key in measured)
        verdict = f"the accuracy is {'' if ok else 'NOT '}that of the manifest"
    elif repeat and not same_data:
        ok, verdict = False, f"the images or targets of {splits.name} have CHANGED since the search"
    else:
        budget = manifest["budget"]
        ok = budget is None or drop <= budget
        within = (
            "not bounded by a budget"
            if budget is None
            else f"{'' if ok else 'NOT '}within {budget:g} {metric.unit.name}"
        )
        verdict = f"on these {'first' if same_data else 'other'} images the drop is {within}"
    return Verification(**measured, ci95=ci95, n=len(images), stated=stated, ok=ok, verdict=verdict)


def print_verification(result: Verification) -> None:
    """The accuracies of the manifest and those measured now, and in one line what follows."""
    stated = result.stated
    table(
        f"accuracy ({stated['metric']}, {_sign(stated)})",
        ("", "images", "dense", "compressed", "drop", "95% interval"),
        [
            (
                "manifest",
                *_accuracy(stated["n"], stated["dense"], stated["compressed"], stated["drop"], stated["ci95"]),
            ),
            ("now", *_accuracy(result.n, result.dense, result.compressed, result.drop, result.ci95)),
        ],
    )
    print(result.verdict)


def print_manifest(manifest: Mapping[str, Any]) -> None:
    """A bundle's figures as tables: every site, the latency, the accuracy."""
    how = manifest["latency_ms"]["how"]
    table(
        f"sites (times {how})",
        ("site", "became", "rank", "format", "MACs", "of dense", "ms", "dense ms", "why"),
        [
            (
                site["id"],
                site["method"],
                "" if site["rank"] is None else site["rank"],
                site.get("format", FLOAT32),
                f"{site['macs'] / 1e6:.1f} M",
                f"{site['macs'] / site['dense_macs']:.2f}",
                _ms(site["ms"]),
                _ms(site["dense_ms"]),
                site["reason"],
            )
            for site in manifest["sites"]
        ],
    )
    print_latency(manifest["latency_ms"], manifest["speedup"])
    print_levels(manifest)
    if "max_latency_ms" in manifest:
        print(f"limit of the latency: {manifest['max_latency_ms']:g} ms")
    if "seconds" in manifest:
        table("time spent", ("phase", "s"), [(name, f"{value:.0f}") for name, value in manifest["seconds"].items()])
    a = manifest["accuracy"]
    if a is None:
        damage = manifest.get("predicted_damage")
        print("accuracy was not measured: no data" + (f"; predicted damage {damage:.4f} nats" if damage else ""))
        return
    table(
        f"accuracy ({a['metric']}, {_sign(a)}), evaluation split, looked at {a['looks']} "
        f"time{'s' if a['looks'] != 1 else ''}",
        ("images", "dense", "compressed", "drop", "95% interval"),
        [_accuracy(a["n"], a["dense"], a["compressed"], a["drop"], a["ci95"])],
    )
    if "float32" in a:
        own = a["float32"]
        drop, (low, high) = own["drop"], own["ci95"]
        print(
            f"from the network as it was given, in float32 ({own['dense']:.2f} {_sign(a)}): {drop:+.2f} {_unit(a)} "
            f"({low:+.2f} to {high:+.2f})"
        )
    if a["on_device"] < a["n"]:
        print(f"{a['on_device']} of the images ran on the device; PyTorch, which agrees with it, computed the others")


def print_comparison(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Bundles side by side; their times compare only where target, threads and batch are the same."""
    columns = ["", *manifests]
    rows = [
        ("target", *(f"{m['target']['name']}, {m['target'].get('mcpu', '')}" for m in manifests.values())),
        ("threads, batch", *(f"{m['latency_ms']['threads']}, {m['latency_ms']['batch']}" for m in manifests.values())),
        ("ms dense", *(_ms(m["latency_ms"]["dense"]["median"]) for m in manifests.values())),
        ("ms compressed", *(_ms(m["latency_ms"]["compressed"]["median"]) for m in manifests.values())),
        ("speed-up", *(f"{m['speedup']:.2f}" for m in manifests.values())),
        ("accuracy dense", *(_shown(m["accuracy"], "dense") for m in manifests.values())),
        ("accuracy compressed", *(_shown(m["accuracy"], "compressed") for m in manifests.values())),
        ("drop", *(_shown(m["accuracy"], "drop") for m in manifests.values())),
        ("MACs", *(f"{sum(site['macs'] for site in m['sites']) / 1e6:.1f} M" for m in manifests.values())),
    ]
    table("", columns, rows)
    names = dict.fromkeys(site["id"] for m in manifests.values() for site in m["sites"])
    found = [{site["id"]: site for site in m["sites"]} for m in manifests.values()]
    table("layers", ["layer", *manifests], [(name, *(_became(own.get(name)) for own in found)) for name in names])


def _shown(accuracy: Mapping[str, Any] | None, key: str) -> str:
    if accuracy is None:
        return "–"
    unit = _unit(accuracy)
    return f"{accuracy[key]:.2f}" + ("" if unit == POINTS.name else f" {unit}")


def _unit(figures: Mapping[str, Any]) -> str:
    """What a manifest's drops are counted in; those of older ones in points."""
    return figures.get("unit", POINTS.name)


def _sign(figures: Mapping[str, Any]) -> str:
    return unit_called(_unit(figures)).sign


def _became(site: Mapping[str, Any] | None) -> str:
    if site is None:
        return "–"
    rank = "" if site["rank"] is None else f" {site['rank']}"
    return f"{site['method']}{rank}, {_ms(site['ms'])} ms"


def print_frontier(frontier: Mapping[str, Any]) -> None:
    """The bundles of a `frontier.json` as a table: latency, drops in the metric's unit, MACs."""
    dense, looks = frontier["dense"], frontier["looks"]
    threads, batch = frontier["threads"], frontier["batch"]
    table(
        f"frontier (ms {frontier['how']}, {threads} thread{'s' if threads != 1 else ''}, batch {batch}; "
        f"{frontier['metric']}, drops in {_unit(frontier)}, {frontier['images']} evaluation images, "
        f"looked at {looks} time{'s' if looks != 1 else ''} in all)",
        ("bundle", "ms", "speed-up", "drop on selection", "on evaluation", "95% interval", "MACs"),
        [
            ("dense", _ms(dense["ms"]), "1.00", "", "", "", f"{dense['macs'] / 1e6:.1f} M"),
            *(
                (
                    row["bundle"],
                    _ms(row["ms"]),
                    f"{row['speedup']:.2f}",
                    f"{row['selection_drop']:+.2f}",
                    f"{row['drop']:+.2f}",
                    f"{row['ci95'][0]:+.2f} to {row['ci95'][1]:+.2f}",
                    f"{row['macs'] / 1e6:.1f} M",
                )
                for row in frontier["bundles"]
            ),
        ],
    )


def print_latency(latency_ms: Mapping[str, Any], speedup: float) -> None:
    """A table of the manifest's ``latency_ms`` (milliseconds per call)."""
    threads, batch = latency_ms["threads"], latency_ms["batch"]
    rows = [("dense", ""), ("compressed", f"{speedup:.2f}")]
    if FLOAT32 in latency_ms:
        rows.insert(0, (FLOAT32, f"{latency_ms['dense']['median'] / latency_ms[FLOAT32]['median']:.2f}"))
    table(
        f"latency ({latency_ms['how']}, {threads} thread{'s' if threads != 1 else ''}, batch {batch})",
        ("", "median ms", "10 %", "90 %", "speed-up"),
        [(name, *(_ms(latency_ms[name][key]) for key in ("median", "p10", "p90")), ratio) for name, ratio in rows],
    )


def print_levels(manifest: Mapping[str, Any]) -> None:
    """The levels of a bundle for several targets as a table; nothing for other bundles."""
    rows = []
    for level in manifest.get("levels", ()):
        latency = level["latency_ms"]
        medians = ("–", "–", "not measured")
        if latency is not None:
            dense, compressed = (latency[which]["median"] for which in ("dense", "compressed"))
            medians = (_ms(dense), _ms(compressed), f"{dense / compressed:.2f}")
        rows.append((level["target"]["name"], level["target"].get("mcpu", ""), *medians))
    if rows:
        table(
            "levels: a loader takes the first that its processor has",
            ("target", "code", "ms dense", "ms compressed", "speed-up"),
            rows,
        )


def _accuracy(n: int, dense: float, compressed: float, drop: float, ci95: tuple[float, float]) -> tuple[str, ...]:
    return (str(n), f"{dense:.2f}", f"{compressed:.2f}", f"{drop:+.2f}", f"{ci95[0]:+.2f} to {ci95[1]:+.2f}")


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
