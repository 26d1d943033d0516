"""Which of the calibration images are looked at, where all of them would say no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_lowrank.data.images import Images, part
from tvm_lowrank.graph import Site

MACS, FEWEST = 1.5e12, 256  # of a pass over the images that gradients and the refit look at


def evenly(images: Images, count: int) -> Images:
    """So many of the images, evenly spaced, for they may be sorted; all of them if they are no more."""
    if count >= len(images):
        return images
    return part(images, _numbers(images, count))


def apart(images: Images, count: int) -> tuple[Images, Images]:
    """So many of the images, evenly spaced, and the others; of a single image both are this one."""
    taken = _numbers(images, count)
    rest = np.setdiff1d(np.arange(len(images)), taken)
    return part(images, taken), part(images, rest) if len(rest) else images


def sampled(images: Images, sites: Sequence[Site]) -> Images:
    """The images that gradients and the refit look at: fewer of them for large networks."""
    macs = sum(site.macs for site in sites)
    return evenly(images, max(FEWEST, int(MACS / max(1, macs))))


def _numbers(images: Images, count: int) -> np.ndarray:
    """Of so many images, evenly spaced: (count,)."""
    return np.linspace(0, len(images) - 1, count).round().astype(int)
