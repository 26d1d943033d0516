"""The outer loop: the largest damage limit whose fitted network keeps the budget on the selection split.

What is evaluated tells where that limit is (`tvm_lowrank.searching.choose.drops`). It is anytime: every network that
kept the budget so far is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from tvm_lowrank import console
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.plan import Plan
from tvm_lowrank.searching.choose.drops import limit_for
from tvm_lowrank.searching.choose.search import FIRST_LIMIT, Evaluated, Placed, Search

FARTHEST = 6.0  # factor from the limits that were tried to the next one
NEAR = 0.8  # part of the budget from which the loop ends: a plan that spends all of it is a few percent faster
APART = 1.15  # least factor between limits that are tried: plans nearer than that differ by two percent in time
MOST_EVALUATIONS = 12
FINETUNED_STEP = 1.5  # from the limit that the reconstruction reaches: two epochs took 26 to 32 % of a plan's damage
MOST_FINETUNED = 4
BACK_OFF = 0.7  # factor on the limit after a plan failed on the evaluation split
LEAST_LIMIT, MOST_LIMIT = 1e-6, 10.0  # nats; beyond these nothing changes any more
REACH = 1.25  # times the budget: a plan that is foreseen to lose more when it is recovered is not recovered
MOST_LATE = 4  # plans that are evaluated as they are decomposed when the time is up and nothing was kept


def run(search: Search) -> list[Evaluated]:
    """Evaluated plans that kept the budget on the selection split, fastest first; perhaps none."""
    kept: list[Evaluated] = []
    try:
        search.prepare()
        explore(search, kept, partial(evaluate_shortly, search), FIRST_LIMIT, MOST_EVALUATIONS)
        if search.networks.training is not None:
            limit = max((result.limit for result in kept), default=FIRST_LIMIT)
            finetuned = partial(search.evaluate, fit="finetuned")
            explore(search, kept, finetuned, limit * FINETUNED_STEP, MOST_FINETUNED)
    except TimeUp:
        console.warn("the time limit ends the search early; the best plan so far is kept")
        kept = kept or _late_plan(search)
    return sorted(kept, key=lambda e: e.ms)


def unseen(search: Search) -> tuple[Plan, float]:
    """Without data: the fastest plan whose predicted damage is that of the budget, and this damage in nats."""
    try:
        search.prepare()
        found = search.placed(search.settings.budget * FIRST_LIMIT)
    except TimeUp:
        console.warn("the time limit ends the search before there is a plan")
        return Plan(), 0.0
    return found.plan, found.predicted


def milder(search: Search, than: Evaluated, kept: Sequence[Evaluated]) -> Evaluated | None:
    """The next plan of less damage that keeps the budget on the selection split; None when only dense is left.

    ``kept`` are those found so far, fastest first. After a few fine-tuned ones come those that are not.
    """
    limit = than.limit * BACK_OFF
    known = [other for other in kept if other.finetuned == than.finetuned and other.limit <= limit]
    judge = partial(search.evaluate, fit="finetuned") if than.finetuned else partial(evaluate_shortly, search)
    least = than.limit * BACK_OFF**MOST_FINETUNED if than.finetuned else LEAST_LIMIT
    try:
        while limit > least:
            near = next((other for other in known if other.limit > limit * BACK_OFF), None)
            if near is not None:
                return near
            placed = search.placed(limit)
            result = judge(placed)
            if not result.plan:
                break
            if result.fit == "decomposed" and not search.keeps(result):
                result = search.evaluate(placed, search.networks.recovery)
            if result.plan != than.plan and search.keeps(result):
                return result
            limit *= BACK_OFF
    except TimeUp:
        if known:
            return known[0]
    return next((other for other in kept if not other.finetuned), None) if than.finetuned else None


def evaluate_shortly(search: Search, placed: Placed) -> Evaluated:
    """Evaluate a plan without labels, as far as its verdict needs it.

    As it is decomposed, it is quickly evaluated; that tells what it will lose when it is recovered. Where this is near
    the budget the plan is recovered and evaluated again.
    """
    found = search.evaluate(placed, "decomposed")
    if placed.plan and NEAR * search.budget <= search.foreseen_drop(found) <= REACH * search.budget:
        with suppress(TimeUp):
            return search.evaluate(placed, search.networks.recovery)
    return found


def explore(
    search: Search, kept: list[Evaluated], evaluate: Callable[[Placed], Evaluated], limit: float, most: int
) -> None:
    """Look for the largest damage limit that keeps the budget; `kept` receives the plans that do.

    It begins at `limit`, and ends after `most` evaluations.
    """
    before = list(kept)
    tried: list[Evaluated] = []

    def learn(result: Evaluated) -> None:
        tried[:] = [own for own in tried if own.plan != result.plan or own.fit == result.fit]
        tried.append(result)
        kept[:] = [*before, *(own for own in tried if own.plan and search.keeps(own))]

    count = 0
    while count < most:
        count = _approach(search, tried, evaluate, learn, limit, count, most)
        # what was foreseen of the fastest plans must be seen
        for own in sorted(tried, key=lambda own: own.ms):
            if own in kept or not own.plan:
                break
            if own.fit == "decomposed" and search.foreseen_drop(own) <= search.budget:
                search.check_time()
                learn(search.evaluate(own.placed, search.networks.recovery))
        if len(kept) > len(before):
            break
        # less was left of it than foreseen: a milder plan may keep the budget
        limit = _next_limit(search, tried, [own for own in tried if search.foreseen_drop(own) <= search.budget])
        if _near(limit, tried) or limit < LEAST_LIMIT:
            break


def _approach(
    search: Search,
    tried: list[Evaluated],
    evaluate: Callable[[Placed], Evaluated],
    learn: Callable[[Evaluated], None],
    limit: float,
    count: int,
    most: int,
) -> int:
    """Evaluate plans, from a limit on, until the budget is nearly spent by what is foreseen; how many there are now."""
    while count < most:
        search.check_time()
        placed = search.placed(limit)
        new = all(own.plan != placed.plan for own in tried)
        count += new
        result = evaluate(placed)
        learn(result)
        if result.fit == "decomposed" and search.foreseen_drop(result) <= search.budget and search.is_fastest(result):
            # nothing faster is looked for, so that what was foreseen must be seen now
            result = search.evaluate(result.placed, search.networks.recovery)
            learn(result)
        inside = [own for own in tried if search.foreseen_drop(own) <= search.budget]
        if new or result.fit != "decomposed":
            said = _verdict(search, result, kept=result in inside)
            console.tried(search.dense_ms / result.ms, result.drop, said, unit=search.metric.unit.name)
        if result in inside and search.is_fastest(result):
            break
        if any(own.fit != "decomposed" and search.expected_drop(own) >= NEAR * search.budget for own in inside):
            break
        limit = _next_limit(search, tried, inside)
        if _near(limit, tried) or limit < LEAST_LIMIT:
            break
    return count


def _verdict(search: Search, result: Evaluated, *, kept: bool) -> str:
    if result.unscored:
        return f"for {result.unscored}, over budget"
    foreseen = " when it is recovered" if result.fit == "decomposed" else ""
    return f"expected {search.foreseen_drop(result):+.2f}{foreseen}, {'kept' if kept else 'over budget'}"


def _near(limit: float, tried: Sequence[Evaluated]) -> bool:
    """Whether a limit is so near to one that was tried that nothing new can be expected."""
    return min(abs(math.log(limit / own.limit)) for own in tried) < 0.99 * math.log(APART)


def _next_limit(search: Search, tried: Sequence[Evaluated], inside: Sequence[Evaluated]) -> float:
    """Where the budget is expected to be nearly spent, by the plans that were tried, of which some are `inside`.

    It is above those and below the others, and not much farther than any.
    """
    below = max((own.limit for own in inside), default=0.0)
    above = min((own.limit for own in tried if own not in inside and own.limit > below), default=math.inf)
    known = {own.limit: search.foreseen(own) for own in tried}
    wanted = limit_for(search.aim(tried[-1]), known, least=LEAST_LIMIT, most=MOST_LIMIT)
    low = max(below, min(known) / FARTHEST)
    high = min(above / APART, max(known) * FARTHEST)
    return max(min(wanted, high), min(low, high))


def _late_plan(search: Search) -> list[Evaluated]:
    """A plan that keeps the budget as it is decomposed, which takes no long fit; perhaps none.

    It is made of what was timed; its limit follows from what was evaluated before, if anything was.
    """
    if not search.damage:
        return []
    limit, known = FIRST_LIMIT, dict[float, float]()
    for _ in range(MOST_LATE):
        placed = search.placed_of_measured(limit)
        if not placed.plan:
            break
        result = search.evaluate(placed, "decomposed")
        if search.keeps(result):
            return [result]
        known[limit] = result.damage
        limit = min(limit_for(search.aim(result), known, least=LEAST_LIMIT, most=MOST_LIMIT), limit / 2)
    return []
