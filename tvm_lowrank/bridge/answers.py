"""What a network's outputs mean: by this its answers are compared, imitated, and sensitive to a change.

A damage is a Kullback-Leibler divergence in nats a decision, averaged over an image's decisions: a class of several for
each position along the other axes (*scores*), a yes or no for each number (*multilabel*), a number known up to the
outputs' own spread (*regression*), or a direction (*embedding*, a regression of the normalised vector).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import bindings

ATTRIBUTE = "answers"
SCORES, MULTILABEL, REGRESSION, EMBEDDING = KINDS = ("scores", "multilabel", "regression", "embedding")
PICTURE = (1, 3, 4)  # channels of an output that is an image
LEAST = 1e-30  # of a probability, before its logarithm is taken
SURE = 1e-7  # how far a sigmoid stays from 0 and 1, where single precision ends


@dataclass(frozen=True)
class Answers:
    """What the outputs (n, …) mean.

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
        """Outputs (n, …) as (n, decisions, classes) of scores, else (n, decisions)."""
        if self.kind == SCORES:
            values = outputs.log_softmax(self.axis) if not self.probabilities else outputs.clamp_min(LEAST).log()
            return values.movedim(self.axis, -1).flatten(1, -2) if outputs.dim() > 2 else values[:, None]
        values = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
        if self.kind == MULTILABEL and self.probabilities:
            return values.clamp(SURE, 1 - SURE).logit()
        return F.normalize(values, dim=1) if self.kind == EMBEDDING else values

    def divergences(self, wanted: Tensor, got: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Nats of each image (n,) by which outputs differ from those that are wanted.

        Scores and labels are divided by the temperature first, and the result is multiplied by its square (Hinton et
        al. 2015).
        """
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
        """A loss whose gradients have the outputs' Fisher information as their covariance, summed over the images.

        The answers are drawn from the network's own probabilities at a temperature: no labels are used. The second
        number is by how much this is less, or more, information than at temperature 1, as two traces (2,).
        """
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


def with_answers(mod: IRModule, answers: Answers, *, name: str = "main") -> IRModule:
    """A copy of the module that says what the outputs of its function mean."""
    functions = dict(mod.functions.items())
    own = {key: str(value) for key, value in answers.to_json().items()}
    functions[mod.get_global_var(name)] = mod[name].with_attr(ATTRIBUTE, own)
    return IRModule(functions, attrs=mod.attrs)


def answers_of(function: relax.Function) -> Answers:
    """What a canonical function's outputs mean: as it says itself, else as its end suggests."""
    said: Mapping[str, Any] = (function.attrs or {}).get(ATTRIBUTE, {})
    if not said:
        return guessed(function)
    own = {str(key): str(value) for key, value in said.items()}
    return Answers(own["kind"], int(own["axis"]), own["probabilities"] == "True", float(own["spread"]))


def guessed(function: relax.Function) -> Answers:
    """What the end of a function suggests: a last softmax or sigmoid, else the shape of the outputs."""
    shape = [int(extent) for extent in list(function.ret_ty.shape)[1:]]
    value = _last(function)
    name = str(value.op.name) if isinstance(value, relax.Call) and hasattr(value.op, "name") else ""
    if name in ("relax.nn.softmax", "relax.nn.log_softmax"):
        axis = int(value.attrs.axis) % (len(shape) + 1)
        return Answers(SCORES, axis, name == "relax.nn.softmax") if shape[axis - 1] > 1 else Answers(MULTILABEL)
    if name == "relax.sigmoid":
        return Answers(MULTILABEL, probabilities=True)
    if name == "relax.divide" and len(shape) == 1 < shape[0] and _is_norm(function, value.args[1]):
        return Answers(EMBEDDING)
    if math.prod(shape) == 1:
        return Answers(MULTILABEL)
    if len(shape) == 2:
        return Answers(SCORES, 2)
    return Answers(REGRESSION) if len(shape) == 3 and shape[0] in PICTURE else Answers(SCORES)


def asked(text: str, function: relax.Function) -> Answers:
    """What ``--output`` says that the outputs are: a kind, of scores with their axis as ``scores:2``.

    Raises
    ------
    UserError
        If there is no such kind, or the outputs have no such axis.
    """
    kind, _, axis = text.partition(":")
    if kind not in KINDS or (axis and (kind != SCORES or not axis.isdigit())):
        raise UserError(f"unknown --output {text!r}; give one of {', '.join(KINDS)}, or scores:AXIS")
    found, shape = guessed(function), list(function.ret_ty.shape)
    same = found if found.kind == kind else Answers(kind)
    if kind != SCORES:
        return same
    chosen = int(axis) if axis else same.axis
    if not 1 <= chosen < len(shape) or int(shape[chosen]) < 2:
        text = ", ".join(["n", *(str(int(extent)) for extent in shape[1:])])
        raise UserError(f"--output {kind}: outputs ({text}) have no classes on axis {chosen}; give scores:AXIS")
    return same if chosen == same.axis else Answers(SCORES, chosen)


def measured(answers: Answers, outputs: Callable[[], Tensor]) -> Answers:
    """The answers with the spread of some outputs (n, …), where errors are counted in it."""
    if answers.kind not in (REGRESSION, EMBEDDING):
        return answers
    values = answers.logits(outputs().double())
    return replace(answers, spread=max(float((values - values.mean(dim=0)).square().mean()), LEAST))


def _last(function: relax.Function) -> relax.Expr:
    """The value of the function's result, but for what only gives it another shape."""
    values = {binding.var: binding.value for binding in bindings(function)}
    result = function.body.body
    value = values.get(result, result)
    while isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) in ("relax.reshape", "relax.squeeze"):
        value = values.get(value.args[0], value.args[0])
    return value


def _is_norm(function: relax.Function, divisor: relax.Expr) -> bool:
    """Whether what a vector is divided by has one number for each image."""
    values = {binding.var: binding.value for binding in bindings(function)}
    value = values.get(divisor)
    if isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) == "relax.broadcast_to":
        divisor = value.args[0]
    shape = list(divisor.ty.shape) if getattr(divisor.ty, "shape", None) is not None else []
    return len(shape) == 2 and int(shape[1]) == 1
