"""What outputs mean: found from the end of a network or said, and how far answers are from each other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.models import randomised
from tvm_lowrank.bridge.answers import EMBEDDING, MULTILABEL, REGRESSION, SCORES, Answers, Meaning, Mixture, Part
from tvm_lowrank.bridge.calibrate import collect_fisher, predict
from tvm_lowrank.bridge.meaning import answers_of, asked, guessed, with_answers
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.searching.damage import divergence


class Network(nn.Module):
    """Two convolutions, and an end."""

    def __init__(self, channels: int, end: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, channels, 1))
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        flat = y.mean((2, 3))
        ends = {
            "flat": lambda: flat,
            "squeezed": lambda: y.mean((1, 2, 3)),
            "softmax": lambda: flat.softmax(1),
            "log": lambda: flat.log_softmax(1),
            "sigmoid": lambda: flat.sigmoid(),
            "image": lambda: y,
            "mask": lambda: y.softmax(1),
            "one": lambda: y.sigmoid(),
            "sequence": lambda: y.mean(2).transpose(1, 2),
            "direction": lambda: flat / flat.norm(dim=1, keepdim=True),
            "normalised": lambda: nn.functional.normalize(flat, dim=1),
            "detector": lambda: (y[:, :4], y[:, 4:].softmax(1)),
            "joined": lambda: torch.cat([y[:, :4], y[:, 4:].sigmoid()], dim=1).flatten(2),
            "turned": lambda: y.softmax(1).permute(0, 2, 3, 1),
            "rolled": lambda: y.flatten(2).softmax(1).transpose(1, 2),
        }
        return ends[self.end]()


def imported(channels: int, end: str) -> object:
    return import_model(randomised(Network(channels, end)), input_shape=(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("channels", "end", "expected"),
    [
        (10, "flat", Answers()),
        (1, "flat", Answers(MULTILABEL)),
        (1, "squeezed", Answers(MULTILABEL)),
        (10, "softmax", Answers(probabilities=True)),
        (10, "log", Answers()),
        (10, "sigmoid", Answers(MULTILABEL, probabilities=True)),
        (1, "sigmoid", Answers(MULTILABEL, probabilities=True)),
        (21, "image", Answers()),
        (1, "image", Answers(REGRESSION)),
        (3, "image", Answers(REGRESSION)),
        (21, "mask", Answers(probabilities=True)),
        (1, "one", Answers(MULTILABEL, probabilities=True)),
        (37, "sequence", Answers(axis=2)),
        (12, "direction", Answers(EMBEDDING)),
        (12, "normalised", Answers(EMBEDDING)),
        (21, "turned", Answers(axis=3, probabilities=True)),
        (21, "rolled", Answers(axis=2, probabilities=True)),
        (
            9,
            "detector",
            Mixture(((4, 8, 8), (5, 8, 8)), (Part(Answers(REGRESSION), 0), Part(Answers(probabilities=True), 1))),
        ),
        (
            9,
            "joined",
            Mixture(
                ((9, 64),),
                (Part(Answers(REGRESSION), 0, 1, 0, 4), Part(Answers(MULTILABEL, probabilities=True), 0, 1, 4, 5)),
            ),
        ),
    ],
)
def test_the_end_of_a_network_tells(channels: int, end: str, expected: Meaning) -> None:
    mod = imported(channels, end)
    assert guessed(mod["main"]) == answers_of(mod["main"]) == TorchBridge(mod).answers == expected  # type: ignore[index]


def test_what_is_said_counts() -> None:
    mod = imported(10, "softmax")
    function = mod["main"]  # type: ignore[index]
    assert asked("scores", function) == guessed(function) and asked("regression", function) == Answers(REGRESSION)
    said = Answers(REGRESSION, spread=0.25)
    again = with_answers(mod, said)  # type: ignore[arg-type]
    assert answers_of(again["main"]) == TorchBridge(again).answers == said
    assert asked("scores:2", imported(37, "sequence")["main"]) == Answers(axis=2)  # type: ignore[index]
    assert asked("scores:1", imported(37, "sequence")["main"]) == Answers(axis=1)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "classes",
            "unknown --output 'classes'; give one of scores, multilabel, regression, embedding, scores:AXIS, KIND@",
        ),
        ("multilabel:1", "unknown --output 'multilabel:1'"),
        ("scores:x", "unknown --output 'scores:x'"),
        ("scores:3", r"outputs \(n, 1\) have no classes on axis 3; give scores:AXIS"),
        ("scores", r"outputs \(n, 1\) have no classes on axis 1"),
        ("regression@1:0-3", r"outputs \(n, 1\) have no entries 0 to 3 on axis 1"),
        ("regression,scores", r"--output says what 2 outputs are, but the model has 1: \(n, 1\)"),
    ],
)
def test_what_cannot_be_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(text, imported(1, "flat")["main"])  # type: ignore[index]


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sum(p * np.log(p / q), axis=-1)


def test_divergences_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 4, 7))

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)

    positions = kl(softmax(a), softmax(b)).mean(axis=1)
    assert divergence(Answers(axis=2), a, b) == pytest.approx(positions.mean())
    assert divergence(Answers(axis=2, probabilities=True), softmax(a), softmax(b)) == pytest.approx(positions.mean())
    swapped = divergence(Answers(axis=1), a.swapaxes(1, 2), b.swapaxes(1, 2))
    assert swapped == pytest.approx(positions.mean())

    p, q = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))
    labels = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert divergence(Answers(MULTILABEL), a, b) == pytest.approx(labels)
    assert divergence(Answers(MULTILABEL, probabilities=True), p, q) == pytest.approx(labels, rel=1e-5)
    # a question with one logit is that with two, of which one is zero
    one, two = a[:, 0, :1], np.concatenate([a[:, 0, :1], 0 * a[:, 0, :1]], axis=1)
    other = np.concatenate([b[:, 0, :1], 0 * b[:, 0, :1]], axis=1)
    assert divergence(Answers(MULTILABEL), one, b[:, 0, :1]) == pytest.approx(divergence(Answers(), two, other))

    assert divergence(Answers(REGRESSION, spread=4.0), a, b) == pytest.approx(np.square(a - b).mean() / 8)
    assert divergence(Answers(EMBEDDING), a[:, 0], 3 * a[:, 0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "answers", [Answers(), Answers(probabilities=True), Answers(MULTILABEL), Answers(MULTILABEL, probabilities=True)]
)
def test_what_is_no_number_says_nothing(answers: Answers) -> None:
    rng = np.random.default_rng(0)
    dense = rng.dirichlet(np.ones(6), size=4)
    changed = dense.copy()
    changed[1, 3] = np.nan
    known = np.full((1, 6), 1 / 6) if answers.kind == SCORES else np.full((1, 6), answers.unknown)
    expected = divergence(answers, dense[1:2], known) / 4
    assert divergence(answers, dense, changed) == pytest.approx(expected, rel=1e-6) and expected > 0


def test_errors_count_in_the_spread_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    outputs = torch.from_numpy(rng.normal(3, 2, size=(4000, 1, 2, 2)))
    found = Answers(REGRESSION).measured(outputs)
    assert found.spread == pytest.approx(4, rel=0.1)
    # another unit changes nothing
    scaled = Answers(REGRESSION).measured(100 * outputs)
    a, b = outputs.numpy(), outputs.numpy() + 0.1
    assert divergence(found, a, b) == pytest.approx(divergence(scaled, 100 * a, 100 * b))
    assert Answers().measured(outputs) == Answers()


@pytest.mark.parametrize(
    ("channels", "end", "answers"),
    [
        (1, "flat", Answers(MULTILABEL)),
        (6, "softmax", Answers(probabilities=True)),
        (6, "sigmoid", Answers(MULTILABEL, probabilities=True)),
        (5, "sequence", Answers(axis=2)),
        (21, "image", Answers()),
        (1, "image", Answers(REGRESSION, spread=0.3)),
        (6, "normalised", Answers(EMBEDDING, spread=0.1)),
        (
            9,
            "detector",
            Mixture(
                ((4, 8, 8), (5, 8, 8)),
                (Part(Answers(REGRESSION, spread=0.3), 0), Part(Answers(probabilities=True), 1)),
            ),
        ),
    ],
)
def test_the_information_predicts_the_damage(channels: int, end: str, answers: Meaning) -> None:
    """To second order: half of the Fisher information of what is added to the first convolution's outputs."""
    net = randomised(Network(channels, end))
    mod = with_answers(import_model(net, input_shape=(1, 3, 8, 8)), answers)
    images = np.random.default_rng(0).normal(size=(400, 3, 8, 8)).astype("float32")
    sites = find_sites(mod)
    fisher = collect_fisher(TorchBridge(mod), sites, images)[sites[0].id]
    # the same change everywhere, of a channel's outputs: the information of one position, summed over positions, misses
    # what these have in common, so the change is drawn anew for each
    before = predict(TorchBridge(mod), images)
    noise = 1e-2
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = net.body[0](torch.from_numpy(images))
        hidden = hidden + noise * torch.randn(hidden.shape, generator=generator)
        rest = nn.Sequential(*list(net.body)[1:])
        net.body = rest
        after = TorchBridge(mod).outputs.joined(net(hidden)).numpy()
    predicted = 0.5 * noise**2 * float(np.trace(fisher))
    assert math.isclose(divergence(answers, before, after), predicted, rel_tol=0.25)


def test_parts_count_alike() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 6, 7))
    boxes, labels = Answers(REGRESSION, spread=2.0), Answers(MULTILABEL)
    whole = Mixture(((6, 7),), (Part(boxes, 0, 1, 0, 4), Part(labels, 0, 1, 4, 2)))
    expected = (divergence(boxes, a[:, :4], b[:, :4]) + divergence(labels, a[:, 4:], b[:, 4:])) / 2
    assert divergence(whole, a, b) == pytest.approx(expected)

    shapes = ((4, 7), (2, 7))
    apart = Mixture(shapes, (Part(boxes, 0), Part(labels, 1)))
    first, second = (np.concatenate([x[:, :4].reshape(5, -1), x[:, 4:].reshape(5, -1)], axis=1) for x in (a, b))
    assert divergence(apart, first, second) == pytest.approx(expected)
    second[3, 0] = np.nan  # then nothing is known of the image
    assert np.isfinite(divergence(apart, first, second))


def test_parts_may_be_said() -> None:
    joined = imported(9, "joined")["main"]  # type: ignore[index]
    known = Answers(MULTILABEL, probabilities=True)
    said = asked("regression@1:0-3+multilabel@1:4-8", joined)
    assert said == Mixture(((9, 64),), (Part(Answers(REGRESSION), 0, 1, 0, 4), Part(Answers(MULTILABEL), 0, 1, 4, 5)))
    # whether a sigmoid was applied is seen from the numbers
    outputs = torch.rand(10, 9, 64, generator=torch.Generator().manual_seed(0))
    assert isinstance(said, Mixture) and said.measured(outputs).parts[1].answers == known
    assert said.measured(3 * outputs).parts[1].answers == Answers(MULTILABEL)

    detector = imported(9, "detector")
    assert asked("regression,scores", detector["main"]) == guessed(detector["main"])  # type: ignore[index]
    every = asked("regression", detector["main"])  # type: ignore[index]
    assert isinstance(every, Mixture) and [part.answers.kind for part in every.parts] == [REGRESSION, REGRESSION]
    again = with_answers(detector, every)  # type: ignore[arg-type]
    assert answers_of(again["main"]) == every


OWN = """
import torch

def squares(dense, changed):
    boxes, classes = dense
    return ((boxes - changed[0]) ** 2).flatten(1).mean(1) / 0.6 + ((classes - changed[1]) ** 2).flatten(1).mean(1) / 2

def far(dense, changed):
    return torch.ones(len(dense[0]))

def rough(dense, changed):
    return (dense[0] - changed[0]).abs().flatten(1).sum(1)

def short(dense, changed):
    return ((dense[0] - changed[0]) ** 2).mean()

def broken(dense, changed):
    raise ValueError("no")

def rigid(dense, changed):
    return (dense[0] - changed[0]).detach().square().flatten(1).sum(1)
"""


def test_a_divergence_of_ones_own(tmp_path: Path) -> None:
    """It is what the same kinds are: half of the squared errors in units of their variances."""
    (tmp_path / "own.py").write_text(OWN)
    mod = imported(9, "detector")
    own = asked(f"{tmp_path / 'own.py'}:squares", mod["main"])  # type: ignore[index]
    spreads = enumerate((0.15, 0.5))
    known = Mixture(((4, 8, 8), (5, 8, 8)), tuple(Part(Answers(REGRESSION, spread=s), i) for i, s in spreads))
    images = np.random.default_rng(0).normal(size=(200, 3, 8, 8)).astype("float32")
    outputs = torch.from_numpy(predict(TorchBridge(mod), images))  # type: ignore[arg-type]
    assert own.measured(outputs) == own
    a, b = outputs.numpy(), outputs.numpy() + 0.1
    assert divergence(own, a, b) == pytest.approx(divergence(known, a, b), rel=1e-5)
    site = find_sites(mod)[0]  # type: ignore[arg-type]
    traces = [
        np.trace(collect_fisher(TorchBridge(with_answers(mod, answers)), [site], images)[site.id])  # type: ignore[arg-type]
        for answers in (own, known)
    ]
    assert traces[0] == pytest.approx(traces[1], rel=0.2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("far", "is not 0 for equal outputs"),
        ("rough", "has no second derivative"),
        ("short", r"returned \(\), not a tensor of nats of each image"),
        ("broken", "failed: ValueError: no"),
        ("rigid", "has no gradient; write it in PyTorch"),
        ("absent", "has no 'absent'"),
    ],
)
def test_what_is_no_divergence_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    mod = imported(9, "detector")
    outputs = torch.randn(20, 9 * 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=message):
        asked(f"{tmp_path / 'own.py'}:{name}", mod["main"]).measured(outputs)  # type: ignore[index]
