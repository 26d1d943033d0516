"""A divergence of the user's own: how far a network's outputs are from others, in nats an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tvm_lowrank.errors import UserError
from tvm_lowrank.reference import load_object, summary
from tvm_lowrank.tensors import Shape, Tensors

DRAWS = 4  # random directions in which the curvature is looked at
ZERO = 1e-6  # nats, or of the largest divergence, up to which outputs do not differ


@dataclass(frozen=True)
class Own:
    """What outputs mean by a function of the user's: ``function(dense, changed)`` returns nats of each image, (n,).

    Both are tensors (n, …), or tuples of them where the network has several outputs. The function is written in
    PyTorch, is 0 where both are the same and else positive, and can be differentiated twice in what is changed. It is
    taken to be curved alike whatever other outputs do: its second derivatives between different outputs are not used.

    Attributes
    ----------
    reference
        ``file.py:function``.
    shapes
        Those of the outputs (`tvm_lowrank.tensors.Tensors`).
    """

    reference: str
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return f"what {self.reference} compares"

    @property
    def unknown(self) -> float:
        """See `tvm_lowrank.bridge.answers.Meaning`."""
        return 0.0

    @cached_property
    def _function(self) -> Callable[[Any, Any], Tensor]:
        found = load_object(self.reference)
        if not callable(found):
            raise UserError(f"--output {self.reference} is not a function; it must take (dense, changed)")
        return found

    def divergences(self, wanted: Tensor, got: Tensor, *, temperature: float = 1.0) -> Tensor:
        """See `tvm_lowrank.bridge.answers.Meaning`; there is no temperature in it.

        Raises
        ------
        UserError
            If the function fails, or returns anything but a number for each image.
        """
        outputs = Tensors(self.shapes)
        try:
            nats = self._function(outputs.given(wanted), outputs.given(got))
        except Exception as error:
            raise UserError(f"--output {self.reference} failed: {summary(error)}; it takes (dense, changed)") from error
        if not isinstance(nats, Tensor) or nats.shape != (len(wanted),):
            what = tuple(nats.shape) if isinstance(nats, Tensor) else type(nats).__name__
            raise UserError(f"--output {self.reference} returned {what}, not a tensor of nats of each image, (n,)")
        return nats

    def draw(self, outputs: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `tvm_lowrank.bridge.answers.Meaning`: the information is the diagonal of the divergence's Hessian.

        It is estimated from products with random signs (Bekas, Kokiopoulou and Saad 2007).
        """
        curvature = self._curvature(outputs.detach().float(), generator)
        noise = torch.randn(outputs.shape, generator=generator)
        return (outputs.float() * (curvature.clamp_min(0).sqrt() * noise)).sum(), torch.ones(2, dtype=torch.float64)

    def _curvature(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        with torch.enable_grad():
            changed = outputs.clone().requires_grad_(True)
            nats = self.divergences(outputs, changed).sum()
            if not nats.requires_grad:
                raise UserError(f"--output {self.reference} has no gradient; write it in PyTorch")
            [slope] = torch.autograd.grad(nats, changed, create_graph=True)
            total = torch.zeros_like(outputs)
            for _ in range(DRAWS if slope.requires_grad else 0):
                signs = torch.randint(0, 2, outputs.shape, generator=generator).float() * 2 - 1
                [product] = torch.autograd.grad((slope * signs).sum(), changed, retain_graph=True)
                total += signs * product
        return total / DRAWS

    def measured(self, outputs: Tensor) -> Own:
        """The same, looked at: what it says of outputs and of others.

        Raises
        ------
        UserError
            If it is no divergence.
        """
        outputs = outputs.float()
        same = self.divergences(outputs, outputs)
        other = self.divergences(outputs, outputs.flip(0) + 0.1 * outputs.std() * torch.sign(outputs))
        if not bool(torch.isfinite(same).all() and torch.isfinite(other).all()):
            raise UserError(f"--output {self.reference} returns no finite numbers")
        if float(same.abs().max()) > ZERO * max(1.0, float(other.abs().max())) or float(other.mean()) <= 0:
            raise UserError(f"--output {self.reference} is not 0 for equal outputs and positive for others")
        if not float(self._curvature(outputs, torch.Generator().manual_seed(0)).abs().max()):
            raise UserError(
                f"--output {self.reference} has no second derivative; e.g. squares have, absolute values not"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        return {"reference": self.reference, "shapes": self.shapes}
