"""What a contest is about: the dense network in PyTorch, and our libraries, from a bundle or built here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tvm.ir import IRModule

from peers.contest import COARSE, EXACT, HALF, INT8, OURS, Contestant, Match
from peers.runtimes import IMAGES, ONNX
from tvm_lowrank import UserError, console, example
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.grids import calibrated
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bundle.library import library as library_of
from tvm_lowrank.bundle.manifest import read_manifest
from tvm_lowrank.codegen.link import export_library
from tvm_lowrank.codegen.lower import build, kernels, lower
from tvm_lowrank.data.synthetic import dead_leaves
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.precision import grids_of, with_formats
from tvm_lowrank.reference import load_object, summary
from tvm_lowrank.searching.candidates import candidates, site_macs
from tvm_lowrank.searching.choose.allowed import Allowed
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.targets.profile import load_profile
from tvm_lowrank.transform import DecomposeConv2D

TESTS = Path(__file__).resolve().parents[2] / "tests"  # has the networks
NETWORKS = {
    "resnet18": "ResNet18",
    "resnet50": "ResNet50",
    "vgg16": "Vgg16",
    "mobilenet_v2": "MobileNetV2",
}
NAMES = (example.NAME, *NETWORKS)


@dataclass(frozen=True, eq=False)
class Entry:
    """The dense network, and our libraries of it.

    Attributes
    ----------
    shape
        (N, C, H, W) of a batch.
    images
        (n, C, H, W) for calibration, and after them the batch that everything is timed with.
    compressed
        What our compressed library computes, in float32; None if there is none.
    """

    net: nn.Module
    shape: tuple[int, ...]
    images: np.ndarray
    libraries: tuple[Contestant, ...]
    compressed: Callable[[np.ndarray], np.ndarray] | None


def bundle(folder: Path, model: str | None, *, count: int) -> Entry:
    """A bundle's libraries, and the network that it was made from: ``model``, or the bundled example.

    Raises
    ------
    UserError
        If the bundle is damaged, or it is not said which network it was made from.
    """
    manifest = read_manifest(folder)
    if model is None and manifest["model"] != example.NAME:
        raise UserError(f"{folder} was made from {manifest['model']}; give that network as --model file.py:factory")
    net = (example.model() if model is None else load_object(model)()).eval()
    shape, sites = tuple(manifest["input_shape"]), manifest["sites"]
    formats = [site.get("dense_format", FLOAT32) for site in sites]
    libraries = [library(library_of(folder, manifest, "dense"), formats, "dense")]
    compressed = None
    if any(site["rank"] is not None for site in sites):
        formats = [site.get("format", FLOAT32) for site in sites]
        libraries.append(library(library_of(folder, manifest), formats, "compressed"))
        compressed = portable(folder)
    return Entry(net, shape, images(shape, count, real=model is None), tuple(libraries), compressed)


def threads_of(folder: Path, asked: int | None) -> int:
    """Those that a bundle's libraries were built for; UserError if others are asked for."""
    built = int(read_manifest(folder)["latency_ms"]["threads"])
    if asked not in (None, built):
        raise UserError(f"{folder} was built with --threads {built}; leave --threads out, or build another one")
    return built


def named(name: str, folder: Path, *, threads: int, cache: Path, count: int, budget_free: bool) -> Entry:
    """A network of `NAMES`; its libraries are tuned, and written to the folder.

    The dense one is in float32, and in the fastest formats if these are others. With ``budget_free`` there is one at
    half of the MACs.
    """
    real = name == example.NAME
    net, shape = network(name), example.INPUT_SHAPE if real else (1, 3, 224, 224)
    mod, profile, compressed = import_model(net, input_shape=shape), load_profile("x86"), None
    with LatencyOracle(profile, cache_dir=cache, threads=threads) as oracle:
        sites = find_sites(mod)
        times = SiteTimes(mod, sites, oracle, batch=shape[0])
        pictures = images(shape, count, real=real)
        mod = calibrated(mod, pictures, names=[site.id for site in sites])
        fractions = [name for name in profile.formats if not FORMATS[name].whole]
        built: list[tuple[str, Mapping[str, str], IRModule]] = [("dense", {}, mod)]
        for allowed in (fractions, profile.formats):
            formats = times.fastest_dense(Allowed(allowed, gridded=grids_of(mod["main"]))).formats
            if formats and formats != built[-1][1]:
                built.append(("dense", formats, with_formats(mod, formats)))
        formats = built[-1][1]
        if budget_free:
            small = DecomposeConv2D(half(sites, profile.lanes))(mod)
            built.append(("compressed", formats, calibrated(with_formats(small, formats), pictures)))
            compressed = partial(predict, TorchBridge(small))
        libraries = []
        for i, (which, own, module) in enumerate(built):
            console.phase(f"building the {which} library, {' and '.join(sorted(set(own.values()))) or FLOAT32}")
            path = folder / f"{i}.so"
            link(module, path, shape[0], oracle)
            libraries.append(library(path, own.values(), which))
    return Entry(net, shape, pictures, tuple(libraries), compressed)


def network(name: str) -> nn.Module:
    """The bundled example, or a network with random weights, in evaluation mode."""
    if name == example.NAME:
        return example.model()
    sys.path.insert(0, str(TESTS))
    from support import models

    return models.randomised(getattr(models, NETWORKS[name])())


def half(sites: Sequence[Site], lanes: int) -> Plan:
    """Each convolution at the rank whose MACs are nearest to half of its own."""
    chosen = {}
    for site in sites:
        own = candidates(site, methods=("spatial", "svd"), lanes=lanes)
        if own:
            chosen[site.id] = min(own, key=lambda choice, site=site: abs(site_macs(site, choice) / site.macs - 0.5))
    return Plan(chosen)


def link(mod: IRModule, path: Path, batch: int, oracle: LatencyOracle) -> None:
    """Tune the kernels that the oracle does not know, and build a library."""
    target = oracle.profile.tvm_target(oracle.threads)
    lowered = lower(mod, batch=batch, target=target)
    oracle.measure(kernels(lowered))
    export_library(build(lowered, oracle.database, target, threads=oracle.threads), path)


def library(path: Path, formats: Iterable[str], network: str) -> Contestant:
    """A library of ours, whose sites are in these formats."""
    others = sorted(set(formats) - {FLOAT32})
    return Contestant(
        OURS,
        " and ".join(others) or FLOAT32,
        runtime=OURS,
        file=str(path.resolve()),
        package="tvm",
        tolerance=COARSE if INT8 in others else HALF if others else EXACT,
        network=network,
    )


def images(shape: Sequence[int], count: int, *, real: bool) -> np.ndarray:
    """About so many images, in whole batches, and a batch more: the example's, or made ones."""
    batch, channels, height, width = shape
    wanted = (max(1, count // batch) + 1) * batch
    if real:
        found = np.asarray(example.data()["calibration"][:wanted])
        return found[: len(found) // batch * batch]
    return dead_leaves((channels, height, width), wanted).astype("float32")


def portable(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A bundle's compressed network, in PyTorch; UserError if the bundle lacks it."""
    path = folder / "model.pt2"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name}, which tells what its library should compute; search again")
    return in_torch(torch.export.load(path).module())


def in_torch(net: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """A torch module as a function of arrays."""

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(net(torch.from_numpy(x)))

    return run


def prepared(entry: Entry, folder: Path, **options: Any) -> Match:
    """Write what the peers read, and compute what PyTorch does; ``options`` are those of `Match`.

    A network that cannot be written as ONNX is told of, and no peer will run.
    """
    batches = np.ascontiguousarray(entry.images.reshape(-1, *entry.shape))
    x = batches[-1]
    np.save(folder / IMAGES, batches[:-1])
    inside = {"dynamo": True, "verbose": False, "external_data": False}  # one file, for MNN and ncnn
    try:
        torch.onnx.export(entry.net, (torch.from_numpy(x),), str(folder / ONNX), **inside)
    except Exception as error:  # the exporter has many kinds
        console.warn(f"PyTorch cannot write the network as ONNX: {summary(error)}")
    expected = {"dense": in_torch(entry.net)(x)}
    if entry.compressed is not None:
        expected["compressed"] = entry.compressed(x)
    return Match(folder, x, expected, **options)
