"""Muon (Jordan et al. 2024) with steps relative to the weights: the optimiser of compressed networks.

A few directions dominate the gradient of a convolution, and Adam moves along these alone. Muon takes the
semi-orthogonal matrix nearest to the momentum, which moves in all directions equally far. Its steps are relative to the
norm of what they change (You et al. 2017, LARS), so one rate fits factors of any size. What has one row, such as biases
and the kernels of depthwise convolutions, moves as with Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, SECOND_MOMENT = 0.9, 0.99
LEAST = 0.01  # root mean square that the smallest parameters are taken to have: biases may be 0
# five steps of Jordan's quintic bring singular values of 0.003 to 1 to between 0.7 and 1.2
STEPS, QUINTIC = 5, (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Moves weights OIHW, which are matrices with O rows, and biases, which are a row.

    Parameters
    ----------
    groups : dicts of ``params``; of ``blocks``, the groups of their convolutions (so many matrices each weight is, one
        above the other); and of ``share``, their part of the rate.
    lr : norm of a step, as a part of the parameter's own.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "share": 1.0, "blocks": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is None:
                    continue
                way = self._way(values, values.grad, group["blocks"])
                size = values.norm().clamp_min(LEAST * values.numel() ** 0.5)
                values.sub_(way * (group["lr"] * group["share"] * size))

    def _way(self, values: Tensor, gradient: Tensor, blocks: int) -> Tensor:
        """Where to go: of norm 1, or less where the gradients of a row do not agree."""
        state = self.state[values]
        momentum = state["momentum"] = state.get("momentum", gradient).lerp(gradient, 1 - MOMENTUM)
        if len(values) == blocks:
            now = gradient.square()
            square = state["square"] = state.get("square", now).lerp(now, 1 - SECOND_MOMENT)
            return momentum / (values.numel() * square).sqrt().clamp_min(1e-30)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        way = orthogonal(ahead.reshape(blocks, len(values) // blocks, -1)).reshape(values.shape)
        return way / way.norm().clamp_min(1e-30)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the semi-orthogonal matrix nearest to each (n, rows, columns), by Newton and Schulz's iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT
