"""Principal component iteration for block-term decompositions, T ~ sum of core_b x_N P_b x_C A_b: Wang & Cheng 2016.

One block after the other is replaced by a HOOI step on what the others leave of T, so that the error falls with every
step; extrapolating from sweep to sweep saves about three quarters of them. It ends in a local optimum, hence several
starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_lowrank.methods.chain import Rank, as_numbers
from tvm_lowrank.methods.solvers.algebra import multi_mode_dot, unfold
from tvm_lowrank.methods.solvers.tucker2_solver import hooi, leading, widen

Terms = tuple[np.ndarray, np.ndarray, np.ndarray]  # outputs, inputs, cores as in Blocks

STARTS = 3
TRIAL_SWEEPS = 6  # of each start; the best one goes on
SWEEPS = 200
TOLERANCE = 1e-4  # stop when a sweep lowers the error by less than this part of it


def checked(rank: Rank) -> tuple[int, ...]:
    """(S, T, B), or ValueError if B does not divide the others."""
    inner, outer, blocks = as_numbers(rank, 3)
    if blocks < 1 or inner % blocks or outer % blocks:
        raise ValueError(
            f"rank {rank}: {blocks} blocks do not divide the {inner} and {outer} channels between the convolutions"
        )
    return inner, outer, blocks


@dataclass(frozen=True, eq=False)
class Blocks:
    """The terms of one group's decomposition.

    ``outputs`` (B, N, t) and ``inputs`` (B, C, s) have orthonormal columns; ``cores`` is (B, t, p, s). ``errors`` are
    the squared errors after each sweep.
    """

    outputs: np.ndarray
    inputs: np.ndarray
    cores: np.ndarray
    errors: tuple[float, ...]

    def kernel(self) -> np.ndarray:
        """The tensor (N, C, p) that the terms add up to; by tensorly, one at a time, in 1.1 to 1.8 times as long."""
        return np.einsum("bnt,btps,bcs->ncp", self.outputs, self.cores, self.inputs, optimize=True)


def iterate(tensor: np.ndarray, start: Blocks, *, sweeps: int = SWEEPS, tolerance: float = TOLERANCE) -> Blocks:
    """Principal component iteration on an (N, C, p) tensor, from a start whose last error is that of its terms.

    After each sweep the factors go on in the direction in which it moved them, further and further as long as that
    lowers the error.
    """
    rows = np.ascontiguousarray(tensor.transpose(0, 2, 1))  # (N, p, C)
    errors, error, stride = list(start.errors), start.errors[-1], 1.0
    exact = 1e-12 * float(np.sum(tensor**2))  # what rounding leaves of an exact decomposition, and more
    swept = (start.outputs, start.inputs, start.cores)
    terms = _copied(swept)
    for _ in range(sweeps):
        for block in range(len(start.cores)):
            error = _improve(rows, *terms, block, error)
        before, swept = swept, terms
        errors.append(error)
        if errors[-2] - error <= tolerance * max(error, exact):
            break
        terms = _extrapolate(swept, before, stride)
        reached = float(np.sum((rows.reshape(len(rows), -1) - _sum(*terms)) ** 2))
        if reached < error:
            error, stride = reached, 1.2 * stride
        else:
            terms, stride = _copied(swept), max(stride / 3, 0.3)
    return Blocks(*swept, tuple(errors))


def _copied(terms: Terms) -> Terms:
    outputs, inputs, cores = terms
    return outputs.copy(), inputs.copy(), cores.copy()


def _extrapolate(now: Terms, before: Terms, stride: float) -> Terms:
    """The terms `stride` times as far beyond those of now as these are beyond those before, orthonormal again."""
    outputs, inputs, cores = (new + stride * (new - old) for new, old in zip(now, before, strict=True))
    (outputs, left), (inputs, right) = _polar(outputs), _polar(inputs)
    # tensorly's products, block by block, take 1.3 to 2.6 times as long
    return outputs, inputs, np.einsum("but,btps,bsv->bupv", left, cores, right, optimize=True)


def _polar(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (..., n, k) as orthonormal columns times a symmetric (k, k).

    Of all orthonormal bases this is the nearest one, so that factors move no more than their span does from sweep to
    sweep, and can be extrapolated.
    """
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    return left @ right, (np.swapaxes(right, -1, -2) * values[..., None, :]) @ right


def _sum(outputs: np.ndarray, inputs: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """What the terms add up to, (N, p*C): one product for all of them."""
    blocks, t, taps, s = cores.shape
    behind = cores.reshape(blocks, t * taps, s) @ inputs.transpose(0, 2, 1)
    return outputs.transpose(1, 0, 2).reshape(-1, blocks * t) @ behind.reshape(blocks * t, -1)


def _improve(
    rows: np.ndarray, outputs: np.ndarray, inputs: np.ndarray, cores: np.ndarray, block: int, error: float
) -> float:
    """One HOOI step of one block on the residual E of the others, in place; returns the new squared error.

    E is never formed: rows (N, p, C) and the other terms are projected on the block's factors each by themselves. Nor
    are leading singular vectors: one orthogonal iteration from the previous ones captures no less than these, at a
    fraction of the cost of an eigendecomposition.
    """
    others = [i for i in range(len(cores)) if i != block]
    out, taps, inner = rows.shape
    _, t, _, s = cores.shape
    stacked = outputs[others].transpose(1, 0, 2).reshape(out, len(others) * t)

    overlap = inputs[others].transpose(0, 2, 1) @ inputs[block]
    mixed = (cores[others] @ overlap[:, None]).reshape(len(others) * t, taps * s)
    projected = (rows.reshape(-1, inner) @ inputs[block]).reshape(out, -1) - stacked @ mixed
    old = (outputs[block].T @ projected).reshape(t, taps, s)  # the core that would be best for the old factors
    left = error + float(np.sum((2 * old - cores[block]) * cores[block]))  # squared norm of E
    outputs[block] = _polar(projected @ (projected.T @ outputs[block]))[0]

    overlap = outputs[block].T @ outputs[others]
    mixed = (overlap @ cores[others].reshape(len(others), t, taps * s)).reshape(len(others), t * taps, s)
    projected = (outputs[block].T @ rows.reshape(out, -1)).reshape(-1, inner)
    projected = projected - np.sum(mixed @ inputs[others].transpose(0, 2, 1), axis=0)
    inputs[block] = _polar(projected.T @ (projected @ inputs[block]))[0]
    cores[block] = (projected @ inputs[block]).reshape(t, taps, s)
    return left - float(np.sum(cores[block] ** 2))


def deflate(tensor: np.ndarray, rank: tuple[int, int, int]) -> Blocks:
    """Blocks one after the other, each HOOI's best for what is left: the start of the paper."""
    inner, outer, blocks = rank
    left = tensor
    terms = []
    for _ in range(blocks):
        p, a, _ = hooi(left, (inner // blocks, outer // blocks), tolerance=1e-3)
        core = multi_mode_dot(left, (p, a), modes=(0, 1), transpose=True)  # (t, s, p)
        left = left - multi_mode_dot(core, (p, a), modes=(0, 1))
        terms.append((p, a, core.transpose(0, 2, 1)))
    outputs, inputs, cores = (np.stack(parts) for parts in zip(*terms, strict=True))
    return Blocks(outputs, inputs, cores, (float(np.sum(left**2)),))


def scatter(tensor: np.ndarray, rank: tuple[int, int, int], seed: int) -> Blocks:
    """Blocks without cores yet, on random parts of the leading subspaces of the tensor's unfoldings."""
    inner, outer, blocks = rank
    rng = np.random.default_rng(seed)

    def factors(unfolded: np.ndarray, total: int) -> np.ndarray:
        basis = leading(unfolded @ unfolded.T, min(total, len(unfolded)))[1]
        mixes = rng.standard_normal((blocks, basis.shape[1], total // blocks))
        return np.stack([basis @ np.linalg.qr(mix)[0] for mix in mixes])

    cores = np.zeros((blocks, outer // blocks, tensor.shape[2], inner // blocks))
    outputs, inputs = factors(unfold(tensor, 0), outer), factors(unfold(tensor, 1), inner)
    return Blocks(outputs, inputs, cores, (float(np.sum(tensor**2)),))


def adapt(tensor: np.ndarray, known: Blocks, rank: tuple[int, int, int]) -> Blocks:
    """Blocks of another rank as a start: the main directions of each, and room for more of what all of them miss."""
    inner, outer, blocks = rank
    missed = tensor - known.kernel()
    terms = []
    for p, core, a in zip(known.outputs, known.cores, known.inputs, strict=True):
        by_output, by_input = core.reshape(len(core), -1), core.reshape(-1, core.shape[2])
        turned = p @ leading(by_output @ by_output.T, len(core))[1], a @ leading(by_input.T @ by_input, a.shape[1])[1]
        wider = widen(turned[0], missed, outer // blocks), widen(turned[1], missed.transpose(1, 0, 2), inner // blocks)
        terms.append((*wider, multi_mode_dot(core, (wider[0].T @ p, wider[1].T @ a), modes=(0, 2))))
    outputs, inputs, cores = (np.stack(parts) for parts in zip(*terms, strict=True))
    start = Blocks(outputs, inputs, cores, ())
    return replace(start, errors=(float(np.sum((tensor - start.kernel()) ** 2)),))


def solve(
    tensor: np.ndarray,
    rank: Rank,
    known: Blocks | None = None,
    *,
    starts: int = STARTS,
    trial: int = TRIAL_SWEEPS,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> Blocks:
    """The best block-term decomposition of an (N, C, p) tensor that several starts lead to.

    Parameters
    ----------
    rank : (S, T, B) with S and T the totals over the B blocks.
    known : a solution of another rank with as many blocks, to start from instead of random parts.
    starts : how many to try, the deflated one among them; each for `trial` sweeps, and the best for up to `sweeps`
        more, until one lowers the error by less than the `tolerance` part of it.
    """
    inner, outer, blocks = checked(rank)
    numbers = (inner, outer, blocks)
    candidates = [deflate(tensor, numbers)]
    if known is not None:
        candidates.append(adapt(tensor, known, numbers))
    elif blocks > 1:  # a single block is HOOI's
        candidates += [scatter(tensor, numbers, seed) for seed in range(starts - 1)]
    tried = [iterate(tensor, start, sweeps=trial, tolerance=tolerance) for start in candidates]
    best = min(tried, key=lambda found: found.errors[-1])
    return iterate(tensor, best, sweeps=sweeps, tolerance=tolerance)
