"""The search: tables of damage and time in, the fastest plan within the accuracy budget out.

    probe damages -> time dense -> [allocate for a damage limit -> time what it chose -> refit -> evaluate]

The outer loop looks for the largest damage limit whose refitted network keeps the budget on the selection split. It is
anytime: every network that kept the budget so far is an answer. Calibration and selection data only; the evaluation
split is not touched here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.calibrate import collect_fisher, collect_moments, predict
from tvm_lowrank.data import Splits
from tvm_lowrank.decompose import METHODS, Chain, Factors, Moments, cut, factorise
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.metric import Metric, accuracy, paired_drop
from tvm_lowrank.plan import DENSE, Choice, Plan
from tvm_lowrank.search import finetune
from tvm_lowrank.search.allocate import Option, allocate
from tvm_lowrank.search.candidates import candidates, site_macs
from tvm_lowrank.search.damage import DamageCurve, divergence, interpolated, probes
from tvm_lowrank.search.fitted import FittedNetworks
from tvm_lowrank.search.journal import Journal
from tvm_lowrank.search.reconstruct import reconstruct_if_better
from tvm_lowrank.search.refit import Target, dense_outputs, refit
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.synthetic import shrunk
from tvm_lowrank.training_data import Batches
from tvm_lowrank.transform import replace_sites

S = TypeVar("S")
T = TypeVar("T")

PROBE_IMAGES = 500
FIRST_LIMIT = 0.01  # nats: near the damage that costs a point, so that few steps are needed from here
STEP = 2.5  # factor between limits until one fails and one keeps the budget
CLOSE = 1.3  # factor between those two at which the loop ends: plans this near differ by a few percent in time
MOST_EVALUATIONS = 12
FINETUNED_STEP = 8.0  # factor from the limit that the reconstruction reaches to where the fine-tuning begins
MOST_FINETUNED = 4
BACK_OFF = 0.7  # factor on the limit after a plan failed on the evaluation split
LEAST_LIMIT, MOST_LIMIT = 1e-6, 10.0  # nats; beyond these nothing changes any more
REACH = 2.5  # times the budget: a plan that loses more after the refit is not saved by a reconstruction
MOST_ALLOCATIONS = 8  # for one limit; each times what it chose


class TimeUp(Exception):
    """The deadline of the search has passed."""


@dataclass(frozen=True)
class Settings:
    """What the user asked of the search."""

    budget: float  # points of the metric
    methods: tuple[str, ...]
    lanes: int  # ranks are multiples of this
    synthetic: bool = False  # the images stand in for data that there is not
    seed: int = 0
    deadline: float = math.inf  # time.monotonic() at which the search ends with what it has
    confident: bool = False  # the whole 95 % interval of the drop must be within the budget
    epochs: int = 0  # of fine-tuning with labels


@dataclass(frozen=True)
class Evaluated:
    """A plan whose refitted network was really evaluated on the selection split."""

    plan: Plan
    limit: float  # damage it was allocated for, nats
    predicted: float  # damage, nats
    damage: float  # measured after the refit, nats, on the selection images
    drop: float  # points, on the selection split; with `Settings.confident` the end of its interval
    ms: float  # sum over sites
    finetuned: bool = False


def plan_of(chosen: Mapping[str, Option]) -> Plan:
    """The plan of an allocation."""
    return Plan({name: option.choice for name, option in chosen.items() if option.choice.method != DENSE})


def _each(function: Callable[[S], T], items: Sequence[S], description: str) -> list[T]:
    """The function of every item, on all cores: linear algebra on one thread each."""
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        console.progress(description, len(items)) as advance,
    ):

        def done(item: S) -> T:
            result = function(item)
            advance()
            return result

        return list(pool.map(done, items))


class Search:
    """Everything that is known about one network under one target, computed when first needed.

    ``dense_latency`` measures the whole dense network, in ms; ``folder`` is where fitted networks are kept.
    ``training`` gives labelled batches for fine-tuning.
    """

    def __init__(
        self,
        mod: IRModule,
        splits: Splits,
        metric: Metric,
        times: SiteTimes,
        journal: Journal,
        settings: Settings,
        dense_latency: Callable[[], float] | None = None,
        folder: Path | None = None,
        training: Batches | None = None,
    ) -> None:
        self.mod = mod
        self.splits = splits
        self.metric = metric
        self.times = times
        self.journal = journal
        self.settings = settings
        self._dense_latency = dense_latency
        self.training = training
        self._folder = folder
        self.sites = find_sites(mod)
        self.damage: dict[str, dict[Choice, float]] = {}  # of every candidate, in nats, once `probe` was called
        self.seconds: dict[str, float] = {}  # by phase, of this process
        self._bridge = TorchBridge(mod)
        self._fitted = FittedNetworks(mod, folder)

    @cached_property
    def candidates(self) -> dict[str, list[Choice]]:
        """What each site may become, besides dense."""
        methods, lanes = self.settings.methods, self.settings.lanes
        return {site.id: candidates(site, methods=methods, lanes=lanes) for site in self.sites}

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Input statistics of the sites that have candidates, in the dense network."""
        wanted = [site for site in self.sites if self.candidates[site.id]]
        images = self.splits.calibration
        with console.progress("calibrating", len(images)) as advance:
            found = collect_moments(self._bridge, wanted, images, seed=self.settings.seed, advance=advance)
        return {name: shrunk(moments) for name, moments in found.items()} if self.settings.synthetic else found

    @cached_property
    def fisher(self) -> dict[str, np.ndarray]:
        """Fisher information of the outputs of the sites that have candidates, in the dense network."""
        wanted = [site for site in self.sites if self.candidates[site.id]]
        images = self.splits.calibration
        with console.progress("weighing errors", len(images)) as advance:
            return collect_fisher(self._bridge, wanted, images, seed=self.settings.seed, advance=advance)

    @cached_property
    def factors(self) -> dict[tuple[str, str], Factors]:
        """The factorisation of each (site, method) that has candidates."""
        sites = {site.id: site for site in self.sites}
        pairs = sorted({(name, choice.method) for name, choices in self.candidates.items() for choice in choices})
        moments, fisher = self.moments, self.fisher

        def factors(pair: tuple[str, str]) -> Factors:
            name, method = pair
            weight, spec = sites[name].weight, sites[name].spec
            return factorise(weight, spec, method=method, moments=moments[name], fisher=fisher[name])

        return dict(zip(pairs, _each(factors, pairs, "factorising"), strict=True))

    @cached_property
    def targets(self) -> dict[str, Target]:
        """What the dense network computes at every site with candidates, for the refit."""
        wanted = [site for site in self.sites if self.candidates[site.id]]
        return dense_outputs(self._bridge, wanted, self.splits.calibration, seed=self.settings.seed)

    @cached_property
    def dense_selection(self) -> np.ndarray:
        """The dense network's outputs on the selection images."""
        return predict(self._bridge, self.splits.selection[0])

    def single(self, name: str, choice: Choice) -> Chain:
        """The chain of one candidate, decomposed by itself."""
        assert choice.rank is not None
        weight, factors = self._site(name).weight, self.factors[name, choice.method]
        return cut(choice.method, factors, choice.rank, weight, self.moments[name])

    def _site(self, name: str) -> Site:
        return next(site for site in self.sites if site.id == name)

    def predicted(self, name: str) -> dict[Choice, float]:
        """Damage of a site's candidates to second order, in nats, before the refit."""
        site, found = self._site(name), {}

        def error(choice: Choice) -> float:
            assert choice.rank is not None
            return self.factors[name, choice.method].error(choice.rank)

        for method, group in groupby(self.candidates[name], key=lambda choice: choice.method):
            own = list(group)
            if METHODS[method].solves:
                errors = interpolated({choice: site_macs(site, choice) for choice in own}, error)
            else:
                errors = {choice: error(choice) for choice in own}
            found.update({choice: value / 2 for choice, value in errors.items()})
        return found

    @property
    def share(self) -> float:
        """An equal part of the first limit for each site with candidates, in nats."""
        return FIRST_LIMIT / max(1, sum(bool(choices) for choices in self.candidates.values()))

    def probe(self) -> None:
        """Predict the damage of every candidate, in nats, and correct that by a few real evaluations of each site."""
        images = self.splits.calibration[:PROBE_IMAGES]
        dense = predict(self._bridge, images)
        names = list(self.candidates)
        predicted = dict(zip(names, _each(self.predicted, names, "predicting damage"), strict=True))
        wanted = [(name, choice) for name, own in predicted.items() for choice in probes(own, self.share)]
        found: dict[str, dict[float, float]] = {}
        for name, choice in console.track(wanted, "probing damage"):
            self.check_time()

            def evaluate(name: str = name, choice: Choice = choice) -> float:
                changed = TorchBridge(replace_sites(self.mod, {name: self.single(name, choice)}))
                return divergence(dense, predict(changed, images))

            damage = self.journal.once("probe", f"{name} {choice}", evaluate)
            found.setdefault(name, {})[predicted[name][choice]] = damage
        curves = {name: DamageCurve.through(probed) for name, probed in found.items()}
        self.damage = {
            name: {choice: curves[name](value) for choice, value in own.items()} for name, own in predicted.items()
        }

    def options(self, damage: Mapping[str, Mapping[Choice, float]] | None = None) -> dict[str, list[Option]]:
        """Time and damage of everything that each site may become; times that were not measured are optimistic.

        ``damage`` is that of every candidate in nats, else what `probe` found.
        """
        known = self.damage if damage is None else damage
        damages = {name: {Choice(): 0.0, **own} for name, own in known.items()}
        times = self.times.estimates(damages)
        return {
            name: [Option(choice, times[name, choice], damage) for choice, damage in own.items()]
            for name, own in damages.items()
        }

    def _time(self, wanted: list[tuple[str, Choice]]) -> None:
        with console.timed(self.seconds, "tuning kernels"):
            self.times.measure(wanted, check=self.check_time)

    def allocated(
        self,
        limit: float,
        *,
        within: Literal["damage", "ms"] = "damage",
        damage: Mapping[str, Mapping[Choice, float]] | None = None,
    ) -> dict[str, Option]:
        """What `allocate` chooses from `options`, every part of it measured."""
        for _ in range(MOST_ALLOCATIONS):
            chosen = allocate(self.options(damage), limit, within=within)
            unknown = [(n, o.choice) for n, o in chosen.items() if self.times.measured(n, o.choice) is None]
            if not unknown:
                return chosen
            self._time(unknown)
        options = self.options(damage)
        known = {n: [o for o in own if self.times.measured(n, o.choice) is not None] for n, own in options.items()}
        return allocate(known, limit, within=within)

    def plan_for(self, limit: float) -> tuple[Plan, float, float]:
        """The fastest plan within a damage limit, every part of it measured: (plan, predicted damage, ms)."""

        def find() -> dict[str, Any]:
            chosen = self.allocated(limit)
            ms = sum(option.ms for option in chosen.values())
            return {"plan": plan_of(chosen).to_json(), "predicted": sum(o.damage for o in chosen.values()), "ms": ms}

        found = self.journal.once("plan", f"{limit:.9g}", find)
        plan = Plan.from_json(found["plan"])
        self._time(list(plan.items()))  # a resumed search knows them from the cache
        return plan, found["predicted"], found["ms"]

    def refitted(self, plan: Plan) -> IRModule:
        """The network of a plan, its chains fitted one after another."""

        def fit() -> IRModule:
            with console.progress("refitting", len(self.sites)) as advance:
                chains = refit(
                    self.mod,
                    self.sites,
                    plan,
                    self.splits.calibration,
                    self.targets,
                    fisher=self.fisher,
                    known=self.factors,
                    seed=self.settings.seed,
                    advance=advance,
                )
            return replace_sites(self.mod, chains)

        return self._fitted.once(plan, "refitted", fit)

    def reconstructed(self, plan: Plan) -> IRModule:
        """The network of a plan, all its parameters fitted together: the refitted one, or better.

        Which of the two is nearer to the dense network on the selection images is kept; labels are not looked at.
        """

        def fit() -> IRModule:
            refitted, (others, _) = self.refitted(plan), self.splits.selection
            images, seed = self.splits.calibration, self.settings.seed
            return reconstruct_if_better(self.mod, refitted, images, others, seed=seed)

        return self._fitted.once(plan, "reconstructed", fit)

    def _answers(self, mod: IRModule) -> np.ndarray:
        return predict(TorchBridge(mod), self.splits.selection[0])

    def evaluate(self, plan: Plan, limit: float, predicted: float, ms: float) -> Evaluated:
        """Fit a plan and evaluate it on the selection split, once.

        What keeps the budget after the refit would keep it after the reconstruction, and what is far outside would
        not: then the refitted network's figures are returned.
        """
        budget = self.settings.budget
        with console.timed(self.seconds, "fitting and evaluating plans"):
            found = self._judged(plan, "refitted", self.refitted)
            if plan and budget < found["drop"] <= REACH * budget:
                found = self._judged(plan, "reconstructed", self.reconstructed)
        return Evaluated(plan, limit, predicted, found["damage"], found["drop"], ms)

    def _judged(self, plan: Plan, how: str, fit: Callable[[Plan], IRModule]) -> dict[str, float]:
        """Drop in points and damage in nats of a fitted network on the selection images."""

        def compute() -> dict[str, float]:
            labels, logits = self.splits.selection[1], self._answers(fit(plan))
            before, after = self.metric.scores(self.dense_selection, labels), self.metric.scores(logits, labels)
            drop, interval = paired_drop(before, after)
            lost = interval[1] if self.settings.confident and plan else drop
            return {"drop": lost, "damage": divergence(self.dense_selection, logits)}

        return self.journal.once("evaluation", f"{how} {plan.to_json()}", compute)

    def finetuned(self, plan: Plan) -> IRModule:
        """The network of a plan, reconstructed and then trained with labels."""

        def fit() -> IRModule:
            assert self.training is not None and self._folder is not None
            bridge = TorchBridge(self.reconstructed(plan))
            settings = finetune.Settings(epochs=self.settings.epochs, plan=plan, seed=self.settings.seed)
            finetune.finetune(
                bridge,
                self.training,
                settings,
                teacher=self._bridge,
                judge=self._score,
                folder=self._folder,
            )
            return bridge.to_relax()

        return self._fitted.once(plan, "finetuned", fit)

    def _score(self, bridge: TorchBridge) -> float:
        """The metric of a network on the selection images, in percent."""
        images, labels = self.splits.selection
        return accuracy(self.metric.scores(predict(bridge, images), labels))

    def evaluate_finetuned(self, plan: Plan, limit: float, predicted: float, ms: float) -> Evaluated:
        """Fit, fine-tune and evaluate a plan on the selection split, once."""
        with console.timed(self.seconds, "fine-tuning plans"):
            found = self._judged(plan, "finetuned", self.finetuned)
        return Evaluated(plan, limit, predicted, found["damage"], found["drop"], ms, finetuned=True)

    def evaluate_reconstructed(self, plan: Plan, limit: float, predicted: float, ms: float) -> Evaluated:
        """Fit a plan as well as can be without labels and evaluate it on the selection split, once."""
        with console.timed(self.seconds, "fitting and evaluating plans"):
            found = self._judged(plan, "reconstructed", self.reconstructed)
        return Evaluated(plan, limit, predicted, found["damage"], found["drop"], ms)

    def best(self, plan: Plan) -> IRModule:
        """The network of a plan, fitted as well as can be: with labels if there are any."""
        if self.training is None:
            return self.reconstructed(plan)
        with console.timed(self.seconds, "fine-tuning plans"):
            return self.finetuned(plan)

    def network(self, evaluated: Evaluated) -> IRModule:
        """The network to deliver for a plan, fitted as well as can be."""
        return self.finetuned(evaluated.plan) if evaluated.finetuned else self.reconstructed(evaluated.plan)

    def prepare(self) -> None:
        """Predict the damage of all candidates, and time the dense network: the surrogate's first data."""
        with console.timed(self.seconds, "predicting damage"):
            self.probe()
        self.time_dense()

    def time_dense(self) -> float | None:
        """Time the dense network, the surrogate's first data; its measured ms end to end, if that can be measured."""
        console.phase("tuning the kernels of the dense network, then of the likeliest candidates")
        self._time([(site.id, Choice()) for site in self.sites])
        if self._dense_latency is None:
            return None
        with console.timed(self.seconds, "tuning kernels"):
            self.times.measure_others()
            ms = self.journal.once("dense", "ms", self._dense_latency)
            self.times.learn(Plan(), ms)
        return ms

    def unseen(self) -> tuple[Plan, float]:
        """Without data: the fastest plan whose predicted damage is that of the budget, and this damage in nats."""
        try:
            self.prepare()
            plan, predicted, _ = self.plan_for(self.settings.budget * FIRST_LIMIT)
        except TimeUp:
            console.warn("the time limit ends the search before there is a plan")
            return Plan(), 0.0
        return plan, predicted

    def run(self) -> list[Evaluated]:
        """Evaluated plans that kept the budget on the selection split, fastest first; perhaps none."""
        kept: list[Evaluated] = []
        try:
            self.prepare()
            self._explore(kept, self.evaluate, FIRST_LIMIT, MOST_EVALUATIONS)
            if self.training is not None:
                limit = max((result.limit for result in kept), default=FIRST_LIMIT)
                self._explore(kept, self.evaluate_finetuned, limit * FINETUNED_STEP, MOST_FINETUNED)
        except TimeUp:
            console.warn("the time limit ends the search early; the best plan so far is kept")
        return sorted(kept, key=lambda e: e.ms)

    def milder(self, than: Evaluated, kept: Sequence[Evaluated]) -> Evaluated | None:
        """The next plan of less damage that keeps the budget on the selection split; None when only dense is left.

        ``kept`` are those found so far, fastest first. After a few fine-tuned ones come those that are not.
        """
        limit = than.limit * BACK_OFF
        for other in kept:
            if other.finetuned == than.finetuned and other.limit <= limit:
                return other
        judge = self.evaluate_finetuned if than.finetuned else self.evaluate
        least = than.limit * BACK_OFF**MOST_FINETUNED if than.finetuned else LEAST_LIMIT
        try:
            while limit > least:
                result = judge(*self.placed(limit))
                if not result.plan:
                    break
                if result.plan != than.plan and result.drop <= self.settings.budget:
                    return result
                limit *= BACK_OFF
        except TimeUp:
            pass
        return next((other for other in kept if not other.finetuned), None) if than.finetuned else None

    def _explore(
        self,
        kept: list[Evaluated],
        evaluate: Callable[[Plan, float, float, float], Evaluated],
        limit: float,
        most: int,
    ) -> None:
        """Look for the largest damage limit that keeps the budget; plans that keep it are appended to `kept`.

        It begins at `limit`, and ends after `most` evaluations.
        """
        below, above = 0.0, math.inf
        for count in range(1, most + 1):
            self.check_time()
            result = evaluate(*self.placed(limit))
            inside = result.drop <= self.settings.budget
            console.phase(
                f"plan {count}: convolutions {self.dense_ms / result.ms:.2f}x faster, "
                f"selection drop {result.drop:+.2f} points, {'kept' if inside else 'over budget'}"
            )
            if inside:
                if result.plan:
                    kept.append(result)
                below = limit
                if self.is_fastest(result):
                    return
            else:
                above = limit
            if above / max(below, 1e-12) < CLOSE or limit < LEAST_LIMIT or limit > MOST_LIMIT:
                return
            limit = limit * STEP if math.isinf(above) else limit / STEP if below == 0 else math.sqrt(below * above)

    def check_time(self) -> None:
        """Raise TimeUp once the deadline has passed."""
        if time.monotonic() > self.settings.deadline:
            raise TimeUp

    def placed(self, limit: float) -> tuple[Plan, float, float, float]:
        """`plan_for`, in the form that the evaluations take: (plan, limit, predicted damage, ms)."""
        plan, predicted, ms = self.plan_for(limit)
        return plan, limit, predicted, ms

    def is_fastest(self, evaluated: Evaluated) -> bool:
        """Whether every site has its fastest option, whatever its damage, by what was known when it was first asked."""

        def compare() -> bool:
            fastest = sum(min(option.ms for option in options) for options in self.options().values())
            return bool(evaluated.ms <= 1.001 * fastest)

        return self.journal.once("fastest", f"{evaluated.limit:.9g}", compare)

    @property
    def dense_ms(self) -> float:
        """Sum of the dense sites' times."""
        return sum(self.times.estimate(site.id, Choice()) for site in self.sites)
