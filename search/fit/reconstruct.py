"""Reconstruction: all factors and biases of a compressed network learn together to do what the dense one does.

The refit (`tvm_lowrank.searching.fit.refit`) is exact, but sees one site at a time. Here the loss is that of the whole
network: the divergence of the answers, and at every site the squared error of its input, relative to the dense
network's. It is the joint form of the block reconstruction of Li et al. 2021 (BRECQ); a term for every site keeps a
thousand images from being learned by heart, as ten numbers an image would be. Mirrored and shifted images are as good
as new ones, for the dense network answers for any image. No labels are used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import predict, trained_at_once
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.graph import find_sites
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.searching.fit.muon import Muon
from tvm_lowrank.searching.fit.samples import evenly
from tvm_lowrank.searching.fit.training import Learner, imitation, parameter_groups, ramp, watched

PASSES = 12  # over the images
AN_IMAGE = 4 * PASSES  # in all passes, as forward ones: forward, backward, and the dense network's
MOST_WORK = 4e13  # multiply-accumulates of a reconstruction, a few minutes; larger networks get none
ENOUGH = 1000  # images
BATCH = 50
RATE = 0.006  # of Muon in so many passes; fewer of them would not calm down from such large steps
WARM_UP = 0.1
SHIFT = 1 / 8  # of an image's size


def reconstruct(
    dense: IRModule,
    network: IRModule,
    images: Images,
    *,
    passes: int = PASSES,
    limit: float = math.inf,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[float], object] = lambda images: None,
) -> IRModule:
    """A compressed network with other parameters, which imitate the dense network better on calibration images.

    Parameters
    ----------
    dense, network : canonical modules; `network` is `dense` with chains in place of sites.
    images : float32 NCHW.
    limit : seconds, for which the passes are shortened if they would take longer.
    check : called before each batch; what it raises ends the reconstruction.
    advance : called with the number of images done after each batch.
    """
    teacher, student = Learner(dense), Learner(network, learns=True)
    generator = torch.Generator().manual_seed(seed)
    at_once = trained_at_once(student.bridge)

    def learn(batch: Tensor) -> bool:
        """Add the gradients of a batch; False if its loss is not finite."""
        for part in batch.split(at_once):
            with torch.no_grad():
                wanted = watched(teacher, part)
            loss = imitation(wanted, watched(student, part), teacher.bridge.answers) * (len(part) / len(batch))
            if not math.isfinite(loss.item()):
                return False
            loss.backward()
        return True

    a_pass = math.ceil(len(images) / BATCH)
    steps = passes * a_pass
    if math.isfinite(limit):
        start = time.monotonic()
        learn(torch.from_numpy(images[:BATCH]))
        steps = min(steps, max(1, int(limit / (time.monotonic() - start)) - 1))
    rate = RATE * math.sqrt(steps / (PASSES * a_pass))
    optimiser = Muon(parameter_groups(student.bridge), lr=rate)
    for done, picked in zip(range(steps), _batches(len(images), generator), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * ramp((done + 0.5) / steps, WARM_UP)
        check()
        optimiser.zero_grad()
        if not learn(varied(torch.from_numpy(images[picked.numpy()]), generator)):
            return network
        optimiser.step()
        advance(len(images) * passes / steps)
    return student.network()


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The numbers of so many images in ever new orders, batch by batch."""
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


def reconstruct_if_better(
    dense: IRModule,
    network: IRModule,
    images: Images,
    others: Images,
    *,
    limit: float = math.inf,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> IRModule:
    """The reconstruction of a network, or the network itself: which is nearer to the dense one on other images.

    The arguments are those of `reconstruct`; of more images than take `MOST_WORK` some are left out.
    """
    images = evenly(images, _most(dense))
    with console.progress("reconstructing", PASSES * len(images)) as advance:
        found = reconstruct(dense, network, images, limit=limit, seed=seed, check=check, advance=advance)
    bridge = TorchBridge(dense)
    wanted = predict(bridge, others)
    return min(network, found, key=lambda mod: divergence(bridge.answers, wanted, predict(TorchBridge(mod), others)))


def affordable(mod: IRModule, images: int) -> bool:
    """Whether the reconstruction of a network on so many images, or on `ENOUGH` of them, is no more than `MOST_WORK`.

    In fewer passes it is worth nothing: three took a ResNet-50 from 0.028 nats to 0.046.
    """
    return _work(mod) * min(images, ENOUGH) <= MOST_WORK


def forward_passes(mod: IRModule, images: int) -> int:
    """As many of single images take about as long as a reconstruction on so many; 0 where it is not `affordable`."""
    return AN_IMAGE * min(images, _most(mod)) if affordable(mod, images) else 0


def _most(mod: IRModule) -> int:
    """How many images a reconstruction looks at."""
    return max(ENOUGH, int(MOST_WORK / _work(mod)))


def _work(mod: IRModule) -> int:
    """Multiply-accumulates for one image, in all passes."""
    return AN_IMAGE * sum(site.macs for site in find_sites(mod))


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images (n, C, H, W), half of them mirrored, shifted by up to `SHIFT` of their size; borders are reflected."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    down, across = int(height * SHIFT), int(width * SHIFT)
    padded = F.pad(images, (across, across, down, down), mode="reflect").permute(0, 2, 3, 1)
    rows = torch.randint(0, 2 * down + 1, (count, 1), generator=generator) + torch.arange(height)
    cols = torch.randint(0, 2 * across + 1, (count, 1), generator=generator) + torch.arange(width)
    return padded[torch.arange(count).view(-1, 1, 1), rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
