"""How large the numbers are that convolutions read: some formats end before float32 does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tvm_lowrank.bridge.calibrate import batches
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import Site

if TYPE_CHECKING:
    from tvm_lowrank.data.images import Images

MOST = float(np.finfo(np.float32).max)


@torch.no_grad()
def largest_operands(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[str, float]:
    """The largest absolute value among the weights of each site, and what it reads of the images (float32 NCHW).

    What is no number counts as float32's largest. ``advance`` is called with the number of images done after each
    batch.
    """
    largest = {site.id: float(np.abs(site.weight).max(initial=0.0)) for site in sites}

    def tap(name: str, inputs: Tensor, _outputs: Tensor) -> None:
        if name in largest:
            found = float(inputs.abs().max())
            largest[name] = max(largest[name], found) if found <= MOST else MOST

    for _, chunk in batches(images):
        bridge(chunk, tap=tap)
        advance(len(chunk))
    return largest
