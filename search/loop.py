"""The search: tables of damage and time in, the fastest plan within the accuracy budget out.

    probe damages -> time dense -> [allocate for a damage limit -> time what it chose -> refit -> evaluate]

The outer loop looks for the largest damage limit whose refitted network keeps the budget on the selection split. It is
anytime: every network that kept the budget so far is an answer. Calibration and selection data only; the evaluation
split is not touched here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.calibrate import collect_fisher, collect_moments, predict
from tvm_lowrank.data import Splits
from tvm_lowrank.decompose import Chain, Factors, Moments, cut, factorise
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.metric import Metric
from tvm_lowrank.plan import DENSE, Choice, Plan
from tvm_lowrank.search.allocate import Option, allocate
from tvm_lowrank.search.candidates import candidates
from tvm_lowrank.search.damage import DamageCurve, divergence, probes
from tvm_lowrank.search.journal import Journal
from tvm_lowrank.search.refit import Target, dense_outputs, refit
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.synthetic import shrunk
from tvm_lowrank.transform import replace_sites

PROBE_IMAGES = 500
FIRST_LIMIT = 0.01  # nats: near the damage that costs a point, so that few steps are needed from here
STEP = 2.5  # factor between limits until one fails and one keeps the budget
CLOSE = 1.3  # factor between those two at which the loop ends: plans this near differ by a few percent in time
MOST_EVALUATIONS = 12
BACK_OFF = 0.7  # factor on the limit after a plan failed on the evaluation split
LEAST_LIMIT, MOST_LIMIT = 1e-6, 10.0  # nats; beyond these nothing changes any more
MOST_ALLOCATIONS = 8  # for one limit; each times what it chose


class _TimeUp(Exception):
    """The deadline has passed."""


@dataclass(frozen=True)
class Settings:
    """What the user asked of the search."""

    budget: float  # points of the metric
    methods: tuple[str, ...]
    lanes: int  # ranks are multiples of this
    synthetic: bool = False  # the images stand in for data that there is not
    seed: int = 0
    deadline: float = math.inf  # time.monotonic() at which the search ends with what it has


@dataclass(frozen=True)
class Evaluated:
    """A plan whose refitted network was really evaluated on the selection split."""

    plan: Plan
    limit: float  # damage it was allocated for, nats
    predicted: float  # damage, nats
    damage: float  # measured after the refit, nats, on the selection images
    drop: float  # points, on the selection split
    ms: float  # sum over sites


class Search:
    """Everything that is known about one network under one target, computed when first needed.

    ``dense_latency`` measures the whole dense network, in ms.
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
    ) -> None:
        self.mod = mod
        self.splits = splits
        self.metric = metric
        self.times = times
        self.journal = journal
        self.settings = settings
        self._dense_latency = dense_latency
        self.sites = find_sites(mod)
        self.damage: dict[str, dict[Choice, float]] = {}  # of every candidate, in nats, once `probe` was called
        self.seconds: dict[str, float] = {}  # by phase, of this process
        self._bridge = TorchBridge(mod)
        self._fitted: dict[str, dict[str, Chain]] = {}

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
        return {
            (name, method): factorise(
                sites[name].weight,
                sites[name].spec,
                method=method,
                moments=self.moments[name],
                fisher=self.fisher[name],
            )
            for name, method in console.track(pairs, "factorising")
        }

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
        return {
            choice: self.factors[name, choice.method].error(choice.rank) / 2
            for choice in self.candidates[name]
            if choice.rank is not None
        }

    @property
    def share(self) -> float:
        """An equal part of the first limit for each site with candidates, in nats."""
        return FIRST_LIMIT / max(1, sum(bool(choices) for choices in self.candidates.values()))

    def probe(self) -> None:
        """Predict the damage of every candidate, in nats, and correct that by a few real evaluations of each site."""
        images = self.splits.calibration[:PROBE_IMAGES]
        dense = predict(self._bridge, images)
        predicted = {name: self.predicted(name) for name in self.candidates}
        wanted = [(name, choice) for name, own in predicted.items() for choice in probes(own, self.share)]
        found: dict[str, dict[float, float]] = {}
        for name, choice in console.track(wanted, "probing damage"):
            self._check_time()

            def evaluate(name: str = name, choice: Choice = choice) -> float:
                changed = TorchBridge(replace_sites(self.mod, {name: self.single(name, choice)}))
                return divergence(dense, predict(changed, images))

            damage = self.journal.once("probe", f"{name} {choice}", evaluate)
            found.setdefault(name, {})[predicted[name][choice]] = damage
        curves = {name: DamageCurve.through(probed) for name, probed in found.items()}
        self.damage = {
            name: {choice: curves[name](value) for choice, value in own.items()} for name, own in predicted.items()
        }

    def options(self) -> dict[str, list[Option]]:
        """Time and damage of everything that each site may become; times that were not measured are optimistic."""
        damages = {name: {Choice(): 0.0, **own} for name, own in self.damage.items()}
        times = self.times.estimates(damages)
        return {
            name: [Option(choice, times[name, choice], damage) for choice, damage in own.items()]
            for name, own in damages.items()
        }

    def _time(self, wanted: list[tuple[str, Choice]]) -> None:
        with console.timed(self.seconds, "tuning kernels"):
            self.times.measure(wanted, check=self._check_time)

    def plan_for(self, limit: float) -> tuple[Plan, float, float]:
        """The fastest plan within a damage limit, every part of it measured: (plan, predicted damage, ms)."""
        for _ in range(MOST_ALLOCATIONS):
            chosen = allocate(self.options(), limit)
            unknown = [(n, o.choice) for n, o in chosen.items() if self.times.measured(n, o.choice) is None]
            if not unknown:
                break
            self._time(unknown)
        plan = Plan({name: option.choice for name, option in chosen.items() if option.choice.method != DENSE})
        ms = sum(self.times.estimate(name, option.choice) for name, option in chosen.items())
        return plan, sum(option.damage for option in chosen.values()), ms

    def chains(self, plan: Plan) -> dict[str, Chain]:
        """The refitted chains of a plan, fitted once."""
        key = plan.to_json()
        if key not in self._fitted:
            with console.progress("refitting", len(self.sites)) as advance:
                self._fitted[key] = refit(
                    self.mod,
                    self.sites,
                    plan,
                    self.splits.calibration,
                    self.targets,
                    fisher=self.fisher,
                    seed=self.settings.seed,
                    advance=advance,
                )
        return self._fitted[key]

    def evaluate(self, plan: Plan, limit: float, predicted: float, ms: float) -> Evaluated:
        """Refit a plan and evaluate it on the selection split, once."""

        def compute() -> dict[str, float]:
            images, labels = self.splits.selection
            logits = predict(TorchBridge(replace_sites(self.mod, self.chains(plan))), images)
            lost = self.metric.scores(self.dense_selection, labels) - self.metric.scores(logits, labels)
            return {"drop": 100 * float(np.mean(lost)), "damage": divergence(self.dense_selection, logits)}

        with console.timed(self.seconds, "refitting and evaluating plans"):
            found = self.journal.once("evaluation", plan.to_json(), compute)
        return Evaluated(plan, limit, predicted, found["damage"], found["drop"], ms)

    def prepare(self) -> None:
        """Predict the damage of all candidates, and time the dense network: the surrogate's first data."""
        with console.timed(self.seconds, "predicting damage"):
            self.probe()
        console.phase("tuning the kernels of the dense network, then of the likeliest candidates")
        self._time([(site.id, Choice()) for site in self.sites])
        if self._dense_latency is not None:
            with console.timed(self.seconds, "tuning kernels"):
                self.times.measure_others()
                self.times.learn(Plan(), self.journal.once("dense", "ms", self._dense_latency))

    def unseen(self) -> tuple[Plan, float]:
        """Without data: the fastest plan whose predicted damage is that of the budget, and this damage in nats."""
        try:
            self.prepare()
            plan, predicted, _ = self.plan_for(self.settings.budget * FIRST_LIMIT)
        except _TimeUp:
            console.warn("the time limit ends the search before there is a plan")
            return Plan(), 0.0
        return plan, predicted

    def run(self) -> list[Evaluated]:
        """Evaluated plans that kept the budget on the selection split, fastest first; perhaps none."""
        kept: list[Evaluated] = []
        try:
            self.prepare()
            self._explore(kept)
        except _TimeUp:
            console.warn("the time limit ends the search early; the best plan so far is kept")
        return sorted(kept, key=lambda e: e.ms)

    def milder(self, than: Evaluated) -> Evaluated | None:
        """The next plan of less damage that keeps the budget on the selection split; None when only dense is left."""
        limit = than.limit * BACK_OFF
        try:
            while limit > LEAST_LIMIT:
                result = self.evaluate(*self._placed(limit))
                if not result.plan:
                    return None
                if result.plan != than.plan and result.drop <= self.settings.budget:
                    return result
                limit *= BACK_OFF
        except _TimeUp:
            pass
        return None

    def _explore(self, kept: list[Evaluated]) -> None:
        """Look for the largest damage limit that keeps the budget; plans that keep it are appended to `kept`."""
        limit, below, above = FIRST_LIMIT, 0.0, math.inf
        for count in range(1, MOST_EVALUATIONS + 1):
            self._check_time()
            result = self.evaluate(*self._placed(limit))
            inside = result.drop <= self.settings.budget
            console.phase(
                f"plan {count}: convolutions {self.dense_ms / result.ms:.2f}x faster, "
                f"selection drop {result.drop:+.2f} points, {'kept' if inside else 'over budget'}"
            )
            if inside:
                if result.plan:
                    kept.append(result)
                below = limit
                if result.ms <= 1.001 * self._fastest_ms:
                    return
            else:
                above = limit
            if above / max(below, 1e-12) < CLOSE or limit < LEAST_LIMIT or limit > MOST_LIMIT:
                return
            limit = limit * STEP if math.isinf(above) else limit / STEP if below == 0 else math.sqrt(below * above)

    def _check_time(self) -> None:
        if time.monotonic() > self.settings.deadline:
            raise _TimeUp

    def _placed(self, limit: float) -> tuple[Plan, float, float, float]:
        plan, predicted, ms = self.plan_for(limit)
        return plan, limit, predicted, ms

    @property
    def _fastest_ms(self) -> float:
        """Sum of the times of each site's fastest option, whatever its damage."""
        return sum(min(option.ms for option in options) for options in self.options().values())

    @property
    def dense_ms(self) -> float:
        """Sum of the dense sites' times."""
        return sum(self.times.estimate(site.id, Choice()) for site in self.sites)
