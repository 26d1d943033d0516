"""Every method on the bundled example at the same share of the MACs in every layer: selection top-1 of each form.

    python benchmarks/methods.py [--methods spatial,btd] [--ratios 0.5,0.25]

Each convolution (but the first) gets the method's dearest rank within the share. Forms: the weights-only decomposition;
the same with its last factor refit to the data; the decomposition in the data's norm (with that refit); that weighted
by the Fisher information of the outputs; the asymmetric nonlinear refit in network order on top. The bias is corrected
in all but the first. Nothing is trained; the images that decide are the selection split. Seconds are processor time of
one decomposition in the data's norm. Prints a row as soon as it is known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from tvm_lowrank import example
from tvm_lowrank.bridge.calibrate import collect_fisher, collect_moments, predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.splits import load_data
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.methods import METHODS, Chain, Conv, Moments, Rank, chain_macs, compose, decompose, grouped
from tvm_lowrank.methods.common.refit import refit_last
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.candidates import skipped
from tvm_lowrank.searching.fit.refit import refit
from tvm_lowrank.searching.fit.targets import dense_outputs
from tvm_lowrank.transform import replace_sites

LANES = 4  # a finer grid than any target's, so that the shares are met closely


def dearest(site: Site, method: str, share: float) -> Rank | None:
    """The rank with the most MACs within a share of the site's, or None."""
    recipe = METHODS[method]
    macs = {rank: chain_macs(recipe.chain_specs(site.spec, rank), site.size) for rank in recipe.ranks(site.spec, LANES)}
    affordable = {rank: cost for rank, cost in macs.items() if cost <= share * site.macs}
    return max(affordable, key=lambda rank: affordable[rank]) if affordable else None


def refitted(site: Site, chain: Chain, moments: Moments) -> Chain:
    """A weights-only chain with its last factor and the bias fitted to the data."""
    weights = refit_last(site.weight, site.spec, chain.specs, [conv.weight for conv in chain.convs], moments)
    missing = grouped(site.weight - compose(chain.specs, weights, site.spec.groups), site.spec)
    bias = np.einsum("gnd,gd->gn", missing, moments.mean).reshape(-1).astype("float32")
    convs = [Conv(spec, array.astype("float32")) for spec, array in zip(chain.specs, weights, strict=True)]
    return Chain(tuple(convs), bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(name for name in METHODS if name != "svd"))
    parser.add_argument("--ratios", default="0.5,0.25")
    args = parser.parse_args()

    mod = import_model(example.model(), input_shape=example.INPUT_SHAPE)
    splits = load_data(None, input_shape=example.INPUT_SHAPE[1:])
    images, labels = splits.selection
    sites = [site for site in find_sites(mod) if not skipped(site) and max(site.spec.kernel) > 1]
    bridge = TorchBridge(mod)
    moments = collect_moments(bridge, sites, splits.calibration)
    fisher = collect_fisher(bridge, sites, splits.calibration)
    targets = dense_outputs(bridge, sites, splits.calibration)

    def top1(chains: dict[str, Chain]) -> float:
        logits = predict(TorchBridge(replace_sites(mod, chains)), images)
        return 100 * float(np.mean(logits.argmax(1) == labels))

    print(f"dense: {top1({}):.1f} % of {len(labels)} images; {len(sites)} layers are decomposed")
    print(
        "| method | MACs | weights only | + refit | data's norm | + Fisher | asymmetric nonlinear | seconds a layer |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for ratio in map(float, args.ratios.split(",")):
        for method in args.methods.split(","):
            ranks = {site.id: rank for site in sites if (rank := dearest(site, method, ratio)) is not None}
            chosen = [site for site in sites if site.id in ranks]
            if not chosen:
                print(f"| {method} | no rank within {ratio} | | | | | | |", flush=True)
                continue
            plain = {s.id: decompose(s.weight, s.spec, method=method, rank=ranks[s.id]) for s in chosen}
            start = time.process_time()
            normed = {
                s.id: decompose(s.weight, s.spec, method=method, rank=ranks[s.id], moments=moments[s.id])
                for s in chosen
            }
            spent = (time.process_time() - start) / len(chosen)
            weighted = {
                s.id: decompose(
                    s.weight, s.spec, method=method, rank=ranks[s.id], moments=moments[s.id], fisher=fisher[s.id]
                )
                for s in chosen
            }
            macs = sum(chain_macs(chain.specs, s.size) for s in sites if (chain := plain.get(s.id)))
            macs += sum(s.macs for s in sites if s.id not in plain)
            plan = {name: Choice(method, rank) for name, rank in ranks.items()}
            forms: list[Callable[[], dict[str, Chain]]] = [
                lambda plain=plain: plain,  # type: ignore[misc]
                lambda plain=plain, chosen=chosen: {s.id: refitted(s, plain[s.id], moments[s.id]) for s in chosen},  # type: ignore[misc]
                lambda normed=normed: normed,  # type: ignore[misc]
                lambda weighted=weighted: weighted,  # type: ignore[misc]
                lambda plan=plan: refit(mod, sites, plan, splits.calibration, targets, fisher=fisher),  # type: ignore[misc]
            ]
            cells = [f"{top1(form()):.1f}" for form in forms]
            share = macs / sum(s.macs for s in sites)
            print(f"| {method} | {share:.2f} | {' | '.join(cells)} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
