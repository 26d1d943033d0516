"""The search: tables of damage and time in, the fastest plan within the accuracy budget out.

    probe damages -> time candidates -> [allocate for a damage limit -> time -> refit -> evaluate] for several limits

The outer loop looks for the largest damage limit whose refitted network keeps the budget on the selection split. It is
anytime: every network that kept the budget so far is an answer. Calibration and selection data only; the evaluation
split is not touched here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.calibrate import collect_moments, predict
from tvm_lowrank.data import Splits
from tvm_lowrank.decompose import METHODS, Chain, Factors, Moments, Rank, cut, grouped
from tvm_lowrank.decompose.moments import output_power
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.metric import Metric
from tvm_lowrank.plan import DENSE, Choice, Plan
from tvm_lowrank.search.allocate import Option, allocate
from tvm_lowrank.search.candidates import candidates
from tvm_lowrank.search.damage import DamageCurve, divergence, probe_ranks
from tvm_lowrank.search.journal import Journal
from tvm_lowrank.search.refit import Target, dense_outputs, refit
from tvm_lowrank.search.times import SiteTimes
from tvm_lowrank.transform import replace_sites

PROBE_IMAGES = 500
FIRST_LIMIT = 0.01  # nats: near the damage that costs a point, so that few steps are needed from here
ANCHORS = (0.3, 3.0)  # candidates are timed where a site takes these shares of an equal part of the first limit
STEP = 2.5  # factor between limits until one fails and one keeps the budget
CLOSE = 1.3  # factor between those two at which the loop ends: plans this near differ by a few percent in time
MOST_EVALUATIONS = 12
BACK_OFF = 0.7  # factor on the limit after a plan failed on the evaluation split
LEAST_LIMIT, MOST_LIMIT = 1e-6, 10.0  # nats; beyond these nothing changes any more
MOST_ALLOCATIONS = 5  # for one limit; each times what it chose


class _TimeUp(Exception):
    """The deadline has passed."""


@dataclass(frozen=True)
class Settings:
    """What the user asked of the search."""

    budget: float  # points of the metric
    methods: tuple[str, ...]
    lanes: int  # ranks are multiples of this
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
    """Everything that is known about one network under one target, computed when first needed."""

    def __init__(
        self,
        mod: IRModule,
        splits: Splits,
        metric: Metric,
        times: SiteTimes,
        journal: Journal,
        settings: Settings,
    ) -> None:
        self.mod = mod
        self.splits = splits
        self.metric = metric
        self.times = times
        self.journal = journal
        self.settings = settings
        self.sites = find_sites(mod)
        self.damage: dict[str, dict[Choice, float]] = {}  # of every candidate, in nats, once `probe` was called
        self.seconds: dict[str, float] = {}  # by phase, of this process
        self._bridge = TorchBridge(mod)

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
            return collect_moments(self._bridge, wanted, images, seed=self.settings.seed, advance=advance)

    @cached_property
    def factors(self) -> dict[tuple[str, str], Factors]:
        """The factorisation of each (site, method) that has candidates."""
        sites = {site.id: site for site in self.sites}
        pairs = sorted({(name, choice.method) for name, choices in self.candidates.items() for choice in choices})
        return {
            (name, method): METHODS[method].factorise(sites[name].weight, sites[name].spec, self.moments[name])
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
        """The chain of one candidate, with the dense network's moments."""
        assert choice.rank is not None
        weight, factors = self._site(name).weight, self.factors[name, choice.method]
        return cut(choice.method, factors, choice.rank, weight, self.moments[name])

    def _site(self, name: str) -> Site:
        return next(site for site in self.sites if site.id == name)

    def _error(self, name: str, choice: Choice) -> float:
        """Expected squared output error of a candidate, before the refit."""
        assert choice.rank is not None
        return self.factors[name, choice.method].error(choice.rank)

    def _probe_ranks(self, name: str, method: str, factors: Factors) -> list[Rank]:
        site = self._site(name)
        ranks = [c.rank for c in self.candidates[name] if c.method == method and c.rank is not None]
        power = output_power(grouped(site.weight, site.spec), self.moments[name])
        return probe_ranks(factors, ranks, power)

    def probe(self) -> None:
        """Predict the damage of every candidate, in nats, from a few real evaluations."""
        images = self.splits.calibration[:PROBE_IMAGES]
        dense = predict(self._bridge, images)
        probes: dict[tuple[str, str], dict[float, float]] = {}
        wanted = [
            (name, Choice(method, rank))
            for (name, method), factors in self.factors.items()
            for rank in self._probe_ranks(name, method, factors)
        ]
        for name, choice in console.track(wanted, "probing damage"):
            self._check_time()

            def evaluate(name: str = name, choice: Choice = choice) -> float:
                changed = TorchBridge(replace_sites(self.mod, {name: self.single(name, choice)}))
                return divergence(dense, predict(changed, images))

            error = self._error(name, choice)
            found = self.journal.once("probe", f"{name} {choice}", evaluate)
            probes.setdefault((name, choice.method), {})[error] = found
        curves = {pair: DamageCurve.through(found) for pair, found in probes.items()}
        self.damage = {
            name: {c: curves[name, c.method](self._error(name, c)) for c in choices}
            for name, choices in self.candidates.items()
        }

    def options(self) -> dict[str, list[Option]]:
        """Time and damage of everything that each site may become."""
        return {
            name: [Option(Choice(), self.times.estimate(name, Choice()), 0.0)]
            + [Option(choice, self.times.estimate(name, choice), damage) for choice, damage in damages.items()]
            for name, damages in self.damage.items()
        }

    def time_anchors(self) -> None:
        """Time every site dense, and each of its methods at the ranks that a plan is likely to use."""
        share = FIRST_LIMIT / max(1, sum(bool(choices) for choices in self.candidates.values()))
        wanted = [(site.id, Choice()) for site in self.sites]
        for name, damages in self.damage.items():
            for method in sorted({choice.method for choice in damages}):
                own = [(choice, damage) for choice, damage in damages.items() if choice.method == method]
                wanted += [
                    (name, min(own, key=lambda pair: abs(math.log(pair[1] / (anchor * share))))[0])
                    for anchor in ANCHORS
                ]
        self._time(wanted)

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

    def chains(self, plan: Mapping[str, Choice]) -> dict[str, Chain]:
        """The refitted chains of a plan."""
        with console.progress("refitting", len(self.sites)) as advance:
            images, seed = self.splits.calibration, self.settings.seed
            return refit(self.mod, self.sites, plan, images, self.targets, seed=seed, advance=advance)

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

    def run(self) -> list[Evaluated]:
        """Evaluated plans that kept the budget on the selection split, fastest first; perhaps none."""
        kept: list[Evaluated] = []
        try:
            with console.timed(self.seconds, "predicting damage"):
                self.probe()
            console.phase("tuning the kernels of the likeliest candidates")
            self.time_anchors()
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
