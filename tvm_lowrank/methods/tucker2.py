"""Tucker-2 decomposition, 1x1 -> kh x kw -> 1x1: Kim et al. 2016, with the output error as its norm.

The kernel, a tensor T of (N, C, p) with p = kh * kw taps, is approximated by P (N, R4), a core (R4, R3, p) and A (C,
R3) as T ~ core x_N P x_C A. For the weights alone, higher-order orthogonal iteration (HOOI; De Lathauwer et al. 2000)
finds P and A from the leading singular vectors of the unfoldings (HOSVD).

With moments, HOOI runs on T x_C Sc^(1/2) x_p Sp^(1/2), where Sc (over channels) and Sp (over taps) are the partial
traces of the covariance S of the input columns (S ~ Sc x Sp), and A is un-whitened. Given A, the core and P together
are the reduced-rank regression of the outputs on the features A^T x: exact, under the full S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import linalg

from tvm_lowrank.methods.algebra import mode_dot
from tvm_lowrank.methods.balance import balance
from tvm_lowrank.methods.chain import ConvSpec, Rank, chain_macs
from tvm_lowrank.methods.moments import Moments, grouped, lifted_cholesky, output_power, square_roots

CANDIDATES = 10  # ranks of the grid
NOMINAL = (
    64,
    64,
)  # the input on which a chain's MACs are compared with the dense ones; their ratio hardly depends on it
TINY = np.finfo(float).tiny


def max_rank(spec: ConvSpec) -> tuple[int, int]:
    """The rank (R3, R4), per group, at which the decomposition is exact."""
    out, inner, height, width = spec.weight_shape
    out //= spec.groups
    return min(inner, out * height * width), min(out, inner * height * width)


def ranks(spec: ConvSpec, lanes: int) -> Sequence[Rank]:
    """Up to ten (R3, R4), spaced geometrically up to where the MACs reach the dense ones.

    Both numbers are multiples of `lanes`, in the proportion of the channels.
    """
    cheaper = [rank for rank in proportional(max_rank(spec), lanes) if saves(spec, chain_specs(spec, rank))]
    return [cheaper[i] for i in spread(len(cheaper), CANDIDATES)]


def proportional(limits: tuple[int, int], lanes: int) -> list[tuple[int, int]]:
    """Pairs of multiples of `lanes` in the proportion of two limits and up to them, in ascending order."""
    if min(limits) < lanes:
        return []

    def share(part: float, limit: int) -> int:
        return min(max(lanes, round(part * limit / lanes) * lanes), limit // lanes * lanes)

    steps = range(lanes, max(limits) + 1, lanes)
    return sorted({(share(n / max(limits), limits[0]), share(n / max(limits), limits[1])) for n in steps})


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices of a sequence, the last among them, spaced geometrically down to a sixteenth."""
    return sorted({round(i) - 1 for i in np.geomspace(max(1, length / 16), length, count)}) if length else []


def saves(spec: ConvSpec, specs: Iterable[ConvSpec]) -> bool:
    """Whether a chain needs fewer MACs than the convolution it replaces."""
    return chain_macs(specs, NOMINAL) < spec.macs(NOMINAL)


def chain_specs(spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
    """The geometry of the chain: 1x1 to R3 channels a group, kh x kw to R4, 1x1."""
    inner, outer = (spec.groups * number for number in as_numbers(rank, 2))
    return (
        ConvSpec(spec.in_channels, inner, (1, 1), groups=spec.groups),
        replace(spec, in_channels=inner, out_channels=outer),
        ConvSpec(outer, spec.out_channels, (1, 1), groups=spec.groups),
    )


def as_numbers(rank: Rank, count: int) -> tuple[int, ...]:
    """The rank of a method that has `count` numbers for it."""
    if not isinstance(rank, tuple) or len(rank) != count:
        raise ValueError(f"rank {rank!r} is not a tuple of {count} numbers")
    return tuple(int(number) for number in rank)


@dataclass(frozen=True, eq=False)
class Whitened:
    """The kernel of one group in the coordinates where squared weights stand for squared outputs.

    ``tensor`` is T x_C Sc^(1/2) x_p Sp^(1/2), (N, C, p); ``channels`` is Sc^(-1/2), (C, C); ``taps`` Sp^(-1/2), (p, p).
    """

    tensor: np.ndarray
    channels: np.ndarray
    taps: np.ndarray


def whiten(tensor: np.ndarray, covariance: np.ndarray | None) -> Whitened:
    """Whiten an (N, C, p) kernel by the (C*p, C*p) covariance of its columns; without one, only pass it on."""
    _, inner, taps = tensor.shape
    if covariance is None:
        return Whitened(tensor, np.eye(inner), np.eye(taps))
    window = covariance.reshape(inner, taps, inner, taps)
    root, inverse = square_roots(np.einsum("cpdp->cd", window))
    tap_root, tap_inverse = square_roots(np.einsum("cpcq->pq", window) / max(np.trace(covariance), TINY))
    # tensorly's multi_mode_dot takes 1.2 times as long at 256 x 256 x 9
    return Whitened(np.einsum("ncp,cd,pq->ndq", tensor, root, tap_root, optimize=True), inverse, tap_inverse)


def leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of a symmetric matrix and their eigenvectors as columns, largest first."""
    size = len(matrix)
    values, vectors = linalg.eigh(matrix, subset_by_index=(size - count, size - 1), check_finite=False)
    return values[::-1], vectors[:, ::-1]


def hooi(
    tensor: np.ndarray,
    rank: tuple[int, int],
    start: np.ndarray | None = None,
    *,
    tolerance: float = 1e-4,
    iterations: int = 60,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Higher-order orthogonal iteration on the first two modes of an (N, C, p) tensor.

    tensorly's partial_tucker, by SVDs, takes 3.5 times as long for five sweeps at 256 x 256 x 9 and ranks 64.

    Parameters
    ----------
    rank : (R3, R4), of the modes C and N in this order.
    start : (N, R4) orthonormal columns; otherwise HOSVD's.
    tolerance : stop when an iteration lowers the squared error by less than this part of the squared norm.

    Returns
    -------
    (P, A, errors) : orthonormal (N, R4) and (C, R3), most important columns first, and the squared error after each
        iteration, which never rises.
    """
    out, inner, _ = tensor.shape
    rows = np.ascontiguousarray(tensor.transpose(0, 2, 1))  # (N, p, C): both contractions are one matrix product
    by_output, by_input = rows.reshape(out, -1), rows.reshape(-1, inner)
    power = float(np.sum(tensor**2))
    outputs = leading(by_output @ by_output.T, rank[1])[1] if start is None else start
    errors: list[float] = []
    while len(errors) < iterations:
        projected = (outputs.T @ by_output).reshape(-1, inner)
        inputs = leading(projected.T @ projected, rank[0])[1]
        projected = (by_input @ inputs).reshape(out, -1)
        values, outputs = leading(projected @ projected.T, rank[1])
        errors.append(power - float(values.sum()))
        if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * power:
            break
    return outputs, inputs, errors


def regress(
    matrix: np.ndarray, inputs: np.ndarray, rank: int, covariance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Reduced-rank regression of a convolution's outputs on the window of the features A^T x.

    Parameters
    ----------
    matrix : the convolution, (N, C*p).
    inputs : A, (C, R3); orthonormal columns if there is no covariance.
    rank : R4.
    covariance : of the columns x, (C*p, C*p); the identity if None.

    Returns
    -------
    (P, core, explained) : (N, R4) with orthonormal columns and (R4, R3, p) that minimise E|Wx - P core A^T x|^2, and
        how much of E|Wx|^2 they explain.
    """
    out, (inner, count) = len(matrix), inputs.shape
    if covariance is None:
        solved = cross = mode_dot(matrix.reshape(out, inner, -1), inputs, 1, transpose=True).reshape(out, -1)
        gram = np.eye(cross.shape[1])
    else:
        half = (inputs.T @ covariance.reshape(inner, -1)).reshape(-1, len(covariance))  # (R3*p, C*p)
        cross = matrix @ half.T
        gram = np.ascontiguousarray(half.reshape(len(half), inner, -1).transpose(0, 2, 1)) @ inputs  # (R3*p, p, R3)
        gram = gram.transpose(0, 2, 1).reshape(len(half), len(half))
        solved = linalg.cho_solve((lifted_cholesky(gram), True), cross.T).T
    power = solved @ cross.T
    outputs = leading((power + power.T) / 2, rank)[1]
    core, cross = outputs.T @ solved, outputs.T @ cross
    explained = 2 * np.sum(core * cross) - np.sum((core @ gram) * core)  # true for the ridge's solution too
    return outputs, core.reshape(rank, count, -1), float(explained)


@dataclass(frozen=True, eq=False)
class Solution:
    """One rank: OIHW weights, their expected squared output error, and P of each group in whitened coordinates."""

    weights: tuple[np.ndarray, ...]
    error: float
    outputs: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """The whitened kernel of each group, and the ranks solved so far; a new one starts from the nearest of them."""

    spec: ConvSpec
    matrices: np.ndarray  # (g, N/g, D)
    moments: Moments | None
    kernels: tuple[Whitened, ...]
    power: float  # expected squared output
    solved: dict[tuple[int, ...], Solution] = field(default_factory=dict)

    def weights(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain's three convolutions, balanced; the last two are the best ones for the first."""
        return self._solution(as_numbers(rank, 2)).weights

    def error(self, rank: Rank) -> float:
        """Expected squared output error, summed over channels (squared weight error without moments)."""
        return self._solution(as_numbers(rank, 2)).error

    def _solution(self, rank: tuple[int, ...]) -> Solution:
        if rank not in self.solved:
            self.solved[rank] = self._solve(rank)
        return self.solved[rank]

    def _solve(self, rank: tuple[int, ...]) -> Solution:
        nearest = min(self.solved, key=lambda known: np.abs(np.log(np.divide(known, rank))).sum(), default=None)
        firsts, cores, lasts, starts = [], [], [], []
        explained = 0.0
        for g, kernel in enumerate(self.kernels):
            covariance = None if self.moments is None else self.moments.covariance[g]
            start = None if nearest is None else widen(self.solved[nearest].outputs[g], kernel.tensor, rank[1])
            outputs, inputs, _ = hooi(kernel.tensor, (rank[0], rank[1]), start)
            inputs = kernel.channels @ inputs
            last, core, part = regress(self.matrices[g], inputs, rank[1], covariance)
            firsts.append(inputs.T)
            cores.append(core)
            lasts.append(last)
            starts.append(outputs)
            explained += part
        specs = chain_specs(self.spec, rank)
        weights = (
            np.concatenate(arrays).reshape(spec.weight_shape)
            for arrays, spec in zip((firsts, cores, lasts), specs, strict=True)
        )
        return Solution(balance(specs, tuple(weights)), max(self.power - explained, 0.0), tuple(starts))


def widen(outputs: np.ndarray, tensor: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of orthonormal columns (N, k); further ones are what they miss most of an (N, C, p) tensor."""
    if count <= outputs.shape[1]:
        return outputs[:, :count]
    flat = tensor.reshape(len(tensor), -1)
    missed = flat - outputs @ (outputs.T @ flat)
    more = leading(missed @ missed.T, count - outputs.shape[1])[1]
    return np.linalg.qr(np.hstack([outputs, more]))[0]


def factorise(weight: np.ndarray, spec: ConvSpec, moments: Moments | None = None) -> TuckerFactors:
    """Prepare an OIHW weight; ranks are solved when they are asked for."""
    matrices = grouped(weight, spec)
    _, inner, height, width = spec.weight_shape
    kernels = tuple(
        whiten(matrix.reshape(-1, inner, height * width), None if moments is None else moments.covariance[g])
        for g, matrix in enumerate(matrices)
    )
    return TuckerFactors(spec, matrices, moments, kernels, output_power(matrices, moments))
