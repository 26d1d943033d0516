"""What a search knows of a network under a target: tables of damage and time, the fastest plans, their evaluations.

    probe damages -> time dense -> [allocate for a damage limit -> time what it chose -> fit -> evaluate]

The bracket is repeated by `tvm_lowrank.searching.choose.loop`. Calibration and selection data only; the evaluation
split is not touched here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.answers import Meaning
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.meaning import answers_of
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.measure import POINTS, Rows, Unscored
from tvm_lowrank.data.metric import INTERVAL, Metric
from tvm_lowrank.data.splits import Splits
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.graph import find_sites
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import grids_of, with_formats
from tvm_lowrank.searching.choose.allocate import Option, allocate
from tvm_lowrank.searching.choose.allowed import Allowed
from tvm_lowrank.searching.choose.drops import LEFT, Counted, Rate, Recovery
from tvm_lowrank.searching.choose.forecast import (
    DAMAGE,
    KERNELS,
    PLANS,
    Counts,
    left,
    needs,
    seconds_of_an_image,
)
from tvm_lowrank.searching.choose.likely import Likely, lost
from tvm_lowrank.searching.choose.networks import Fit, Networks, Training
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.damage import divergence
from tvm_lowrank.searching.fit.finetune import Judged
from tvm_lowrank.searching.fit.reconstruct import forward_passes
from tvm_lowrank.searching.journal import Journal
from tvm_lowrank.searching.latency.times import SiteTimes
from tvm_lowrank.tensors import Tensors

FIRST_LIMIT = 0.01  # nats: near the damage that costs a point, so that few steps are needed from here
EVERYTHING = 10.0  # nats: what a network counts as whose metric is no number
AIM = 0.9  # part of the budget at which plans are aimed
MOST_ALLOCATIONS = 8  # for one limit; each times what it chose
# parts of the time limit after which probing ends, and tuning for the first plan, with what is known then
PROBING_ENDS, FIRST_TUNING_ENDS = 0.4, 0.55


@dataclass(frozen=True)
class Settings:
    """What the user asked of the search."""

    budget: float  # in the unit of the metric
    methods: tuple[str, ...]
    lanes: int  # ranks are multiples of this
    synthetic: bool = False  # the images stand in for data that there is not
    seed: int = 0
    deadline: float = math.inf  # time.monotonic() at which the search ends with what it has
    confident: bool = False  # the whole 95 % interval of the drop must be within the budget
    formats: tuple[str, ...] = (FLOAT32,)  # in which sites may be computed


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
    drop: float  # counted, in the metric's unit, on the selection split
    error: float  # standard error of the drop
    likely: float  # drop that is likely by the dense network's own probabilities
    likely_error: float  # its standard error
    fit: Fit
    unscored: str = ""  # why the metric has no number for it, if it has none: then all is lost

    @property
    def placed(self) -> Placed:
        """The plan, as it was before it was evaluated in this way."""
        return Placed(self.plan, self.limit, self.predicted, self.ms)

    @property
    def finetuned(self) -> bool:
        return self.fit == "finetuned"

    @property
    def counted(self) -> Counted:
        return Counted(self.damage, self.likely, self.likely_error)


def plan_of(chosen: Mapping[str, Option]) -> Plan:
    """The plan of an allocation; where nothing is decomposed there is none."""
    plan = Plan({name: option.choice for name, option in chosen.items() if option.choice != Choice()})
    return plan if plan.decomposed else Plan()


def _placed(limit: float, chosen: Mapping[str, Option]) -> Placed:
    options = chosen.values()
    return Placed(plan_of(chosen), limit, sum(o.damage for o in options), sum(o.ms for o in options))


class Search:
    """Everything that is known about one network under one target, computed when first needed.

    ``dense_latency`` measures the whole dense network in the formats of a plan, in ms; ``folder`` is where fitted
    networks are kept, and ``scratch`` where what is known of the sites may wait.
    """

    def __init__(
        self,
        mod: IRModule,
        splits: Splits,
        metric: Metric,
        times: SiteTimes,
        journal: Journal,
        settings: Settings,
        dense_latency: Callable[[Plan], float] | None = None,
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
        self._rate = Rate(metric.cost)
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
    def answers(self) -> Meaning:
        """What the network's outputs mean."""
        return answers_of(self.mod["main"])

    @cached_property
    def outputs(self) -> Tensors:
        """The network's outputs; within the search several are one."""
        return Tensors.of(self.mod["main"])

    @cached_property
    def dense_selection(self) -> np.ndarray:
        """The dense network's outputs on the selection images."""
        return self._answers(self.mod)

    @cached_property
    def dense_rows(self) -> Rows:
        """The metric's rows of the dense network on the selection images."""
        rows = self._rows(self.dense_selection)
        value, metric = self.metric.value(rows), self.metric
        if metric.labelled and metric.unit == POINTS and value <= 0:
            console.warn(f"{metric.name} of the dense network is {value:.2f} %; do the targets, or its function, fit?")
        metric.check(value, "the dense network")
        return rows

    @cached_property
    def likely(self) -> Likely | None:
        """What other answers on the selection images are likely to cost, if the dense network's tell."""
        if not (self.metric.counted and self.metric.labelled):
            return None
        found = Likely.of(
            self.metric, self.dense_selection, self.splits.selection[1], self.answers, seed=self.settings.seed
        )
        if found is None:
            console.warn("the network's probabilities do not tell how often it is right; drops are counted only")
        return found

    def probe(self) -> None:
        """Find the damage of every candidate, in every format."""
        with console.timed(self.seconds, DAMAGE):
            enough = partial(self._late, PROBING_ENDS)
            found = self.sensitivity.probe(self.journal, self.check_time, enough)
            rounding = {
                format: self.sensitivity.rounding(self.journal, format, names)
                for format in self.settings.formats
                if format != FLOAT32 and (names := [site.id for site in self.sites if format in self.allowed(site)])
            }
            self.damage = {
                site.id: {
                    replace(choice, format=format): nats + rounding.get(format, {}).get(site.id, 0.0)
                    for format in self.allowed(site)
                    for choice, nats in {Choice(): 0.0, **found[site.id]}.items()
                }
                for site in self.sites
                if site.id in found
            }

    @cached_property
    def allowed(self) -> Allowed:
        """The formats in which the sites may be computed."""
        formats = self.settings.formats
        short = any(FORMATS[format].short for format in formats)
        largest = self.sensitivity.largest(self.journal) if short else {}
        return Allowed(formats, largest, grids_of(self.mod["main"]))

    @cached_property
    def dense(self) -> Plan:
        """The fastest dense network: the format of each site."""

        def find() -> str:
            with console.timed(self.seconds, KERNELS):
                return self.times.fastest_dense(self.allowed).to_json()

        return Plan.from_json(self.journal.once("formats", "dense", find))

    def options(self, damage: Mapping[str, Mapping[Choice, float]] | None = None) -> dict[str, list[Option]]:
        """Time and damage of everything that each site may become; times that were not measured are optimistic.

        ``damage`` is that of every candidate in nats, else what `probe` found.
        """
        known = self.damage if damage is None else damage
        damages = {name: {self.dense.get(name, Choice()): 0.0, **own} for name, own in known.items()}
        times = self.times.estimates(damages)
        return {
            name: [Option(choice, times[name, choice], damage) for choice, damage in own.items()]
            for name, own in damages.items()
        }

    def _time(self, wanted: list[tuple[str, Choice]], check: Callable[[], None] | None = None) -> None:
        with console.timed(self.seconds, KERNELS):
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

    def placed_of_measured(self, limit: float) -> Placed:
        """The fastest plan within a damage limit whose parts were all timed before."""
        return _placed(limit, allocate(self._measured(), limit))

    def evaluate(self, placed: Placed, fit: Fit) -> Evaluated:
        """Fit a plan in this way and evaluate it on the selection split, once."""
        training = self.networks.training
        how = f"{fit}, {training.name}," if fit == "finetuned" and training is not None else fit

        def judge() -> dict[str, Any]:
            outputs = self._answers(self._fitted(placed.plan, fit))
            return {
                "plan": json.loads(placed.plan.to_json()),
                "fit": fit,
                "ms": placed.ms,
                "predicted": placed.predicted,
                "damage": divergence(self.answers, self.dense_selection, outputs),
                **lost(
                    self.metric,
                    self.dense_rows,
                    partial(self._rows, outputs),
                    None if self.likely is None else partial(self.likely.drop, outputs),
                    seed=self.settings.seed,
                ),
            }

        doing = "fine-tuning plans" if fit == "finetuned" else PLANS
        with console.timed(self.seconds, doing):
            network = f"{how} {placed.plan.to_json()}"
            found = self.journal.once("evaluation", network, judge)
        measured = {name: found[name] for name in ("damage", "drop", "error", "likely", "likely_error")}
        result = Evaluated(**vars(placed), **measured, fit=fit, unscored=found.get("unscored", ""))
        if placed.plan and not result.unscored:
            self._rate.learn(network, result.counted)
        if fit in LEFT:
            before = self.journal.get("evaluation", f"decomposed {placed.plan.to_json()}")
            if before is not None:
                self._recovery.learn(network, before["damage"], result.damage)
        return result

    def tried(self) -> list[dict[str, Any]]:
        """The manifest's ``plans``: all that the journal has as evaluated; what each is expected to lose, all tell."""
        rows = [row for row in self.journal.of_kind("evaluation").values() if row["plan"]["sites"]]
        rate = Rate(self.metric.cost)
        counted = [Counted(row["damage"], row["likely"], row["likely_error"]) for row in rows]
        for row, own in zip(rows, counted, strict=True):
            if "unscored" not in row:
                rate.learn(f"{row['fit']} {row['plan']}", own)
        return [
            {**row, "expected": row["drop"] if "unscored" in row else rate.expected(own)}
            for row, own in zip(rows, counted, strict=True)
        ]

    def expected_drop(self, result: Evaluated) -> float:
        """Points that a network loses, by all that was evaluated so far; the end of the interval if `confident`."""
        if result.unscored:
            return math.inf
        return self._rate.expected(result.counted) + self._margin(result)

    def _margin(self, result: Evaluated) -> float:
        """Points that the budget must cover beside the expected ones."""
        return INTERVAL / 2 * result.error if self.settings.confident and result.plan else 0.0

    def keeps(self, result: Evaluated) -> bool:
        """Whether a network is expected to keep the budget."""
        return self.expected_drop(result) <= self.budget

    @property
    def budget(self) -> float:
        """In the metric's unit; less than half an image of the selection split is nothing."""
        return max(self.settings.budget, self.metric.half_an_image / max(1, len(self.splits.selection[1])))

    def aim(self, result: Evaluated) -> float:
        """The damage in nats at which the next plan is aimed, after this one."""
        return self._rate.damage(AIM * self.budget - self._margin(result))

    def foreseen(self, result: Evaluated) -> float:
        """The damage of what is delivered for a plan, in nats, if it was not recovered yet, or has no score."""
        if result.unscored:
            return EVERYTHING
        return result.damage * (self._recovery.left if result.fit == "decomposed" else 1.0)

    def foreseen_drop(self, result: Evaluated) -> float:
        """Points that what is delivered for a plan loses, as in `expected_drop`."""
        if result.fit != "decomposed" or not result.plan or result.unscored:
            return self.expected_drop(result)
        now, then = self._rate.points(result.damage), self._rate.points(self.foreseen(result))
        return self._rate.expected(result.counted) * then / max(now, 1e-12) + self._margin(result)

    def network(self, plan: Plan, fit: Fit) -> IRModule:
        """The network to deliver for a plan that was evaluated after this fit: recovered, if there is time."""
        doing = "fine-tuning plans" if fit == "finetuned" else PLANS
        with console.timed(self.seconds, doing):
            try:
                return self._fitted(plan, self.networks.recovery if fit == "decomposed" else fit)
            except TimeUp:
                return self.networks(plan, fit)

    def _fitted(self, plan: Plan, fit: Fit) -> IRModule:
        """A plan's network after this fit; while a large one is made, all memory is for it."""
        if fit != "decomposed" or self.networks.recovery == "refitted":
            self.times.rest()
        return self.networks(plan, fit)

    def _answers(self, mod: IRModule) -> np.ndarray:
        return predict(TorchBridge(mod), self.splits.selection[0])

    def _rows(self, outputs: np.ndarray) -> Rows:
        """The metric's rows of outputs on the selection images."""
        return self.metric.scores(self.outputs.given(outputs), self.splits.selection[1])

    def _judged(self, bridge: TorchBridge) -> Judged:
        """A network on the selection split."""
        outputs = predict(bridge, self.splits.selection[0])
        try:
            value = self.metric.value(self._rows(outputs), self.dense_rows)
        except Unscored:
            value = math.nan
        return Judged(divergence(self.answers, self.dense_selection, outputs), value, self.metric.unit.sign)

    def prepare(self) -> None:
        """Find the damage of all candidates, and time the dense network: the surrogate's first data."""
        self.expect()
        self.probe()
        self.time_dense()
        self.expect()

    def expect(self) -> None:
        """Say how long the search is expected to take."""
        seconds = left(self._needs, self.seconds)
        console.expect(min(seconds, max(0.0, self.settings.deadline - time.monotonic())))

    @cached_property
    def _needs(self) -> dict[str, float]:
        known = self.sensitivity
        counts = Counts(
            calibration=len(known.images),
            sampled=len(known.sampled),
            probed=len(known.probed),
            selection=len(self.splits.selection[1]),
            evaluation=len(self.splits.evaluation[1]),
            reconstructed=forward_passes(self.mod, len(known.images)),
        )
        return needs(self.sites, counts, seconds_of_an_image(TorchBridge(self.mod), self.splits.calibration))

    def time_dense(self) -> float | None:
        """Time the dense network, the surrogate's first data; its measured ms end to end, if that can be measured."""
        console.phase("tuning the kernels of the dense network, then of the likeliest candidates")
        self._time([(site.id, self.dense.get(site.id, Choice())) for site in self.sites])
        if self._dense_latency is None:
            return None
        with console.timed(self.seconds, KERNELS):
            self.times.measure_others(self.dense)
            ms = self.journal.once("dense", "ms", partial(self._dense_latency, self.dense))
            self.times.learn(self.dense, ms)
        return ms

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
    def dense_network(self) -> IRModule:
        """The dense network in its fastest formats."""
        return with_formats(self.mod, self.dense.formats)

    def or_dense(self, plan: Plan) -> Plan:
        """A plan; for an empty one that of the dense network in its fastest formats."""
        return plan or self.dense

    @property
    def dense_ms(self) -> float:
        """Sum of the dense sites' times."""
        return sum(self.times.estimate(site.id, self.dense.get(site.id, Choice())) for site in self.sites)
