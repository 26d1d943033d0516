"""How long a search will take: what each phase is expected to need, less what it has taken.

What is known from the start is the network, the numbers of images and how long one image takes. The rest are rules of
thumb; `docs/search.md` has what searches were expected to take, and what they took.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_lowrank.bridge.calibrate import batch_of, predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.graph import Site

# the phases, in their order, as they are named in what a search has taken
DAMAGE, KERNELS = "predicting damage", "tuning kernels"
PLANS, DELIVERY = "fitting and evaluating plans", "building, verifying and measuring"

STATISTICS, GRADIENTS, PROBE, REFITTED = 2.2, 3.0, 0.7, 9.0  # of an image, in the time of a forward pass
PROBES = 4  # of a site
# of a weight, in the time of multiply-accumulates: its factorisations, with solves for kernels of more than one element
SOLVED, CUT, ONCE_MORE = 1.2e6, 2e5, 0.25
DECOMPOSED, RECOVERED = 3, 1.5  # plans
KERNEL, LIBRARIES = 2.7, 30.0  # seconds: for a site; to build both libraries and measure them
COMPILED = 3.0  # both compiled libraries on one core, in the time of a forward pass


@dataclass(frozen=True)
class Counts:
    """Images that the phases look at; ``reconstructed`` is 0 where plans are refitted."""

    calibration: int
    sampled: int
    probed: int
    selection: int
    evaluation: int
    reconstructed: int


def seconds_of_an_image(bridge: TorchBridge, images: Images) -> float:
    """How long the network takes for one of the images, in a batch as `predict` makes them."""
    few = images[: batch_of(images)]
    predict(bridge, few)
    start = time.perf_counter()
    predict(bridge, few)
    return (time.perf_counter() - start) / len(few)


def needs(sites: Sequence[Site], counts: Counts, image: float) -> dict[str, float]:
    """Seconds that each phase of a search is expected to need; ``image`` are those of an image."""
    weights = sum((SOLVED if max(site.spec.kernel) > 1 else CUT) * site.weight.size for site in sites)
    factorising = image * weights / max(1, sum(site.macs for site in sites))
    passes = STATISTICS * counts.calibration + GRADIENTS * counts.sampled + PROBE * PROBES * len(sites) * counts.probed
    recovery = counts.reconstructed or REFITTED * counts.sampled
    return {
        DAMAGE: image * passes + factorising,
        KERNELS: KERNEL * len(sites),
        PLANS: DECOMPOSED * (ONCE_MORE * factorising + image * counts.selection) + RECOVERED * image * recovery,
        DELIVERY: delivery(image, counts.evaluation),
    }


def delivery(image: float, evaluation: int) -> float:
    """Seconds to build both libraries and judge them on so many images."""
    return LIBRARIES + COMPILED * image * evaluation


def left(needed: Mapping[str, float], taken: Mapping[str, float]) -> float:
    """Seconds that are left; phases before the last one that was begun, but for tuning, are over."""
    order = list(needed)
    begun = max((order.index(phase) for phase in taken if phase in needed), default=0)
    open_phases = {phase for i, phase in enumerate(order) if i >= begun or (phase == KERNELS and begun == 2)}
    return sum(max(0.0, seconds - taken.get(phase, 0.0)) for phase, seconds in needed.items() if phase in open_phases)
