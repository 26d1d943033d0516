"""The outer loop: on landscapes of damage whose best limit is known it finds that limit, with few evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tvm.ir import IRModule

from support.models import ResNet20, randomised
from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.measure import ACCURACY
from tvm_lowrank.data.metric import load_metric
from tvm_lowrank.data.splits import Splits
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.graph import chain_of, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.searching.candidates import site_macs
from tvm_lowrank.searching.choose import loop
from tvm_lowrank.searching.choose.drops import LEFT, Rate, Recovery
from tvm_lowrank.searching.choose.loop import LEAST_LIMIT, MOST_EVALUATIONS, explore
from tvm_lowrank.searching.choose.search import FIRST_LIMIT, Evaluated, Placed, Search, Settings
from tvm_lowrank.searching.journal import Journal
from tvm_lowrank.tensors import Tensors

IMAGES = 1000


class Landscape(Search):
    """A search whose plan of a limit has a given damage; it loses ``rate * damage ** power`` points, and is counted."""

    def __init__(
        self, budget: float, rate: float, *, slope: float = 1.1, cost: float = 1.0, noise: float = 0.0
    ) -> None:
        settings: Any = SimpleNamespace(budget=budget, deadline=np.inf, confident=False)
        splits: Any = SimpleNamespace(selection=(None, np.zeros(IMAGES)))
        self.settings, self.splits, self.metric = settings, splits, load_metric()
        self.times: Any = SimpleNamespace(rest=lambda: None)
        self.rate, self.slope, self.cost, self.noise = rate, slope, cost, noise
        self.error = 0.4  # as it is reported, points
        self._rate, self._recovery = Rate(), Recovery(1.0)
        self.rng = np.random.default_rng(0)
        self.fastest_from = self.unscored_from = np.inf
        self.evaluated: list[Evaluated] = []

    def placed(self, limit: float) -> Placed:
        return Placed(Plan({"conv": Choice("svd", 8)}), limit, limit, limit**-0.25)

    def true_drop(self, limit: float) -> float:
        return self.rate * self.damage_of(limit) ** ACCURACY.power

    def damage_of(self, limit: float) -> float:
        return float(self.cost * limit**self.slope)

    def judge(self, placed: Placed) -> Evaluated:
        counted = self.true_drop(placed.limit) + self.noise * float(self.rng.standard_normal())
        damage, error = self.damage_of(placed.limit), self.error
        measured = {"damage": damage, "drop": counted, "error": error, "likely": counted, "likely_error": error}
        why = "metric m is nan" if placed.limit > self.unscored_from else ""
        result = Evaluated(**vars(placed), **measured, fit="reconstructed", unscored=why)  # type: ignore[arg-type]
        if not why:
            self._rate.learn(str(placed.limit), result.counted)
        self.evaluated.append(result)
        return result

    def is_fastest(self, evaluated: Evaluated) -> bool:
        return evaluated.limit >= self.fastest_from

    @property
    def dense_ms(self) -> float:
        return 4.0

    def found(self, first: float = FIRST_LIMIT) -> list[Evaluated]:
        kept: list[Evaluated] = []
        explore(self, kept, self.judge, first, MOST_EVALUATIONS)
        return sorted(kept, key=lambda e: e.ms)


@pytest.mark.parametrize("budget", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rate", [10.0, 30.0, 90.0])
@pytest.mark.parametrize("cost", [0.2, 1.0, 5.0])
def test_the_limit_of_the_budget_is_found(budget: float, rate: float, cost: float) -> None:
    search = Landscape(budget, rate, cost=cost)
    search.error = 0.02
    best = search.found()[0]
    assert search.true_drop(best.limit) <= 1.25 * budget
    assert search.true_drop(1.7 * best.limit) >= budget
    assert len(search.evaluated) <= 6


def test_luck_hardly_moves_it() -> None:
    """What is likely to be lost is uncertain by 0.2 points, the budget is one."""
    losses, evaluations = [], []
    for seed in range(40):
        search = Landscape(1.0, ACCURACY.rate, noise=0.2)
        search.error = 0.2
        search.rng = np.random.default_rng(seed)
        losses.append(search.true_drop(search.found()[0].limit))
        evaluations.append(len(search.evaluated))
    assert np.std(losses) < 0.2
    assert 0.75 < np.mean(losses) < 1.05
    assert np.mean(evaluations) < 3.5


@pytest.mark.parametrize("last", [1e-4, 0.003, 0.009, 0.02, 0.05])
def test_plans_without_a_score_are_over_any_budget(last: float, capfd: pytest.CaptureFixture[str]) -> None:
    """The best that has one is found, whether the budget or the score ends first."""
    free, search = Landscape(1.0, 20.0), Landscape(1.0, 20.0)
    search.unscored_from = last
    best, without = search.found()[0], free.found()[0]
    assert 0.6 * min(last, without.limit) <= best.limit <= last
    assert len(search.evaluated) <= MOST_EVALUATIONS
    if any(own.unscored for own in search.evaluated):
        assert "for metric m is nan, over budget" in capfd.readouterr().err


def test_a_whole_interval_within_the_budget() -> None:
    search = Landscape(1.0, ACCURACY.rate)
    search.settings.confident = True  # type: ignore[misc]
    search.error = 0.25
    best = search.found()[0]
    assert 0.3 < search.true_drop(best.limit) <= 1.0 - 1.96 * 0.25 + 0.1


def test_it_ends_at_the_fastest_plan() -> None:
    search = Landscape(50.0, 30.0)
    search.fastest_from = 0.05
    assert search.found()[0] is search.evaluated[-1]
    assert search.evaluated[-1].limit >= 0.05


def test_when_nothing_keeps_the_budget() -> None:
    search = Landscape(1.0, 30.0)
    search.damage_of = lambda limit: 1.0  # type: ignore[method-assign]
    assert search.found() == []
    assert min(e.limit for e in search.evaluated) >= LEAST_LIMIT


def test_less_than_half_an_image_is_nothing() -> None:
    assert Landscape(0.0, 30.0).found()


MILD, STRONG = Plan({"conv<2>": Choice("tucker2", (16, 32))}), Plan({"conv<2>": Choice("cp3", 24)})


class Evaluating(Search):
    """A search whose networks are nothing but their noise."""

    def __init__(self, journal: Journal, training: str | None) -> None:
        networks: Any = lambda plan, fit: (plan, fit)  # noqa: E731
        networks.training = None if training is None else SimpleNamespace(name=training)
        networks.recovery = "reconstructed"
        self.networks, self.journal, self.metric = networks, journal, load_metric()
        self.answers, self.outputs = Answers(), Tensors(((10,),))
        self.mod: Any = (Plan(), "")
        splits: Any = SimpleNamespace(selection=(None, np.arange(IMAGES) % 10))
        self.splits = splits
        self.seconds, self._rate, self._recovery = {}, Rate(), Recovery(1.0)
        self.settings: Any = SimpleNamespace(seed=0)
        self.times: Any = SimpleNamespace(rest=lambda: None)

    def _answers(self, mod: Any) -> np.ndarray:
        plan, fit = mod
        noise = {"": 0.0, "decomposed": 0.4, "reconstructed": 0.3, "finetuned": 0.35}[fit] * (1 + (plan == STRONG))
        return 3 * np.eye(10)[np.arange(IMAGES) % 10] + noise * np.random.default_rng(0).standard_normal((IMAGES, 10))


@contextmanager
def evaluating(path: Path, training: str | None = None) -> Iterator[Evaluating]:
    journal = Journal(path, {})
    yield Evaluating(journal, training)
    journal.close()


def test_what_was_tried_is_known_to_a_search_that_is_resumed(tmp_path: Path) -> None:
    """With what each plan is expected to lose by all that were evaluated; what labels change is in the keys."""
    mild, strong = Placed(MILD, 0.01, 0.012, 1.25), Placed(STRONG, 0.02, 0.02, 0.9)
    with evaluating(tmp_path / "j") as search:
        assert search.tried() == []
        search.evaluate(Placed(Plan(), 0.001, 0.0, 2.0), "decomposed")
        found = [search.evaluate(mild, "decomposed"), search.evaluate(mild, "reconstructed")]
        first = search.tried()
    with evaluating(tmp_path / "j", "/a b/{net}.py:batches, 2 epochs") as search:
        assert search.tried() == first
        found.append(search.evaluate(strong, "finetuned"))
        search.evaluate(Placed(MILD, 0.015, 0.012, 1.25), "decomposed")
        rows = search.tried()
    with evaluating(tmp_path / "j") as search:
        assert search.tried() == rows
    rate = Rate()
    for number, own in enumerate(found):
        rate.learn(str(number), own.counted)
    assert rows == [
        {
            "plan": json.loads(own.plan.to_json()),
            "fit": own.fit,
            "ms": own.ms,
            "predicted": own.predicted,
            "damage": own.damage,
            "drop": own.drop,
            "error": own.error,
            "likely": own.likely,
            "likely_error": own.likely_error,
            "expected": rate.expected(own.counted),
        }
        for own in found
    ]
    assert 0 < rows[1]["damage"] < rows[0]["damage"] < rows[2]["damage"] and rows[2]["drop"] > 0
    assert first[0]["expected"] != rows[0]["expected"], "the last plan has not made the rate better known"


def test_after_the_deadline_the_network_is_the_one_that_was_judged() -> None:
    search, asked = Landscape(1.0, ACCURACY.rate), []

    def networks(plan: Plan, fit: str) -> str:
        asked.append(fit)
        if fit == "reconstructed":
            raise TimeUp
        return fit

    networks.recovery = "reconstructed"  # type: ignore[attr-defined]
    search.networks, search.seconds = networks, {}  # type: ignore[assignment]
    assert search.network(Plan(), "decomposed") == "decomposed"  # type: ignore[comparison-overlap]
    assert asked == ["reconstructed", "decomposed"]


class Small(Search):
    """A search of a small network by MACs; `late` of its evaluations are made before the time is up."""

    def __init__(self, path: Path, budget: float, late: float = math.inf) -> None:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(120, 3, 16, 16)).astype("float32")
        net = randomised(ResNet20())
        with torch.no_grad():  # answers that differ
            net.linear.weight.mul_(3 / net(torch.from_numpy(images)).std(dim=0).mean())
            net.linear.bias.sub_(net(torch.from_numpy(images)).mean(dim=0))
        mod = import_model(net, input_shape=(1, 3, 16, 16))
        labels = predict(TorchBridge(mod), images).argmax(1)
        splits = Splits(images[:40], (images[40:], labels[40:]), (images[:1], labels[:1]), "made")
        settings = Settings(budget, ("channel", "spatial", "svd"), 8)
        super().__init__(mod, splits, load_metric(), MacTimes(mod), Journal(path / "journal", {}), settings)  # type: ignore[arg-type]
        self.late = late

    def check_time(self) -> None:
        if self.damage and len(self.journal.of_kind("evaluation")) >= self.late:
            raise TimeUp


class MacTimes:
    """Milliseconds by MACs; everything counts as measured."""

    def __init__(self, mod: IRModule) -> None:
        self._sites = {site.id: site for site in find_sites(mod)}

    def estimate(self, site: str, choice: Choice) -> float:
        return site_macs(self._sites[site], choice) * 1e-6

    def measured(self, site: str, choice: Choice) -> float | None:
        return self.estimate(site, choice)

    def estimates(self, wanted: Any) -> dict[tuple[str, Choice], float]:
        return {(name, choice): self.estimate(name, choice) for name, own in wanted.items() for choice in own}

    def measure(self, wanted: Any, check: Any) -> None:
        check()

    def fastest_dense(self, _formats: Any) -> Plan:
        return Plan()

    def rest(self) -> None:
        pass


@pytest.mark.parametrize(("first", "late"), [(0.1, 0), (1.0, 1)])
def test_when_the_time_is_up_there_is_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, late: int
) -> None:
    """Before anything was evaluated, or when what was evaluated loses too much."""
    monkeypatch.setattr(loop, "FIRST_LIMIT", first)
    search = Small(tmp_path, 5.0, late)
    search.probe()
    found = loop.run(search)
    tried = search.tried()
    assert len(found) == 1 and found[0].plan and found[0].ms < search.dense_ms
    assert search.expected_drop(found[0]) <= 5.0
    assert all(row["fit"] == "decomposed" for row in tried)
    assert late == 0 or tried[0]["expected"] > 5.0
    network = search.network(found[0].plan, found[0].fit)
    assert {chain_of(name) for name in TorchBridge(network).sites if chain_of(name) != name} == set(found[0].plan)
    search.journal.close()


def test_a_first_plan_is_not_kept_waiting_for_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a part of the time has passed it is made of what was timed; afterwards there is time for more."""
    search = Small(tmp_path, 5.0)
    search.damage = {site.id: {Choice("channel", 8): 1e-3} for site in search.sites[1:]}
    timed = {site.id for site in search.sites[1:] if site.id.endswith("1")}

    def measured(name: str, choice: Choice) -> float | None:
        return search.times.estimate(name, choice) if name in timed or not choice.rank else None

    monkeypatch.setattr(search.times, "measured", measured)
    monkeypatch.setattr(search, "_late", lambda share: True)
    chosen = search.allocated(1.0)
    cheaper = {
        name
        for name in timed
        if search.times.estimate(name, Choice("channel", 8)) < search.times.estimate(name, Choice())
    }
    assert {name for name, option in chosen.items() if option.choice.rank} == cheaper != set()
    search.journal.record("evaluation", "a plan", {})
    asked: list[tuple[str, Choice]] = []
    monkeypatch.setattr(search.times, "measure", lambda wanted, check: (check(), asked.extend(wanted)))
    search.allocated(1.0)
    assert asked
    search.journal.close()


def test_a_reconstruction_is_foreseen(tmp_path: Path) -> None:
    """Only plans near the budget are reconstructed, and all that are delivered were evaluated so."""
    search = Small(tmp_path, 8.0)
    found = loop.run(search)
    assert found and search.expected_drop(found[0]) <= 8.0
    rows = search.tried()
    made = {json.dumps(row["plan"]) for row in rows if row["fit"] == "reconstructed"}
    assert 1 <= len(made) < len({json.dumps(row["plan"]) for row in rows})
    before = {json.dumps(row["plan"]): row["damage"] for row in rows if row["fit"] == "decomposed"}
    ratios = [
        math.log(row["damage"] / before[json.dumps(row["plan"])]) for row in rows if row["fit"] == "reconstructed"
    ]
    assert search._recovery.left == pytest.approx(
        math.exp((math.log(LEFT["reconstructed"]) / 4 + sum(ratios)) / (1 / 4 + len(ratios)))
    )
    search.journal.close()
