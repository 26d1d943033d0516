"""The search: tables of damage and time in, the fastest plan within the accuracy budget out.

    probe damages -> time dense -> [allocate for a damage limit -> time what it chose -> fit -> evaluate]

The outer loop looks for the largest damage limit whose fitted network keeps the budget on the selection split; what it
evaluates tells where that limit is (`tvm_lowrank.searching.choose.drops`). It is anytime: every network that kept the
budget so far is an answer. Calibration and selection data only; the evaluation split is not touched here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.metric import Metric, accuracy, paired_drop
from tvm_lowrank.data.splits import Splits
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.graph import find_sites
from tvm_lowrank.plan import DENSE, Choice, Plan
from tvm_lowrank.searching.choose.allocate import Option, allocate
from tvm_lowrank.searching.choose.drops import LEFT, POWER, Counted, Rate, Recovery, limit_for
from tvm_lowrank.searching.choose.networks import Fit, Networks, Training
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.searching.fit.finetune import Judged
from tvm_lowrank.searching.journal import Journal
from tvm_lowrank.searching.latency.times import SiteTimes

FIRST_LIMIT = 0.01  # nats: near the damage that costs a point, so that few steps are needed from here
FARTHEST = 6.0  # factor from the limits that were tried to the next one
AIM = 0.9  # part of the budget at which plans are aimed
NEAR = 0.8  # part of the budget from which the loop ends: a plan that spends all of it is a few percent faster
APART = 1.15  # least factor between limits that are tried: plans nearer than that differ by two percent in time
MOST_EVALUATIONS = 12
FINETUNED_STEP = 1.5  # from the limit that the reconstruction reaches: two epochs took 26 to 32 % of a plan's damage
MOST_FINETUNED = 4
BACK_OFF = 0.7  # factor on the limit after a plan failed on the evaluation split
LEAST_LIMIT, MOST_LIMIT = 1e-6, 10.0  # nats; beyond these nothing changes any more
INTERVAL = 2 * NormalDist().inv_cdf(0.975)  # length of a 95 % interval, in standard errors
REACH = 1.25  # times the budget: a plan that is foreseen to lose more when it is recovered is not recovered
MOST_ALLOCATIONS = 8  # for one limit; each times what it chose
# parts of the time limit after which probing ends, and tuning for the first plan, with what is known then
PROBING_ENDS, FIRST_TUNING_ENDS = 0.4, 0.55
MOST_LATE = 4  # plans that are evaluated as they are decomposed when the time is up and nothing was kept


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


@dataclass(frozen=True)
class Placed:
    """The fastest plan within a damage limit, by what was known; every part of it is measured."""

    plan: Plan
    limit: float  # nats
    predicted: float  # damage, nats
    ms: float  # sum over sites


@dataclass(frozen=True)
class Evaluated(Placed):
    """A plan whose fitted network was really evaluated on the selection split."""

    damage: float  # measured, nats, on the selection images
    drop: float  # counted, points, on the selection split
    error: float  # standard error of the drop, points
    fit: Fit

    @property
    def placed(self) -> Placed:
        """The plan, as it was before it was evaluated in this way."""
        return Placed(self.plan, self.limit, self.predicted, self.ms)

    @property
    def finetuned(self) -> bool:
        return self.fit == "finetuned"

    @property
    def counted(self) -> Counted:
        return Counted(self.damage, self.drop, self.error)


def plan_of(chosen: Mapping[str, Option]) -> Plan:
    """The plan of an allocation."""
    return Plan({name: option.choice for name, option in chosen.items() if option.choice.method != DENSE})


def _placed(limit: float, chosen: Mapping[str, Option]) -> Placed:
    options = chosen.values()
    return Placed(plan_of(chosen), limit, sum(o.damage for o in options), sum(o.ms for o in options))


class Search:
    """Everything that is known about one network under one target, computed when first needed.

    ``dense_latency`` measures the whole dense network, in ms; ``folder`` is where fitted networks are kept, and
    ``scratch`` where what is known of the sites may wait.
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
        training: Training | None = None,
        scratch: Path | None = None,
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
        self._begun = time.monotonic()
        self._rate = Rate()
        self.sensitivity = Sensitivity(
            mod,
            splits.calibration,
            methods=settings.methods,
            lanes=settings.lanes,
            share=FIRST_LIMIT,
            synthetic=settings.synthetic,
            seed=settings.seed,
            folder=scratch,
        )
        self.networks = Networks(
            self.sensitivity,
            splits.selection[0],
            self._judged,
            folder=folder,
            training=training,
            deadline=settings.deadline,
        )
        self._recovery = Recovery(LEFT[self.networks.recovery])

    @cached_property
    def dense_selection(self) -> np.ndarray:
        """The dense network's outputs on the selection images."""
        return self._answers(self.mod)

    def probe(self) -> None:
        """Find the damage of every candidate."""
        with console.timed(self.seconds, "predicting damage"):
            enough = partial(self._late, PROBING_ENDS)
            self.damage = self.sensitivity.probe(self.journal, self.check_time, enough)

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

    def _time(self, wanted: list[tuple[str, Choice]], check: Callable[[], None] | None = None) -> None:
        with console.timed(self.seconds, "tuning kernels"):
            self.times.measure(wanted, check=check or self.check_time)

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
            try:
                self._time(unknown, self._check_first_tuning)
            except TimeUp:
                self.check_time()
                break
        return allocate(self._measured(damage), limit, within=within)

    def _measured(self, damage: Mapping[str, Mapping[Choice, float]] | None = None) -> dict[str, list[Option]]:
        """Those of the `options` whose time was measured."""
        options = self.options(damage)
        return {n: [o for o in own if self.times.measured(n, o.choice) is not None] for n, own in options.items()}

    def placed(self, limit: float) -> Placed:
        """The fastest plan within a damage limit."""

        def find() -> dict[str, Any]:
            found = _placed(limit, self.allocated(limit))
            return {"plan": found.plan.to_json(), "predicted": found.predicted, "ms": found.ms}

        found = self.journal.once("plan", f"{limit:.9g}", find)
        plan = Plan.from_json(found["plan"])
        self._time(list(plan.items()))  # a resumed search knows them from the cache
        return Placed(plan, limit, found["predicted"], found["ms"])

    def evaluate(self, placed: Placed, fit: Fit) -> Evaluated:
        """Fit a plan in this way and evaluate it on the selection split, once."""
        training = self.networks.training
        how = f"{fit}, {training.name}," if fit == "finetuned" and training is not None else fit

        def judge() -> dict[str, Any]:
            labels, logits = self.splits.selection[1], self._answers(self.networks(placed.plan, fit))
            before, after = self.metric.scores(self.dense_selection, labels), self.metric.scores(logits, labels)
            drop, interval = paired_drop(before, after)
            error = (interval[1] - interval[0]) / INTERVAL
            return {
                "plan": json.loads(placed.plan.to_json()),
                "fit": fit,
                "ms": placed.ms,
                "predicted": placed.predicted,
                "damage": divergence(self.dense_selection, logits),
                "drop": drop,
                "error": error,
            }

        doing = "fine-tuning plans" if fit == "finetuned" else "fitting and evaluating plans"
        with console.timed(self.seconds, doing):
            network = f"{how} {placed.plan.to_json()}"
            found = self.journal.once("evaluation", network, judge)
        result = Evaluated(**vars(placed), damage=found["damage"], drop=found["drop"], error=found["error"], fit=fit)
        if placed.plan:
            self._rate.learn(network, result.counted)
        if fit in LEFT:
            before = self.journal.get("evaluation", f"decomposed {placed.plan.to_json()}")
            if before is not None:
                self._recovery.learn(network, before["damage"], result.damage)
        return result

    def tried(self) -> list[dict[str, Any]]:
        """The manifest's ``plans``: all that the journal has as evaluated; what each is expected to lose, all tell."""
        rows = [row for row in self.journal.of_kind("evaluation").values() if row["plan"]["sites"]]
        rate, counted = Rate(), [Counted(row["damage"], row["drop"], row["error"]) for row in rows]
        for row, own in zip(rows, counted, strict=True):
            rate.learn(f"{row['fit']} {row['plan']}", own)
        return [{**row, "expected": rate.expected(own)} for row, own in zip(rows, counted, strict=True)]

    def expected_drop(self, result: Evaluated) -> float:
        """Points that a network loses, by all that was evaluated so far; the end of the interval if `confident`."""
        return self._rate.expected(result.counted) + self._margin(result)

    def _margin(self, result: Evaluated) -> float:
        """Points that the budget must cover beside the expected ones."""
        return INTERVAL / 2 * result.error if self.settings.confident and result.plan else 0.0

    def _keeps(self, result: Evaluated) -> bool:
        """Whether a network is expected to keep the budget."""
        return self.expected_drop(result) <= self._budget

    @property
    def _budget(self) -> float:
        """Points; less than half an image of the selection split is nothing."""
        return max(self.settings.budget, 50 / max(1, len(self.splits.selection[1])))

    def evaluate_shortly(self, placed: Placed) -> Evaluated:
        """Evaluate a plan without labels, as far as its verdict needs it.

        As it is decomposed, it is quickly evaluated; that tells what it will lose when it is recovered. Where this is
        near the budget the plan is recovered and evaluated again.
        """
        found = self.evaluate(placed, "decomposed")
        if placed.plan and NEAR * self._budget <= self._foreseen_drop(found) <= REACH * self._budget:
            with suppress(TimeUp):
                return self.evaluate(placed, self.networks.recovery)
        return found

    def _foreseen(self, result: Evaluated) -> float:
        """The damage of what is delivered for a plan, in nats, if it was not recovered yet."""
        return result.damage * (self._recovery.left if result.fit == "decomposed" else 1.0)

    def _foreseen_drop(self, result: Evaluated) -> float:
        """Points that what is delivered for a plan loses, as in `expected_drop`."""
        if result.fit != "decomposed" or not result.plan:
            return self.expected_drop(result)
        damage = self._foreseen(result)
        return self._rate.value * max(damage, 0.0) ** POWER + self._margin(result)

    def network(self, plan: Plan, fit: Fit) -> IRModule:
        """The network to deliver for a plan that was evaluated after this fit: recovered, if there is time."""
        doing = "fine-tuning plans" if fit == "finetuned" else "fitting and evaluating plans"
        with console.timed(self.seconds, doing):
            try:
                return self.networks(plan, self.networks.recovery if fit == "decomposed" else fit)
            except TimeUp:
                return self.networks(plan, fit)

    def _answers(self, mod: IRModule) -> np.ndarray:
        return predict(TorchBridge(mod), self.splits.selection[0])

    def _judged(self, bridge: TorchBridge) -> Judged:
        """A network on the selection split."""
        images, labels = self.splits.selection
        logits = predict(bridge, images)
        return Judged(divergence(self.dense_selection, logits), accuracy(self.metric.scores(logits, labels)))

    def prepare(self) -> None:
        """Find the damage of all candidates, and time the dense network: the surrogate's first data."""
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
            found = self.placed(self.settings.budget * FIRST_LIMIT)
        except TimeUp:
            console.warn("the time limit ends the search before there is a plan")
            return Plan(), 0.0
        return found.plan, found.predicted

    def run(self) -> list[Evaluated]:
        """Evaluated plans that kept the budget on the selection split, fastest first; perhaps none."""
        kept: list[Evaluated] = []
        try:
            self.prepare()
            self._explore(kept, self.evaluate_shortly, FIRST_LIMIT, MOST_EVALUATIONS)
            if self.networks.training is not None:
                limit = max((result.limit for result in kept), default=FIRST_LIMIT)
                finetuned = partial(self.evaluate, fit="finetuned")
                self._explore(kept, finetuned, limit * FINETUNED_STEP, MOST_FINETUNED)
        except TimeUp:
            console.warn("the time limit ends the search early; the best plan so far is kept")
            kept = kept or self._late_plan()
        return sorted(kept, key=lambda e: e.ms)

    def _late_plan(self) -> list[Evaluated]:
        """A plan that keeps the budget as it is decomposed, which takes no long fit; perhaps none.

        It is made of what was timed; its limit follows from what was evaluated before, if anything was.
        """
        if not self.damage:
            return []
        limit, known = FIRST_LIMIT, dict[float, float]()
        for _ in range(MOST_LATE):
            placed = _placed(limit, allocate(self._measured(), limit))
            if not placed.plan:
                break
            result = self.evaluate(placed, "decomposed")
            if self._keeps(result):
                return [result]
            known[limit] = result.damage
            goal = self._rate.damage(AIM * self._budget - self._margin(result))
            limit = min(limit_for(goal, known, least=LEAST_LIMIT, most=MOST_LIMIT), limit / 2)
        return []

    def milder(self, than: Evaluated, kept: Sequence[Evaluated]) -> Evaluated | None:
        """The next plan of less damage that keeps the budget on the selection split; None when only dense is left.

        ``kept`` are those found so far, fastest first. After a few fine-tuned ones come those that are not.
        """
        limit = than.limit * BACK_OFF
        known = [other for other in kept if other.finetuned == than.finetuned and other.limit <= limit]
        judge = partial(self.evaluate, fit="finetuned") if than.finetuned else self.evaluate_shortly
        least = than.limit * BACK_OFF**MOST_FINETUNED if than.finetuned else LEAST_LIMIT
        try:
            while limit > least:
                near = next((other for other in known if other.limit > limit * BACK_OFF), None)
                if near is not None:
                    return near
                placed = self.placed(limit)
                result = judge(placed)
                if not result.plan:
                    break
                if result.fit == "decomposed" and not self._keeps(result):
                    result = self.evaluate(placed, self.networks.recovery)
                if result.plan != than.plan and self._keeps(result):
                    return result
                limit *= BACK_OFF
        except TimeUp:
            if known:
                return known[0]
        return next((other for other in kept if not other.finetuned), None) if than.finetuned else None

    def _explore(self, kept: list[Evaluated], evaluate: Callable[[Placed], Evaluated], limit: float, most: int) -> None:
        """Look for the largest damage limit that keeps the budget; `kept` receives the plans that do.

        It begins at `limit`, and ends after `most` evaluations.
        """
        before = list(kept)
        tried: list[Evaluated] = []

        def learn(result: Evaluated) -> None:
            tried.append(result)
            kept[:] = [*before, *(own for own in tried if own.plan and self._keeps(own))]

        for _ in range(most):
            self.check_time()
            result = evaluate(self.placed(limit))
            learn(result)
            inside = [own for own in tried if self._foreseen_drop(own) <= self._budget]
            foreseen = " when it is recovered" if result.fit == "decomposed" else ""
            verdict = "kept" if result in inside else "over budget"
            said = f"expected {self._foreseen_drop(result):+.2f}{foreseen}, {verdict}"
            console.tried(self.dense_ms / result.ms, result.drop, said)
            if result in inside and self.is_fastest(result):
                break
            if any(own.fit != "decomposed" and self.expected_drop(own) >= NEAR * self._budget for own in inside):
                break
            limit = self._next_limit(tried, inside)
            nearest = min(abs(math.log(limit / own.limit)) for own in tried)
            if nearest < 0.99 * math.log(APART) or limit < LEAST_LIMIT:
                break
        # what was foreseen of the fastest plans must be seen
        for own in sorted(tried, key=lambda own: own.ms):
            if own in kept or not own.plan:
                break
            if own.fit == "decomposed" and self._foreseen_drop(own) <= self._budget:
                self.check_time()
                learn(self.evaluate(own.placed, self.networks.recovery))

    def _next_limit(self, tried: Sequence[Evaluated], inside: Sequence[Evaluated]) -> float:
        """Where the budget is expected to be nearly spent, by the plans that were tried, of which some are `inside`.

        It is above those and below the others, and not much farther than any.
        """
        below = max((own.limit for own in inside), default=0.0)
        above = min((own.limit for own in tried if own not in inside and own.limit > below), default=math.inf)
        known = {own.limit: self._foreseen(own) for own in tried}
        goal = self._rate.damage(AIM * self._budget - self._margin(tried[-1]))
        wanted = limit_for(goal, known, least=LEAST_LIMIT, most=MOST_LIMIT)
        low = max(below, min(known) / FARTHEST)
        high = min(above / APART, max(known) * FARTHEST)
        return max(min(wanted, high), min(low, high))

    def check_time(self) -> None:
        """Raise TimeUp once the deadline has passed."""
        if time.monotonic() > self.settings.deadline:
            raise TimeUp

    def _check_first_tuning(self) -> None:
        """Raise TimeUp once the deadline has passed, or what a first plan's kernels may take of the time."""
        self.check_time()
        if self._late(FIRST_TUNING_ENDS) and not self.journal.of_kind("evaluation"):
            raise TimeUp

    def _late(self, share: float) -> bool:
        """Whether this part of the time has passed."""
        return time.monotonic() > self._begun + share * (self.settings.deadline - self._begun)

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
