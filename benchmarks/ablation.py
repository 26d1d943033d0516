"""What each part of the search is worth: the same search, of the bundled example or another network, without it.

    python benchmarks/ablation.py [--only macs,spatial] [--budget 1%] [--out ablation]
                                  [--model net.py:build --input-shape 1,3,32,32 --data images/]

full            everything, as `tvm_lowrank search`
macs            sites are allocated by their MACs; milliseconds are only measured in the end
no_whitening    weights are decomposed in their own norm, and all errors count alike; the last factor is still fitted
refit           chains are fitted one after another, through what follows them, before the reconstruction
no_reconstruct  chains in the data's norm as they come
<method>        one method only, for each of the default ones

All share one cache of kernels, and factorisations that they have in common are solved once, so the later ones are
quicker. Prints a row as soon as it is known: median of the compiled library against the tuned dense one (interleaved),
drop on the evaluation split, looks at it, and plans that were evaluated on the selection split.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank.methods import Chain, Factors, Moments, decompose, factorise
from tvm_lowrank.methods.moments import white
from tvm_lowrank.options import DEFAULT_METHODS, SearchOptions
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.quantities import budget, input_shape
from tvm_lowrank.searching.candidates import site_macs
from tvm_lowrank.searching.choose import search, sensitivity
from tvm_lowrank.searching.choose.networks import Networks
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.commands import run
from tvm_lowrank.searching.journal import JOURNAL
from tvm_lowrank.searching.latency.times import SiteTimes

METHODS = tuple(name for name in DEFAULT_METHODS if name != "svd")


class MacTimes(SiteTimes):
    """Every site's milliseconds are its share of the dense network's, by MACs, until the library is built."""

    def estimates(self, wanted: Any) -> dict[tuple[str, Choice], float]:
        return {(name, choice): self._by_macs(name, choice) for name, own in wanted.items() for choice in own}

    def measured(self, site: str, choice: Choice) -> float | None:
        return self._by_macs(site, choice)

    def _by_macs(self, name: str, choice: Choice) -> float:
        return site_macs(self._sites[name], choice) * 1e-8


class Unwhitened(Sensitivity):
    """Without the statistics of the data and of the loss."""

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return {name: found.white() for name, found in Sensitivity.moments.func(self).items()}  # type: ignore[attr-defined]

    @cached_property
    def fisher(self) -> dict[str, np.ndarray]:
        found = Sensitivity.fisher.func(self)  # type: ignore[attr-defined]
        return {name: white(matrix[None])[0] for name, matrix in found.items()}


def of_weights(weight: np.ndarray, spec: Any, *, method: str, rank: Any, **_: Any) -> Chain:
    return decompose(weight, spec, method=method, rank=rank)


class Refitted(Networks):
    """Chains fitted one after another to what the dense network does."""

    def decomposed(self, plan: Plan) -> IRModule:
        return self._fitted.once(plan, "decomposed", lambda: self._refit(self.mod, plan))


class Unreconstructed(Networks):
    """Chains as they are decomposed are the result."""

    def reconstructed(self, plan: Plan) -> IRModule:
        return self.decomposed(plan)


def remembered() -> Callable[..., Factors]:
    """`factorise`, but what it was asked for before is not solved again."""
    known: dict[tuple[Any, ...], Factors] = {}

    def once(weight: np.ndarray, spec: Any, *, method: str, moments: Moments, fisher: np.ndarray) -> Factors:
        arrays = weight, moments.mean, moments.covariance, fisher
        key = method, spec, *(hashlib.sha256(np.ascontiguousarray(array)).digest() for array in arrays)
        if key not in known:
            known[key] = factorise(weight, spec, method=method, moments=moments, fisher=fisher)
        return known[key]

    return once


def patches(variant: str) -> list[Any]:
    """What is exchanged for a variant."""
    if variant == "macs":
        return [patch.object(run, "SiteTimes", MacTimes)]
    if variant == "no_whitening":
        return [
            patch.object(search, "Sensitivity", Unwhitened),
            patch("tvm_lowrank.searching.fit.refit.decompose", of_weights),
        ]
    if variant == "refit":
        return [patch.object(search, "Networks", Refitted)]
    if variant == "no_reconstruct":
        return [patch.object(search, "Networks", Unreconstructed)]
    return []


def main() -> None:
    variants = ("full", "macs", "no_whitening", "refit", "no_reconstruct", *METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(variants))
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    parser.add_argument("--model")
    parser.add_argument("--input-shape", type=input_shape)
    parser.add_argument("--data")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(variants)
    if unknown:
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; known are {', '.join(variants)}")
    args.out.mkdir(exist_ok=True)
    print(f"{'variant':15s} {'speed-up':>9s} {'MACs':>6s} {'drop':>6s} {'looks':>6s} {'plans':>6s} {'seconds':>8s}")
    once = remembered()
    for variant in args.only.split(","):
        methods = (variant, "svd") if variant in METHODS else DEFAULT_METHODS
        asked = SearchOptions(
            out=args.out / variant,
            model=args.model,
            input_shape=args.input_shape,
            data=args.data,
            budget=budget(args.budget).within("points", "top1"),
            methods=methods,
            cache=args.out / "cache",
            force=True,
        )
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(patch.object(sensitivity, "factorise", once))
            for change in patches(variant):
                stack.enter_context(change)
            manifest = run.search(asked)
        spent = time.perf_counter() - start
        journal = (asked.folder / JOURNAL).read_text()
        macs, dense = (sum(site[key] for site in manifest["sites"]) for key in ("macs", "dense_macs"))
        accuracy = manifest["accuracy"]
        print(
            f"{variant:15s} {manifest['speedup']:9.2f} {macs / dense:6.3f} {accuracy['drop']:6.2f} "
            f"{accuracy['looks']:6d} {journal.count('evaluation'):6d} {spent:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
