"""The refit through the activation: the alternation of Zhang et al. 2015 (section 3.3), for any chain and activation.

What the rest of the network sees of a site is r(u): u the output with its bias and the other branch of a residual
block. With p = Pf + c + a what the chain makes of it (f the features that reach its last factor P, a the other branch)
the aim is the least E|r(u) - r(p)|^2. As in the paper an auxiliary z splits this in two:

    min over z, P, c:  |r(u) - r(z)|^2 + penalty |z - p|^2

Given p, each element of z is a problem of its own; given z, P and c solve a linear least-squares problem whose Gram
matrix never changes. Neither step raises the objective. The penalty is small at first, so that z finds its way past the
flat parts of r, and 1 in the end.

A max-pool belongs to r: with the others of the window at their dense values, the pool sees max(r(z), their largest).
The paper leaves pooling out; here it decides which errors count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank.bridge.epilogue import Activation
from tvm_lowrank.methods import Chain, Conv

PENALTIES = (0.01, 0.01, 0.01, 1.0, 1.0, 1.0)
HELD_OUT = 0.2  # share of the calibration samples, the last ones; it decides which iterate is kept
RIDGE = 1e-2  # relative to the features' mean variance; pulls P towards where it started
GRID, NEWTON = 4, 2  # intervals between p and u that are tried, and the Gauss-Newton steps from the best of their ends
SLOPE_WIDTH = 1e-2
REGRESSED_PENALTY = 0.1  # of the z that is decomposed anew
BLOCK = 4096  # samples that are computed at once where something wide is made of each


@dataclass(frozen=True, eq=False)
class Response:
    """r: how the network responds to (samples, N) values of a site after bias and residual addition.

    ``activation`` is elementwise (None: the identity); ``floor`` holds for each value what the max-pool behind sees in
    its place if it is smaller (None: there is no max-pool).
    """

    activation: Activation | None = None
    floor: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        if self.activation is not None:
            values = self.activation(values[:, :, None, None])[:, :, 0, 0]
        return values if self.floor is None else torch.maximum(values, self.floor)

    def rows(self, start: int, stop: int) -> Response:
        """The response to some of the samples."""
        return Response(self.activation, None if self.floor is None else self.floor[start:stop])

    @property
    def linear(self) -> bool:
        """Whether r is the identity."""
        return self.activation is None and self.floor is None

    def solve(self, p: Tensor, u: Tensor, penalty: float) -> Tensor:
        """z of a lower (r(u) - r(z))^2 + penalty (z - p)^2 than z = p, element by element; the least for a ReLU."""
        if self.activation is None and self.floor is not None:
            return _solve_relu(p, u, self.floor, penalty)
        if self.activation is not None and self.activation.name == "nn.relu":
            zero = torch.zeros(())
            return _solve_relu(p, u, zero if self.floor is None else torch.maximum(self.floor, zero), penalty)
        return _solve(p, u, penalty, self)


def _solve_relu(p: Tensor, u: Tensor, floor: Tensor, penalty: float) -> Tensor:
    """The paper's closed form for r(z) = max(z, floor): the better of the best z below the floor and that above it."""
    target = torch.maximum(u, floor)
    below = torch.minimum(p, floor)
    above = torch.maximum(((p * penalty).add_(target)).div_(1 + penalty), floor)
    cost_below = (target - floor).square_().add_((below - p).square_(), alpha=penalty)
    cost_above = (target - above).square_().add_((above - p).square_(), alpha=penalty)
    # an infinite floor makes both costs undefined: such elements are seen by nothing and stay
    return torch.where(cost_above < cost_below, above, below)


def _solve(p: Tensor, u: Tensor, penalty: float, respond: Callable[[Tensor], Tensor]) -> Tensor:
    """A few points between p and u, then Gauss-Newton, keeping only what helps.

    For a monotone r the minimiser lies between p and u: beyond either of them both terms grow. Where r is piecewise
    linear a single Gauss-Newton step from the right piece is exact.
    """
    target = respond(u)
    z, response = p, respond(p)
    least = (target - response).square()

    def improve(candidate: Tensor) -> None:
        nonlocal z, response, least
        there = respond(candidate)
        cost = (target - there).square_().add_((candidate - p).square_(), alpha=penalty)
        better = cost < least
        z, response, least = (
            torch.where(better, new, old) for new, old in ((candidate, z), (there, response), (cost, least))
        )

    for i in range(1, GRID + 1):
        improve(torch.lerp(p, u, i / GRID))
    for _ in range(NEWTON):
        slope = (respond(z + SLOPE_WIDTH) - respond(z - SLOPE_WIDTH)).div_(2 * SLOPE_WIDTH)
        downhill = slope * (target - response) + penalty * (p - z)
        improve(z + downhill / (slope.square() + penalty))
    return z


def last_features(chain: Chain, columns: Tensor) -> Tensor:
    """What the chain's last factor multiplies at (g, samples, D) columns of its site.

    Returns (groups of the factor, samples, E) with E in the order of the last three axes of its OIHW weight.
    """
    first, last = chain.specs[0], chain.specs[-1]
    height, width = (max(spec.kernel[axis] for spec in chain.specs) for axis in (0, 1))
    found = []
    for part in columns.split(BLOCK, dim=1):
        # a column is an image on which the chain has just one position; stride, dilation and padding are already in it
        values = part.transpose(0, 1).reshape(part.shape[1], first.in_channels, height, width)
        for conv in chain.convs[:-1]:
            values = F.conv2d(values, torch.from_numpy(conv.weight), groups=conv.spec.groups)
        found.append(values.reshape(part.shape[1], last.groups, -1))
    return torch.cat(found).transpose(0, 1)


@torch.no_grad()
def refit_through(
    chain: Chain, fit: Callable[[Tensor], Chain], columns: Tensor, u: Tensor, rest: Tensor, respond: Response
) -> Chain:
    """The chain of the least error E|r(u) - r(p)|^2 on held-out samples: `chain`, or better.

    Its last factor is refit; then, as that leaves the other factors as they were, the z so found is decomposed anew
    and the last factor refit once more.

    Parameters
    ----------
    chain : the linear refit.
    fit : makes a chain whose output, with `rest`, is near some (samples, N) values.
    columns : the site's input columns in the compressed network, (g, samples, D), in the order of the images.
    u : what the dense network has after bias and residual addition, (samples, N).
    rest : what is added to the chain's output without its correction: the site's bias and, in the compressed network,
        the other branch; (samples, N) or (N,).
    respond : r, with a floor for each sample.
    """
    least, best = refit_last_factor(chain, columns, u, rest, respond)
    fitted = fitted_samples(columns)
    p = chain_outputs(best, columns) + rest
    z = p.clone()  # held-out samples stand for what the chain already does
    z[:fitted] = respond.rows(0, fitted).solve(p[:fitted], u[:fitted], REGRESSED_PENALTY)
    error, again = refit_last_factor(fit(z), columns, u, rest, respond)
    return again if error < least else best


def refit_last_factor(chain: Chain, columns: Tensor, u: Tensor, rest: Tensor, respond: Response) -> tuple[float, Chain]:
    """The held-out error of the best last factor and bias found, the chain's own included, and the chain with them.

    The arguments are those of `refit_through`.
    """
    last, samples = chain.convs[-1], columns.shape[1]
    groups, fitted = last.spec.groups, fitted_samples(columns)
    correction = torch.from_numpy(_correction(chain))
    start = torch.from_numpy(last.weight).reshape(groups, last.spec.out_channels // groups, -1).mT  # (h, E, N/h)
    features = last_features(chain, columns)
    p = joined(features @ start) + rest + correction
    mean = features[:, :fitted].mean(dim=1, keepdim=True)
    features -= mean  # so that the bias is a problem of its own
    train = features[:, :fitted]
    gram = (train.mT @ train).double() / fitted
    ridge = RIDGE * torch.diagonal(gram, dim1=1, dim2=2).mean(dim=1)[:, None, None] + torch.finfo(torch.float64).tiny
    cholesky = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[1]))
    moved, shift = torch.zeros_like(start, dtype=torch.float64), torch.zeros(u.shape[1])
    fit, judge = respond.rows(0, fitted), respond.rows(fitted, samples)
    wanted = judge(u[fitted:])

    def judged() -> float:
        return float((wanted - judge(p[fitted:])).square().nan_to_num_().mean())

    best = (judged(), moved, shift)
    for penalty in PENALTIES:
        residue = fit.solve(p[:fitted], u[:fitted], penalty) - p[:fitted]
        step_shift = residue.mean(dim=0)
        cross = train.mT @ (residue - step_shift).reshape(fitted, groups, -1).transpose(0, 1)
        step = torch.cholesky_solve(cross.double() / fitted - ridge * moved, cholesky)
        moved, shift = moved + step, shift + step_shift
        p += joined(features @ step.float()) + step_shift
        best = min(best, (judged(), moved, shift), key=lambda found: found[0])
    least, moved, shift = best
    shift = shift - joined(mean.double() @ moved)[0]
    weight = (start + moved).mT.reshape(last.spec.weight_shape).float().numpy()
    convs = (*chain.convs[:-1], Conv(last.spec, np.ascontiguousarray(weight)))
    return least, Chain(convs, (correction + shift).float().numpy())


def fitted_samples(columns: Tensor) -> int:
    """How many of the samples of (g, samples, D) columns, the first ones, the least squares see."""
    return columns.shape[1] - round(columns.shape[1] * HELD_OUT)


def chain_outputs(chain: Chain, columns: Tensor) -> Tensor:
    """The chain's outputs with its correction, (samples, N), at (g, samples, D) columns of its site."""
    last = chain.convs[-1]
    weight = torch.from_numpy(last.weight).reshape(last.spec.groups, last.spec.out_channels // last.spec.groups, -1)
    return joined(last_features(chain, columns) @ weight.mT) + torch.from_numpy(_correction(chain))


def _correction(chain: Chain) -> np.ndarray:
    zeros = np.zeros(chain.specs[-1].out_channels, np.float32)
    return zeros if chain.bias_correction is None else chain.bias_correction


def joined(grouped: Tensor) -> Tensor:
    """(groups, samples, N/groups) as (samples, N)."""
    return grouped.transpose(0, 1).reshape(grouped.shape[1], -1)
