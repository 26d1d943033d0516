"""CP decomposition of a dense tensor by damped Gauss-Newton, never degenerate.

A tensor T of shape (I_1, .., I_d) is approximated by a sum X of R rank-1 terms. There need not be a best one: two
terms may grow without bound while they cancel (de Silva & Lim 2008). Everything here therefore minimises

    ||T - X||^2 + penalty * spread,   spread = sum_r ||u_1r o .. o u_dr||^2,

whose minimum exists. With G_m = U_m^T U_m and * the entrywise product, ||X||^2 is the sum of all entries of
G_1 * .. * G_d and the spread its trace; so the penalty costs no more than multiplying the diagonals of Gram matrices
by 1 + penalty.

The solver follows Lebedev et al. 2015 (nonlinear least squares instead of greedy deflation or ALS), with products by
the Gauss-Newton matrix as in Sorber et al. 2013, and ends with the error-preserving correction of Phan et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import linalg, optimize

from tvm_lowrank.methods.solvers.cp_als import Report, als, start
from tvm_lowrank.methods.solvers.cp_terms import TINY, balanced, mttkrps, sections, split, spread, squared, tensor_of

MAX_SPREAD = 10.0  # of a solution, relative to ||T||^2
BUDGET = 2e11  # floating-point operations of the Gauss-Newton steps of one start, some seconds on one core
SWEEPS_BUDGET = 5e10  # those of the sweeps at one rank, and those of the correction
ENOUGH = 40  # steps; where the budget pays for fewer, each is solved less exactly
TWO_PHASES = 20  # steps from which some of them are spent on a large penalty


@dataclass(frozen=True)
class Effort:
    """How much to do for one start.

    Parameters
    ----------
    sweeps : of alternating least squares.
    iterations : Gauss-Newton steps.
    inner : steps of conjugate gradients within each.
    corrections : sweeps of the error-preserving correction.
    """

    sweeps: int = 30
    iterations: int = 100
    inner: int = 25
    corrections: int = 20


def affordable(shape: Sequence[int], rank: int) -> Effort:
    """The effort that the budgets pay for; only a kernel of some hundred channels at a high rank gets less than all.

    For 512 x 512 x 9 of rank 1024, 10 steps of 10 inner ones end at an error of 0.122 in 16 s, and 8 of 25 at 0.120
    in 26 s; the correction's twenty sweeps would take 21 s.
    """
    product, order = 4 * math.prod(shape) * rank, len(shape)  # of the tensor with the factors, in all modes

    def within(budget: float, operations: float, least: int, most: int) -> int:
        return int(np.clip(budget / operations, least, most))

    def iterations(inner: int, least: int) -> int:
        return within(BUDGET, product + (8 * inner * sum(shape) + 4 * rank) * rank**2, least, Effort.iterations)

    thorough = iterations(Effort.inner, 0) >= ENOUGH
    inner = Effort.inner if thorough else 10
    return Effort(
        sweeps=within(SWEEPS_BUDGET, product + 2 * sum(shape) * rank**2 + order * rank**3 / 3, 4, Effort.sweeps),
        iterations=iterations(inner, 8),
        inner=inner,
        corrections=within(SWEEPS_BUDGET, product + 10 * order * rank**3, 2, Effort.corrections),
    )


class Normal:
    """The Gauss-Newton matrix J^T J of the penalised residual at a stack, never formed.

    Row block m of J^T J V is V_m (*_{k != m} G_k) + U_m sum_{l != m} ((*_{k != m,l} G_k) * (V_l^T U_l)).
    """

    def __init__(self, stack: np.ndarray, shape: Sequence[int], penalty: float) -> None:
        self.factors, self.sections = split(stack, shape), sections(shape)
        self.grams = [factor.T @ factor for factor in self.factors]
        self.mask = np.ones_like(self.grams[0])
        self.mask[np.diag_indices_from(self.mask)] += penalty
        modes = range(len(shape))
        self.own = [self._without(mode) for mode in modes]
        self.pairs = {(m, k): self._without(m, k) for m in modes for k in modes if m < k}

    def _without(self, *modes: int) -> np.ndarray:
        product = self.mask.copy()
        for mode, gram in enumerate(self.grams):
            if mode not in modes:
                product *= gram
        return product

    def power(self) -> float:
        """||X||^2 + penalty * spread."""
        return float(np.sum(self.own[0] * self.grams[0]))

    def product(self, stack: np.ndarray) -> np.ndarray:
        """J^T J times a stack."""
        result = np.empty_like(stack)
        crosses = [stack[part].T @ factor for part, factor in zip(self.sections, self.factors, strict=True)]
        for m, part in enumerate(self.sections):
            others = [k for k in range(len(crosses)) if k != m]
            mixed = sum(self.pairs[min(m, k), max(m, k)] * crosses[k] for k in others)
            result[part] = stack[part] @ self.own[m] + self.factors[m] @ mixed
        return result

    def preconditioner(self, damping: float) -> Callable[[np.ndarray], np.ndarray]:
        """Division by the diagonal blocks of J^T J + damping I: one R x R matrix per mode."""
        identity = np.eye(len(self.mask), dtype=self.mask.dtype)
        inverses = []
        for own in self.own:
            lower = linalg.cholesky(own + damping * identity, lower=True)
            inverses.append(linalg.cho_solve((lower, True), identity))
        return lambda stack: np.concatenate(
            [stack[part] @ inverse for part, inverse in zip(self.sections, inverses, strict=True)]
        )


def conjugate_gradients(
    normal: Normal, damping: float, target: np.ndarray, tolerance: float, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """(x, residual) of (J^T J + damping I) x = target, from x = 0, preconditioned by the diagonal blocks."""
    divide = normal.preconditioner(damping)
    x, residual = np.zeros_like(target), target.copy()
    direction = divide(residual)
    slope = goal = np.vdot(residual, direction)
    for _ in range(limit):
        if not slope > tolerance**2 * goal:
            break
        image = normal.product(direction) + damping * direction
        length = slope / np.vdot(direction, image)
        x += length * direction
        residual -= length * image
        step = divide(residual)
        previous, slope = slope, np.vdot(residual, step)
        direction = step + (slope / previous) * direction
    return x, residual


def levenberg_marquardt(
    tensor: np.ndarray,
    stack: np.ndarray,
    *,
    penalty: float = 1e-6,
    iterations: int = 100,
    inner: int = 25,
    tolerance: float = 1e-6,
    report: Report | None = None,
) -> np.ndarray:
    """Damped Gauss-Newton from a stack; every accepted step lowers the penalised error.

    It stops once the penalised error fell by less than `tolerance` of itself, on average over five steps. ``report``
    is called with the step's number and the relative penalised error.
    """
    shape, total = tensor.shape, squared(tensor)

    def evaluate(stack: np.ndarray) -> tuple[Normal, np.ndarray, float]:
        products = np.concatenate(list(mttkrps(tensor, split(stack, shape))))
        normal = Normal(stack, shape, penalty)
        first = normal.sections[0]
        inner_product = float(np.vdot(products[first], stack[first]))
        gradient = np.concatenate([f @ own for f, own in zip(normal.factors, normal.own, strict=True)]) - products
        return normal, gradient, total - 2 * inner_product + normal.power()

    stack = balanced(stack, shape)
    normal, gradient, value = evaluate(stack)
    scale = max(float(np.mean([np.diag(own).mean() for own in normal.own])), TINY)
    least = 100 * float(np.finfo(stack.dtype).eps) * scale  # below it the preconditioner is rounding
    damping, growth, history = 1e-3 * scale, 2.0, [value]
    for iteration in range(iterations):
        step, residual = conjugate_gradients(normal, damping, -gradient, 0.05, inner)
        predicted = float(np.vdot(step, residual - gradient) + damping * np.vdot(step, step))
        trial = balanced(stack + step, shape)
        attempt = evaluate(trial)
        gain = (value - attempt[2]) / max(predicted, TINY)
        if gain > 0:
            stack, (normal, gradient, value) = trial, attempt
            damping, growth = max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), least), 2.0
            history.append(value)
        else:
            damping, growth = damping * growth, growth * 2
        if report is not None:
            report(iteration, float(np.sqrt(max(value, 0) / max(total, TINY))))
        settled = len(history) > 5 and history[-6] - value < 5 * tolerance * value
        if settled or value <= 1e-14 * total or growth > 1e3:
            break
    return stack


def correct(tensor: np.ndarray, stack: np.ndarray, *, sweeps: int = 20, slack: float = 0.0) -> np.ndarray:
    """Error-preserving correction: the smallest spread with an error of at most ||T - X|| (Phan et al. 2020).

    Mode by mode, with the other factors' columns of norm 1, the minimiser is U = F (E + mu I)^-1 Q^T, where Q E Q^T
    is the others' Gram matrix and F the MTTKRP times Q; mu >= 0 makes the error what it was before. ``slack`` allows
    a squared error larger by this part of ||T||^2.
    """
    shape, total = tensor.shape, squared(tensor)
    # the bound counts rounding in, or a mode might have no solution
    bound = _error(tensor, stack) + max(slack, 4 * np.finfo(tensor.dtype).eps) * total
    least = spread(stack, shape)
    factors = [factor / np.maximum(np.linalg.norm(factor, axis=0), TINY) for factor in split(stack, shape)]
    for _ in range(sweeps):
        for mode, product in enumerate(mttkrps(tensor, factors)):
            others = [factor.T @ factor for other, factor in enumerate(factors) if other != mode]
            values, vectors = np.linalg.eigh(np.prod(others, axis=0))
            values = np.maximum(values, np.finfo(tensor.dtype).eps * values[-1])
            rotated = product @ vectors
            shift = _secular(values, np.sum(rotated**2, axis=0), total - bound)
            factors[mode][...] = (rotated / (values + shift)) @ vectors.T
            lengths = np.linalg.norm(factors[mode], axis=0)
            factors[mode] /= np.maximum(lengths, TINY)  # in place: the next mode's product sees it
        previous, least = least, float(np.sum(lengths**2))
        if least > 0.999 * previous:
            break
    factors[-1] *= lengths
    return balanced(np.concatenate(factors), shape)


def solve(
    tensor: np.ndarray,
    starts: Sequence[np.ndarray],
    effort: Effort = Effort(),
    *,
    report: Report | None = None,
) -> np.ndarray:
    """The best stack found from any of the starts: ALS, then Gauss-Newton steps, then the correction.

    The penalty begins large, which leads around the slow stretches where terms nearly cancel, and ends small against
    the error. Should the terms cancel even so, it is raised until the spread is at most MAX_SPREAD ||T||^2.
    ``report`` is called with the step's number and the relative penalised error.
    """
    total, iterations = squared(tensor), effort.iterations
    if total == 0:
        return np.zeros_like(starts[0])
    descend = partial(levenberg_marquardt, tensor, inner=effort.inner)
    phases = ((1e-3, 0.3), (3e-4, 0.7)) if iterations >= TWO_PHASES else ((3e-4, 1.0),)

    def refined(stack: np.ndarray) -> np.ndarray:
        stack = als(tensor, stack, penalty=1e-2, sweeps=effort.sweeps)
        for highest, share in phases:
            penalty = min(highest, 3e-3 * max(_error(tensor, stack) / total, 1e-9))
            stack = descend(stack, penalty=penalty, iterations=round(share * iterations), report=report)
        stack = correct(tensor, stack, sweeps=effort.corrections)
        # after a sweep of ALS the penalised error is at most ||T||^2, the spread at most ||T||^2 / penalty: this ends
        while spread(stack, tensor.shape) > MAX_SPREAD * total:
            penalty *= 4
            stack = als(tensor, stack, penalty=penalty, sweeps=1)
            stack = descend(stack, penalty=penalty, iterations=iterations // 4 + 1)
            stack = correct(tensor, stack, sweeps=effort.corrections)
        return stack

    return min((refined(stack) for stack in starts), key=lambda stack: _error(tensor, stack))


def grow(tensor: np.ndarray, stack: np.ndarray, rank: int, rng: np.random.Generator, *, sweeps: int = 10) -> np.ndarray:
    """A stack of `rank` columns: the new terms are fitted to what the present ones leave."""
    missing = tensor - tensor_of(stack, tensor.shape)
    extra = als(missing, start(missing, rank - stack.shape[1], rng, hosvd=True), penalty=1e-2, sweeps=sweeps)
    return np.concatenate([balanced(stack, tensor.shape), extra], axis=1)


def climb(tensor: np.ndarray, stack: np.ndarray, rank: int) -> np.ndarray:
    """The next rung of a ladder of ranks: terms for what the stack of the last one misses, then ALS of all of them."""
    sweeps = affordable(tensor.shape, rank).sweeps
    stack = grow(tensor, stack, rank, np.random.default_rng(rank), sweeps=min(10, sweeps))
    return als(tensor, stack, penalty=1e-2, sweeps=sweeps)


def _error(tensor: np.ndarray, stack: np.ndarray) -> float:
    return squared(tensor - tensor_of(stack, tensor.shape))


def _secular(values: np.ndarray, weights: np.ndarray, target: float) -> float:
    """The mu >= 0 at which sum_k w_k (e_k + 2 mu) / (e_k + mu)^2, the part of ||T||^2 that X explains, is `target`."""
    values, weights = values.astype(np.float64), weights.astype(np.float64)

    def explained(logarithm: float) -> float:
        shift = np.exp(logarithm)
        return float(np.sum(weights * (values + 2 * shift) / (values + shift) ** 2)) - target

    low = np.log(1e-12 * max(values[-1], TINY))
    high = np.log(2 * max(weights.sum(), TINY) / max(target, TINY)) + 1  # where the sum is below 2 sum(w) / mu
    if high <= low or explained(low) <= 0:
        return 0.0
    return float(np.exp(optimize.brentq(explained, low, high)))
