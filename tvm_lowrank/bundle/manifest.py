"""The manifest of a bundle, which is the directory that is shipped: written piece by piece, then read again.

``model.so`` (compressed) and ``dense.so`` have one function ``main(x)`` for a fixed batch; ``plan.json`` says what
became of every site; ``model.pt2`` and ``model.onnx`` are the compressed network for other tools, in float32 but for
int8 in ``model.onnx``; ``manifest.json`` (schema 1, written last) describes the rest (``accuracy`` and ``data`` are
null if there was no data):

    schema, versions, model, target, budget (in the metric's unit), input_shape ([N, C, H, W] of the libraries),
    inputs, outputs (of networks with several: the shape of each, without the batch; the libraries take the inputs as
        one, [N, numbers, 1, 1]),
    data: {source, mean, std, evaluation_sha256},
    accuracy: {metric, unit (of drop, ci95 and budget: "points", of values in percent, as in all old bundles, or the
               metric's own, such as "dB", of values as well), n, dense, compressed, drop, ci95: [low, high], looks,
               on_device (of n),
               float32 (where dense.so is in other formats): {dense, drop, ci95} from the network as given},
    latency_ms: {dense: {median, p10, p90, predicted}, compressed: {…}, float32 (as above): {…}, threads, batch, how},
    speedup (of dense.so),
    sites: [{id, method, rank, format, ms, dense_ms, dense_format, macs, dense_macs, reason,
             offers: [{method, rank, format, ms, nats, measured, cost}]}],
    plans (of searches with data): [{plan (as in plan.json), fit, ms (sum of its sites), predicted, damage (nats),
             drop, error, expected (in the metric's unit: counted, its standard error, by the damage),
             unscored (where the metric gave no number: why, and all counts as lost)}], in the order of evaluation,
    seconds: {phase: s of the last run}, files: {name: SHA-256},
    levels (of bundles for several targets, the best first): [{target, folder (of its model.so and dense.so; "" is the
        bundle itself), latency_ms (null where it could not be measured)}]; a loader takes the first that it can run,
    processor (not in old bundles): {arch, features}, what the code needs beyond what all processors of the architecture
        have, in the words of /proc/cpuinfo; the libraries say it, too, and loaders refuse them where it is missing
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.codegen.processor import read
from tvm_lowrank.errors import UserError
from tvm_lowrank.files import write_text

SCHEMA = 1
MANIFEST = "manifest.json"
PORTABLE = ("model.pt2", "model.onnx")
LIBRARIES = ("model.so", "dense.so")
FILES = (*LIBRARIES, "plan.json", *PORTABLE)

# what a reader may rely on; `write_manifest` refuses a manifest without it
REQUIRED: dict[str, tuple[str, ...]] = {
    "schema": (),
    "model": (),
    "target": (),
    "versions": (),
    "budget": (),
    "input_shape": (),
    "data": ("source", "mean", "std", "evaluation_sha256"),
    "accuracy": ("metric", "n", "dense", "compressed", "drop", "ci95", "looks", "on_device"),
    "latency_ms": ("dense", "compressed", "threads", "batch", "how"),
    "speedup": (),
    "sites": (),
    "files": ("model.so",),
}
SITE_KEYS = ("id", "method", "rank", "ms", "dense_ms", "macs", "dense_macs", "reason")
PLAN_KEYS = {"plan": Mapping, "fit": str} | dict.fromkeys(
    ("ms", "predicted", "damage", "drop", "error", "expected"), Real
)
LEVEL_KEYS = {"target": Mapping, "folder": str}
LARGEST = 1e300  # a plan's numbers are finite, and charts have room for them


def prepare_out(out: Path, *, force: bool = False) -> Path:
    """Make sure that a bundle can be written to ``out``, without touching what is there.

    Raises
    ------
    UserError
        If ``out`` is a file, holds something and ``force`` is not set, its parent is missing, or it is not writable.
    """
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist; create it or choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    try:
        out.mkdir(exist_ok=True)
        if any(out.iterdir()) and not force:
            raise UserError(f"{out} is not empty; use --force to overwrite a bundle there, or choose another --out")
        # permissions do not tell for certain (root, read-only file systems): try
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return out


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a bundle contains."""
    packages = ("tvm_lowrank", "apache-tvm", "apache-tvm-ffi", "torch", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a manifest with its schema, versions, the processor and the files' hashes, write it, and return it.

    It is written last: a bundle with a manifest is a finished bundle.

    Raises
    ------
    ValueError
        If a key is missing or a number is not finite: a fault of the caller.
    UserError
        If the file cannot be written.
    """
    folders = [level["folder"] for level in manifest.get("levels", ())]
    names = dict.fromkeys([*FILES, *(str(Path(folder, name)) for folder in folders for name in LIBRARIES)])
    hashes = {name: sha256(out / name) for name in names if (out / name).is_file()}
    needs = read(out / "model.so") if "model.so" in hashes else None
    processor = {} if needs is None else {"processor": {"arch": needs.arch, "features": sorted(needs.features)}}
    complete = {"versions": versions(), **manifest, **processor, "schema": SCHEMA, "files": hashes}
    missing = _missing_key(complete)
    if missing:
        raise ValueError(f"the manifest has no {missing}")
    text = json.dumps(complete, indent=2, sort_keys=True, allow_nan=False, default=_plain) + "\n"
    write_text(out / MANIFEST, text)
    return json.loads(text)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises
    ------
    UserError
        If there is no bundle, or it is incomplete, malformed or from a newer version.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"no such bundle: {directory}; give the folder that search wrote with --out")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {MANIFEST}; it is no bundle, or its search has not finished") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; restore it or run the search again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise UserError(f"{path} has no valid 'schema'; restore it or run the search again")
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}; update tvm_lowrank")
    missing = _missing_key(manifest)
    if missing:
        raise UserError(f"{path} has no {missing}; restore it or run the search again")
    shape = manifest["input_shape"]
    if not (isinstance(shape, list) and len(shape) == 4 and all(isinstance(d, int) and d > 0 for d in shape)):
        raise UserError(f"{path} has input_shape {shape!r}, not [N, C, H, W]; restore it or run the search again")
    if not (directory / "model.so").is_file():
        raise UserError(f"{directory} has no model.so; run the search again")
    return manifest


def _missing_key(manifest: Mapping[str, Any]) -> str | None:
    for key, inner in REQUIRED.items():
        if key not in manifest:
            return repr(key)
        if manifest[key] is None and key in ("accuracy", "data"):
            continue  # made without data
        for name in inner:
            if not isinstance(manifest[key], Mapping) or name not in manifest[key]:
                return f"{name!r} in {key!r}"
    sites = manifest["sites"]
    if not isinstance(sites, Sequence) or not all(isinstance(site, Mapping) for site in sites):
        return "list of 'sites'"
    for site in sites:
        for name in SITE_KEYS:
            if name not in site:
                return f"{name!r} in site {site.get('id', '?')!r}"
    levels = manifest.get("levels", [])  # of bundles for several targets
    if not isinstance(levels, list) or not all(isinstance(level, Mapping) for level in levels):
        return "list of 'levels'"
    for number, level in enumerate(levels, 1):
        for name, kind in LEVEL_KEYS.items():
            if not isinstance(level.get(name), kind):
                return f"valid {name!r} in level {number}"
        if level["folder"] in (".", "..") or "/" in level["folder"]:
            return f"valid 'folder' in level {number}: it is a name, not {level['folder']!r}"
    plans = manifest.get("plans", [])  # not in every bundle
    if not isinstance(plans, list) or not all(isinstance(plan, Mapping) for plan in plans):
        return "list of 'plans'"
    for number, plan in enumerate(plans, 1):
        for name, kind in PLAN_KEYS.items():
            value = plan.get(name)
            if not isinstance(value, kind) or (isinstance(value, Real) and not abs(value) < LARGEST):
                return f"valid {name!r} in plan {number}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: object) -> Any:
    """numpy's scalars and paths as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a manifest")
