"""Fine-tuning: backpropagation through a compressed network, with the dense one as its teacher, and class labels.

The loss is (1 - a) cross-entropy(labels) + a (T^2 KL(teacher at T || student at T) + f errors); where outputs are no
class scores there are no labels, and a is 1. The former is Hinton et
al.'s distillation (2015), and the errors are those of the inputs of all sites, as in the reconstruction
(`tvm_lowrank.searching.fit.reconstruct`): without them the student learns the teacher's answers for the training images
by heart, and gets hardly nearer to it on others. The epoch that is nearest to the dense network on the selection images
wins, and the network as it came takes part as epoch 0: the divergence moves smoothly where counted answers jump, and
the labels of these images are still unused when the result is judged by them. After every epoch all that the next one
depends on is written to a file, so that a killed run goes on with the same bits. Under `torchrun` each worker takes its
share of the batches, and the gradients are averaged.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank import console
from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.training_data import Batch, Batches
from tvm_lowrank.errors import TimeUp, UserError
from tvm_lowrank.files import replaced
from tvm_lowrank.reference import summary
from tvm_lowrank.searching.fit.muon import Muon
from tvm_lowrank.searching.fit.torchrun import Workers
from tvm_lowrank.searching.fit.training import Learner, assign, imitation, parameter_groups, ramp, values_of, watched

T = TypeVar("T")

_VERSION = 3  # of the checkpoint and of the arithmetic


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    The bundled network under a plan of CP chains came from 0.0519 nats of damage to 0.0354 in two epochs of 49,000
    images; with AdamW at 1.5e-3, from 0.0566 to 0.0448.

    Parameters
    ----------
    epochs : passes over the training images.
    rate : norm of the largest step of a layer, as a part of its weights' own; the factors of a chain share it. It
        rises over the first `warm_up` of all batches and falls to 0 along a cosine.
    distil : share of the loss, 0 to 1, that imitates the teacher; the rest is cross-entropy with the labels.
    temperature : what the logits are divided by before teacher and student are compared.
    features : weight of the errors of the sites' inputs, relative to the teacher's, against the divergence in nats.
    seed : of everything random that the training data draws from the global generators.
    """

    epochs: int = 1
    rate: float = 0.006
    distil: float = 0.9
    temperature: float = 2.0
    features: float = 4.0
    warm_up: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "epochs": (1, math.inf),
            "rate": (0, math.inf),
            "distil": (0, 1),
            "temperature": (1e-3, math.inf),
            "features": (0, math.inf),
            "warm_up": (0, 0.9),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"fine-tuning {name} {getattr(self, name)} is not usable; give {low} to {high}")


@dataclass(frozen=True)
class Judged:
    """A network on the selection split: its damage, in nats an image, and the metric's value, with the sign behind."""

    damage: float
    score: float
    sign: str = "%"


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: mean loss in nats, the network after it, duration in s."""

    number: int
    loss: float
    judged: Judged
    seconds: float


@dataclass(frozen=True)
class Result:
    """What fine-tuning did to a network.

    ``start`` is the network before it, and ``kept`` that of the best epoch, number ``best`` (0: as it came).
    ``diverged`` says that the loss stopped being finite before the last epoch.
    """

    start: Judged
    epochs: tuple[Epoch, ...] = ()
    diverged: bool = False

    def ended(self, epochs: int) -> bool:
        """Whether nothing is left to do of so many epochs."""
        return self.diverged or len(self.epochs) >= epochs

    @property
    def best(self) -> int:
        damages = [judged.damage for judged in self._all]
        return min(range(len(damages)), key=lambda i: math.inf if math.isnan(damages[i]) else damages[i])

    @property
    def kept(self) -> Judged:
        return self._all[self.best]

    @property
    def _all(self) -> list[Judged]:
        return [self.start, *(epoch.judged for epoch in self.epochs)]


def finetune(
    bridge: TorchBridge,
    batches: Batches,
    settings: Settings,
    *,
    teacher: TorchBridge,
    judge: Callable[[TorchBridge], Judged],
    folder: Path,
    key: str = "",
    workers: Workers | None = None,
    deadline: float = math.inf,
) -> Result:
    """Train the parameters of a compressed network in place; it is left with those of the best epoch.

    Computes in bfloat16 (with float32 weights) where the processor or the worker's GPU has it. Of several workers each
    must call this with the same arguments; the first one judges, writes and prints, and all return the same. A batch
    for each of n workers is one batch n times as large (but that errors of features are relative to a worker's batch).

    Parameters
    ----------
    bridge : the compressed network.
    batches : the (images, labels) batches of an epoch by its number, as from `training_data.load_training`: float32
        NCHW, and int64 (n,) or None: then it imitates the teacher only. For a resumed run to give the same bits they
        must depend on nothing but that number and the global generators of torch, numpy and Python, which are seeded
        for every epoch.
    teacher : the dense network.
    judge : a network on the selection split.
    folder : where the checkpoint is kept. A run that was killed goes on from it, and one that ended is not repeated.
    key : what else the result depends on, such as the names of the training data and of the metric. The parameters,
        the settings and the number of workers are part of the checkpoint's key already.
    workers : this one among those that train; else it trains alone, on the CPU.
    deadline : as `time.monotonic` counts.

    Raises
    ------
    UserError
        If there are labels but no class scores, a batch is not usable, or the checkpoint cannot be read or written.
    TimeUp
        If an epoch would not end before the deadline, by the time that the one before took; the checkpoint is there.
    """
    workers = workers or Workers()
    with _generators_kept():
        key = _key(bridge, teacher, settings, workers.count, key)
        path = folder / f"finetune-{key[:16]}.pt"
        trainer = _Trainer(bridge, teacher, settings, workers)
        state = workers.of_first(partial(_read, path, key))
        if state is None:
            state = workers.of_first(lambda: _State(Result(judge(bridge)), values_of(bridge), *trainer.save()))
            workers.only_first(partial(_write, path, key, state))
        elif not state.result.ended(settings.epochs):
            trainer.load(state)
            workers.say(f"fine-tuning goes on after epoch {len(state.result.epochs)} of {settings.epochs}, from {path}")
        if not state.result.ended(settings.epochs):
            for after in _epochs(trainer, state, bridge, batches, judge, deadline):
                workers.only_first(partial(_write, path, key, after))
                state = after
        assign(bridge, state.best)
        return state.result


@dataclass(frozen=True, eq=False)
class _State:
    """All that the next epoch depends on; without weights and optimiser once there is none."""

    result: Result
    best: list[Tensor]
    weights: list[Tensor]
    optimiser: dict[str, Any]


def _epochs(
    trainer: _Trainer,
    state: _State,
    bridge: TorchBridge,
    batches: Batches,
    judge: Callable[[TorchBridge], Judged],
    deadline: float,
) -> Iterator[_State]:
    """The state after each epoch that is left; the student's parameters are copied to `bridge` to be judged."""
    epochs, workers, started = trainer.settings.epochs, trainer.workers, time.monotonic()
    first = len(state.result.epochs) + 1
    _seed(trainer.settings.seed, first)
    steps = _steps(batches(first), workers)
    result, best = state.result, state.best
    with workers.progress("fine-tuning", (epochs - first + 1) * steps) as advance:
        for number in range(first, epochs + 1):
            began = time.monotonic()
            expected = result.epochs[-1].seconds if result.epochs else 0.0
            if workers.of_first(partial(_late, began + expected, deadline)):
                raise TimeUp
            _seed(trainer.settings.seed, number)
            try:
                loss = trainer.epoch(number, batches(number), steps, advance)
            except _Diverged as where:
                workers.warn(
                    f"the loss is not finite any more ({where}); the weights of epoch {result.best} are kept; a lower "
                    "rate may help"
                )
                yield _State(replace(result, diverged=True), best, [], {})
                return
            weights, optimiser = trainer.save()
            assign(bridge, weights)
            judged = workers.of_first(partial(judge, bridge))
            done = Epoch(number, loss, judged, time.monotonic() - began)
            result = replace(result, epochs=(*result.epochs, done))
            best = weights if result.best == number else best
            left = (time.monotonic() - started) / (number - first + 1) * (epochs - number)
            workers.say(
                f"epoch {number} of {epochs}: loss {loss:.3f}; on the selection images {judged.damage:.4f} nats of "
                f"damage, {judged.score:.2f} {judged.sign}; best epoch {result.best} (before training "
                f"{result.start.damage:.4f})" + (f"; {left:.0f} s left" if number < epochs else "")
            )
            yield _State(result, best, weights, optimiser) if number < epochs else _State(result, best, [], {})


def _late(end: float, deadline: float) -> bool:
    return end > deadline


class _Diverged(Exception):
    """The loss or its gradient is not finite; the text says where."""


class _Trainer:
    """The student, the teacher and the optimiser, on the device of this worker."""

    def __init__(self, bridge: TorchBridge, teacher: TorchBridge, settings: Settings, workers: Workers) -> None:
        self.settings, self.workers = settings, workers
        self._teacher = Learner(teacher, device=workers.device)
        self._student = Learner(bridge, device=workers.device, learns=True)
        net = self._student.bridge
        # workers on machines that are not the same need not have got the same bits
        assign(net, workers.of_first(lambda: values_of(net)))
        self._optimiser = Muon(parameter_groups(net), lr=settings.rate)

    def save(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The student's parameters and the optimiser's state."""
        return values_of(self._student.bridge), self._optimiser.state_dict()

    def load(self, state: _State) -> None:
        assign(self._student.bridge, state.weights)
        self._optimiser.load_state_dict(state.optimiser)

    def epoch(self, number: int, batches: Iterable[Batch], steps: int, advance: console.Advance) -> float:
        """Learn from this worker's share of the batches; returns the mean loss of all workers."""
        losses: list[float] = []
        for i, batch in enumerate(self.workers.share(batches), 1):
            done = min((i - 0.5) / steps, 1) + number - 1
            loss = self._step(batch, self.settings.rate * ramp(done / self.settings.epochs, self.settings.warm_up))
            if not math.isfinite(loss):
                raise _Diverged(f"epoch {number}, batch {i * self.workers.count}")
            losses.append(loss)
            advance(1, description=f"fine-tuning, epoch {number} of {self.settings.epochs}, loss {loss:.3f}")
        return float(np.mean(losses))

    def _step(self, batch: Batch, rate: float) -> float:
        """One update of the student; returns the loss, or NaN without an update where the gradient is not finite."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        device, (images, labels) = self.workers.device, batch
        loss = self._loss(images.to(device), None if labels is None else labels.to(device))
        loss.backward()
        mean = self.workers.average(loss.detach(), self._student.parameters)
        gradients = [values.grad for values in self._student.parameters if values.grad is not None]
        if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            return math.nan
        self._optimiser.step()
        return mean

    def _loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        got = watched(self._student, images)
        settings, answers = self.settings, self._teacher.bridge.answers
        share = 1.0 if labels is None else settings.distil
        loss = torch.zeros((), device=images.device)
        if labels is not None:
            outputs, logits = self._teacher.bridge.outputs, got[1]
            if len(outputs.shapes) != 1 or logits.dim() != 2:
                raise UserError(f"the model's outputs have shape {outputs}; labels need class scores, (n, classes)")
            if isinstance(answers, Answers) and answers.probabilities:
                logits = answers.logits(logits)[:, 0]
            loss = loss + (1 - share) * F.cross_entropy(logits, labels)
        if share:
            with torch.no_grad():
                wanted = watched(self._teacher, images)
            how = {"temperature": settings.temperature, "features": settings.features}
            loss = loss + share * imitation(wanted, got, answers, **how)
        return loss


def _steps(batches: Iterable[Batch], workers: Workers) -> int:
    """How many updates an epoch has."""
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        workers.say("counting the training batches, which do not know their number")
        count = sum(1 for _ in batches)
    if count < workers.count:
        raise UserError(f"{count} training batches are too few for {workers.count} workers; start fewer, or give more")
    return count // workers.count


# what is random


def _seed(seed: int, epoch: int) -> None:
    """Make the global generators a function of the epoch, so that a resumed run draws the same numbers."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - the user's augmentation may draw from it


@contextmanager
def _generators_kept() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


# the checkpoint


def _key(bridge: TorchBridge, teacher: TorchBridge, settings: Settings, workers: int, key: str) -> str:
    digest = hashlib.sha256(repr((_VERSION, key, workers, settings)).encode())
    for net in (bridge, teacher):
        for name, values in net.named_parameters():
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _write(path: Path, key: str, state: _State) -> None:
    """Put a checkpoint in the place of the last one, which stays whole until then."""
    content = {
        "key": key,
        "start": asdict(state.result.start),
        "epochs": [asdict(epoch) for epoch in state.result.epochs],
        "diverged": state.result.diverged,
        "best": state.best,
        "weights": state.weights,
        "optimiser": state.optimiser,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replaced(path) as file:
        file.write(buffer.getbuffer())


def _read(path: Path, key: str) -> _State | None:
    """The checkpoint of a key, None if there is none."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        epochs = tuple(Epoch(**{**epoch, "judged": Judged(**epoch["judged"])}) for epoch in saved["epochs"])
        result = Result(Judged(**saved["start"]), epochs, saved["diverged"])
        state = _State(result, saved["best"], saved["weights"], saved["optimiser"])
        own = saved["key"] == key
    # torch, pickle and zipfile have exceptions of their own for damaged files
    except Exception as error:
        raise UserError(f"cannot read checkpoint {path}: {summary(error)}; delete it to fine-tune again") from error
    return state if own else None
