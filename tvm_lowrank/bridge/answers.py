"""What a network's outputs mean: by this its answers are compared, imitated, and sensitive to a change.

`tvm_lowrank.bridge.meaning` finds it out. A damage is a Kullback-Leibler divergence in nats a decision, averaged over
an image's decisions: a class of several for each position along the other axes (*scores*), a yes or no for each number
(*multilabel*), a number known up to the outputs' own spread (*regression*), or a direction (*embedding*, a regression
of the normalised vector). What is put together of several kinds is a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank.bridge.own import Own
from tvm_lowrank.tensors import Tensors

SCORES, MULTILABEL, REGRESSION, EMBEDDING = KINDS = ("scores", "multilabel", "regression", "embedding")
LEAST = 1e-30  # of a probability, before its logarithm is taken
SURE = 1e-7  # how far a sigmoid stays from 0 and 1, where single precision ends


class Meaning(Protocol):
    """What the outputs of a network mean, joined to one tensor where there are several (`tvm_lowrank.tensors`)."""

    @property
    def unknown(self) -> Any:
        """Tensors that say nothing: a number, or one for each of the joined numbers."""

    def divergences(self, wanted: Tensor, got: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Nats of each image (n,) by which outputs differ from those that are wanted.

        Scores and labels are divided by the temperature first, and the result is multiplied by its square (Hinton et
        al. 2015).
        """

    def draw(self, outputs: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """A loss whose gradients have the outputs' Fisher information as their covariance, summed over the images.

        The answers are drawn from the network's own probabilities at a temperature: no labels are used. The second
        number is by how much this is less, or more, information than at temperature 1, as two traces (2,).
        """

    def measured(self, outputs: Tensor) -> Meaning:
        """The same with the spread of some outputs, where errors are counted in it."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Answers:
    """What an output (n, …) means.

    Attributes
    ----------
    kind
        One of `KINDS`.
    axis
        Of scores: that of the classes.
    probabilities
        Whether a softmax, or for multilabel a sigmoid, was already applied.
    spread
        The variance of regressions and embeddings over images, in which their errors are counted.
    """

    kind: str = SCORES
    axis: int = 1
    probabilities: bool = False
    spread: float = 1.0

    def __str__(self) -> str:
        if self.kind == SCORES:
            return f"class {'probabilities' if self.probabilities else 'scores'} over axis {self.axis}"
        names = {MULTILABEL: "independent labels", REGRESSION: "numbers", EMBEDDING: "embeddings"}
        return names[self.kind] + (", as probabilities" if self.probabilities else "")

    @property
    def unknown(self) -> float:
        """An output that says nothing."""
        return 0.5 if self.kind == MULTILABEL and self.probabilities else 0.0

    def logits(self, outputs: Tensor) -> Tensor:
        """Tensors (n, …) as (n, decisions, classes) of scores, else (n, decisions)."""
        if self.kind == SCORES:
            values = outputs.log_softmax(self.axis) if not self.probabilities else outputs.clamp_min(LEAST).log()
            return values.movedim(self.axis, -1).flatten(1, -2) if outputs.dim() > 2 else values[:, None]
        values = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
        if self.kind == MULTILABEL and self.probabilities:
            return values.clamp(SURE, 1 - SURE).logit()
        return F.normalize(values, dim=1) if self.kind == EMBEDDING else values

    def divergences(self, wanted: Tensor, got: Tensor, *, temperature: float = 1.0) -> Tensor:
        """See `Meaning`."""
        a, b = self.logits(wanted), self.logits(got)
        if self.kind in (REGRESSION, EMBEDDING):
            return (a - b).square().mean(dim=1) / (2 * self.spread)
        a, b = a / temperature, b / temperature
        if self.kind == SCORES:
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            nats = (p.exp() * (p - q)).sum(dim=-1)
        else:
            p = a.sigmoid()
            nats = p * (F.logsigmoid(a) - F.logsigmoid(b)) + (1 - p) * (F.logsigmoid(-a) - F.logsigmoid(-b))
        return temperature**2 * nats.mean(dim=1)

    def draw(self, outputs: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Meaning`."""
        values = self.logits(outputs.float())
        count = math.sqrt(values.shape[1])
        if self.kind in (REGRESSION, EMBEDDING):
            noise = torch.randn(values.shape, generator=generator)
            return (values * noise).sum() / (count * math.sqrt(self.spread)), torch.ones(2, dtype=torch.float64)
        flat = values.detach().float()
        if self.kind == SCORES:
            p, own = ((flat / t).softmax(-1).flatten(0, 1) for t in (temperature, 1.0))
            classes = torch.multinomial(p, 1, generator=generator)[:, 0]
            loss = F.cross_entropy(values.flatten(0, 1) / temperature, classes, reduction="sum")
            traces = torch.stack([(1 - q.double().square().sum(dim=-1)).sum() for q in (own, p)])
        else:
            p, own = ((flat / t).sigmoid() for t in (temperature, 1.0))
            labels = torch.bernoulli(p, generator=generator)
            loss = F.binary_cross_entropy_with_logits(values / temperature, labels.to(values.dtype), reduction="sum")
            traces = torch.stack([(q * (1 - q)).double().sum() for q in (own, p)])
        return temperature * loss / count, traces

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def measured(self, outputs: Tensor) -> Answers:
        """See `Meaning`."""
        if self.kind not in (REGRESSION, EMBEDDING):
            return self
        values = self.logits(outputs.double())
        return replace(self, spread=max(float((values - values.mean(dim=0)).square().mean()), LEAST))


@dataclass(frozen=True)
class Part:
    """A part of a network's outputs: output number ``output``, ``count`` of its entries on ``axis`` from ``start`` on.

    A ``count`` of 0 is all of it.
    """

    answers: Answers
    output: int = 0
    axis: int = 1
    start: int = 0
    count: int = 0

    def of(self, outputs: Sequence[Tensor]) -> Tensor:
        """Its numbers, of all outputs."""
        own = outputs[self.output]
        return own.narrow(self.axis, self.start, self.count) if self.count else own

    def looked_at(self, own: Tensor) -> Answers:
        """The answers measured; with probabilities if the graph's end does not tell, and all numbers look like them."""
        answers = self.answers.measured(own)
        if not self.count or answers.kind not in (SCORES, MULTILABEL):
            return answers
        sums = own.sum(dim=answers.axis) if answers.kind == SCORES else own.new_ones(1)
        certain = bool(((own >= 0) & (own <= 1)).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
        return replace(answers, probabilities=answers.probabilities or certain)

    def __str__(self) -> str:
        end = self.start + self.count - 1
        place = f" in {self.start} to {end} of axis {self.axis}" if self.count else ""
        return f"{self.answers}{place}"


@dataclass(frozen=True)
class Mixture:
    """What several outputs mean, or several parts of one: a detector's boxes and classes. Each counts alike.

    Attributes
    ----------
    shapes
        Those of the outputs, without the batch (`tvm_lowrank.tensors.Tensors`).
    """

    shapes: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        named = [f"output {part.output}: {part}" if len(self.shapes) > 1 else str(part) for part in self.parts]
        return "; ".join(named)

    @property
    def unknown(self) -> np.ndarray:
        """See `Meaning`."""
        joined = Tensors(self.shapes).joined([torch.zeros(1, *shape) for shape in self.shapes])
        for part, own in zip(self.parts, self._parts(joined), strict=True):
            own.fill_(part.answers.unknown)
        return joined[0].numpy()

    def divergences(self, wanted: Tensor, got: Tensor, *, temperature: float = 1.0) -> Tensor:
        """See `Meaning`: the mean over the parts."""
        pairs = zip(self.parts, self._parts(wanted), self._parts(got), strict=True)
        nats = [part.answers.divergences(a, b, temperature=temperature) for part, a, b in pairs]
        return torch.stack(nats).mean(dim=0)

    def draw(self, outputs: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Meaning`."""
        pairs = zip(self.parts, self._parts(outputs), strict=True)
        drawn = [part.answers.draw(own, generator, temperature=temperature) for part, own in pairs]
        losses, traces = zip(*drawn, strict=True)
        return torch.stack(losses).sum() / math.sqrt(len(self.parts)), torch.stack(traces).mean(dim=0)

    def measured(self, outputs: Tensor) -> Mixture:
        """See `Meaning`; parts of an output that are said to be scores or labels are looked at for probabilities."""
        pairs = zip(self.parts, self._parts(outputs), strict=True)
        return replace(self, parts=tuple(replace(part, answers=part.looked_at(own)) for part, own in pairs))

    def _parts(self, joined: Tensor) -> list[Tensor]:
        outputs = Tensors(self.shapes).parted(joined)
        return [part.of(outputs) for part in self.parts]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(entry: Mapping[str, Any]) -> Meaning:
    """The inverse of ``to_json``."""
    if "reference" in entry:
        return Own(entry["reference"], tuple(map(tuple, entry["shapes"])))
    if "parts" not in entry:
        return Answers(**entry)
    parts = [Part(**{**part, "answers": Answers(**part["answers"])}) for part in entry["parts"]]
    return Mixture(tuple(map(tuple, entry["shapes"])), tuple(parts))
