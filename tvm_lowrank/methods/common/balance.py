"""The scale between the convolutions of a chain, which its kernel leaves open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_lowrank.methods.chain import ConvSpec


def balance(specs: Sequence[ConvSpec], weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Scale the channels between the convolutions of a chain until what makes and what reads each has one norm.

    The kernel stays; training the factors then sees gradients of one size. Weights are OIHW.
    """
    scaled = [np.array(weight, dtype=np.float64) for weight in weights]
    for _ in range(8):  # each pass unsettles the next channels a little; the norms settle geometrically
        for i, spec in enumerate(specs[1:]):
            readers = scaled[i + 1].reshape(spec.groups, spec.out_channels // spec.groups, *spec.weight_shape[1:])
            made = np.linalg.norm(scaled[i].reshape(len(scaled[i]), -1), axis=1)
            read = np.linalg.norm(readers.transpose(0, 2, 1, 3, 4).reshape(len(made), -1), axis=1)
            # a channel that nothing reads gets norm 1
            target = np.sqrt(np.where(read > 0, read * made, 1))
            scale = np.divide(target, made, out=np.ones_like(made), where=made > 0)
            scaled[i] *= scale[:, None, None, None]
            readers /= scale.reshape(spec.groups, 1, -1, 1, 1)
    return tuple(scaled)
