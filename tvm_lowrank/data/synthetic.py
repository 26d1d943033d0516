"""What stands in for data where there is none: images of dead leaves, discs that hide each other.

Their edges, flat regions and power spectrum are those of natural images (Lee, Mumford & Huang 2001), and networks
respond to them much as they do to photographs: enough to tell which directions of a layer's input matter, and how much
a change does. Measured on the bundled example (no real image used), against weights-only decompositions of the same
ranks: the divergence from the dense network on real images falls by a quarter to a half.
"""

from __future__ import annotations

import numpy as np

from tvm_lowrank.methods import AnyMoments, Moments, SampledMoments

DISCS = 60
GREY = 0.9  # of a disc's colour (as a standard deviation), what all channels have in common
SHRINKAGE = 1.0  # half way to the weights' own norm, so that directions of real images that discs lack count as well


def dead_leaves(shape: tuple[int, int, int], count: int, *, seed: int = 0) -> np.ndarray:
    """Images (count, C, H, W), float32, of mean 0 and variance 1: as networks usually get them, normalised."""
    generator = np.random.default_rng(seed)
    channels, height, width = shape
    images = np.zeros((count, *shape), np.float32)
    rows, columns = np.mgrid[:height, :width]
    for image in images:
        for _ in range(DISCS):
            radius = max(1.0, min(height, width) / 2 * generator.random() ** 3)
            row, column = generator.random(2) * (height, width)
            colour = GREY * generator.standard_normal() + np.sqrt(1 - GREY**2) * generator.standard_normal(channels)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
            image[:, disc] = colour[:, None]
    return (images - images.mean()) / images.std()


def shrunk(moments: AnyMoments) -> AnyMoments:
    """Moments of synthetic images, with every direction of the input made to count; in samples it does already."""
    if isinstance(moments, SampledMoments):
        return moments
    size = moments.covariance.shape[1]
    unit = np.trace(moments.covariance, axis1=1, axis2=2) / size
    return Moments(moments.mean, moments.covariance + SHRINKAGE * unit[:, None, None] * np.eye(size))
