"""Asymmetric refit: each chain is fitted to the dense network's outputs from the compressed network's inputs.

The sites are visited in network order. With x the site's input columns in the network compressed so far and y the
dense network's outputs, the best unrestricted kernel is the regression B = Cov(y, x) Cov(x)^-1, and the best chain is
the decomposition of B in the norm of Cov(x): E|y - Mx|^2 = const + |(B - M) Cov(x)^(1/2)|^2. For `channel` this is the
closed form of Zhang et al. 2015, section 3.2; it holds for every method that minimises the error in that norm. Then
the chain is refit to what the network sees of it, through a residual addition, the activation and a max-pool (see
`tvm_lowrank.searching.fit.nonlinear`). No labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import linalg
from torch import Tensor
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.calibrate import batches, sample_columns, sample_positions, sample_values
from tvm_lowrank.bridge.epilogue import Epilogue, epilogue, rivals
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS, Chain, Factors, Moments, compose, decompose, grouped
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.candidates import wide
from tvm_lowrank.searching.fit.nonlinear import Response, chain_outputs, joined, refit_through
from tvm_lowrank.transform import replace_sites

RIDGE = 1e-2  # pulls B towards the dense kernel where the calibration images say little


class _Reached(Exception):
    """Ends a forward pass at the site of interest."""


@dataclass(frozen=True, eq=False)
class Target:
    """What the dense network computes at a site's sampled positions.

    ``outputs`` (g, samples, N/g) is before the bias; ``addend`` (samples, N) is the other operand of the residual
    addition, and ``floor`` (samples, N) the largest rival in the window of the max-pool, where there are such.
    """

    outputs: Tensor
    addend: Tensor | None = None
    floor: Tensor | None = None


@torch.no_grad()
def dense_outputs(
    bridge: TorchBridge, sites: Sequence[Site], images: np.ndarray, *, seed: int = 0
) -> dict[str, Target]:
    """The target of each site of a dense network over the images (float32 NCHW)."""
    wanted = {site.id: site for site in sites}
    parts: dict[tuple[str, str], list[Tensor]] = {}
    start = 0

    def record(name: str, what: str, values: Tensor) -> None:
        rows, cols = sample_positions(name, start, len(values), (values.shape[2], values.shape[3]), seed)
        parts.setdefault((name, what), []).append(sample_values(values, rows, cols))

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name in wanted:
            record(name, "outputs", outputs)

    def record_rivals(name: str, window: tuple[int, int], values: Tensor) -> None:
        record(name, "floor", rivals(values, window))

    watch: list[tuple[relax.Var, Callable[[Tensor], None]]] = []
    for name in wanted:
        after = epilogue(bridge.function, name)
        if after.residual is not None:
            watch.append((after.residual, partial(record, name, "addend")))
        if after.window is not None:
            watch.append((after.result, partial(record_rivals, name, after.window)))
    for start, chunk in batches(images):  # noqa: B007 - the taps read it
        bridge(chunk, tap=tap, watch=watch)
    whole = {key: torch.cat(chunks) for key, chunks in parts.items()}
    return {
        name: Target(
            _split(whole[name, "outputs"], site.spec.groups), whole.get((name, "addend")), whole.get((name, "floor"))
        )
        for name, site in wanted.items()
    }


@torch.no_grad()
def site_columns(
    bridge: TorchBridge,
    site: Site,
    images: np.ndarray,
    *,
    residual: relax.Var | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """What a still dense site multiplies at its sampled positions, and what is added to its output there.

    Returns the columns (g, samples, D) and the values (samples, N) of the variable `residual`, if one is named.
    """
    columns: list[Tensor] = []
    addends: list[Tensor] = []
    start, size = 0, site.spec.output_size(site.size)

    def stop() -> None:
        if residual is None or len(columns) == len(addends):
            raise _Reached

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name == site.id:
            columns.append(sample_columns(inputs, site.spec, *sample_positions(name, start, len(inputs), size, seed)))
            stop()

    def record(values: Tensor) -> None:
        addends.append(sample_values(values, *sample_positions(site.id, start, len(values), size, seed)))
        stop()

    watch = [] if residual is None else [(residual, record)]
    for start, chunk in batches(images):  # noqa: B007 - the taps read it
        try:
            bridge(chunk, tap=tap, watch=watch)
        except _Reached:
            continue
    return torch.cat(columns, dim=1), torch.cat(addends) if addends else None


def refit(
    mod: IRModule,
    sites: Sequence[Site],
    plan: Mapping[str, Choice],
    images: np.ndarray,
    targets: Mapping[str, Target],
    *,
    fisher: Mapping[str, np.ndarray] | None = None,
    known: Callable[[str, str], Factors] | None = None,
    nonlinear: bool = True,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Chain]:
    """Chains of a plan, fitted one after another in network order.

    Parameters
    ----------
    mod : the dense canonical module.
    images : calibration images, float32 NCHW.
    targets : what `dense_outputs` returned for the same images and seed.
    fisher : Fisher information (N, N) of the sites' outputs, which weights their errors where it is given.
    known : the factors of the dense weights of a site, by a method; CP solves start near them.
    nonlinear : minimise the error after residual addition, activation and max-pool, not that of the output itself.
    advance : called after each site.
    """
    chains: dict[str, Chain] = {}
    for site in sites:
        choice = plan.get(site.id, Choice())
        if choice.rank is not None:
            bridge = TorchBridge(replace_sites(mod, chains))
            after, target = epilogue(bridge.function, site.id), targets[site.id]
            residual = after.residual if nonlinear else None
            columns, addend = site_columns(bridge, site, images, residual=residual, seed=seed)
            if wide(site):
                chains[site.id] = _of_weights(site, choice, columns, target)
                advance()
                continue
            factors = known(site.id, choice.method) if known and METHODS[choice.method].starts else None
            near = None if factors is None else factors.weights(choice.rank)
            regression = _Regression(site, choice, columns, (fisher or {}).get(site.id), near)
            if nonlinear:
                chains[site.id] = _through(regression, after, target, addend)
            else:
                chains[site.id] = regression(target.outputs)
        advance()
    return chains


def _of_weights(site: Site, choice: Choice, columns: Tensor, target: Target) -> Chain:
    """The weights-only chain of a site too wide for a regression, with the bias that keeps the mean."""
    assert choice.rank is not None
    chain = decompose(site.weight, site.spec, method=choice.method, rank=choice.rank)
    missing = joined(target.outputs) - chain_outputs(chain, columns)
    return Chain(chain.convs, missing.double().mean(dim=0).float().numpy())


def _through(regression: _Regression, after: Epilogue, target: Target, addend: Tensor | None) -> Chain:
    """The chain fitted to what follows its site; `addend` is the residual operand in the compressed network."""
    site = regression.site
    bias = torch.zeros(site.spec.out_channels) if site.bias is None else torch.from_numpy(site.bias.copy())
    wanted, rest = joined(target.outputs) + bias, bias
    if target.addend is not None and addend is not None:
        # the site can make up for what the other branch lost
        wanted, rest = wanted + target.addend, bias + addend

    def fit(values: Tensor) -> Chain:
        return regression(_split(values - rest, site.spec.groups))

    chain = fit(wanted)
    respond = Response(after.activation, target.floor)
    return chain if respond.linear else refit_through(chain, fit, regression.columns, wanted, rest, respond)


class _Regression:
    """Least squares of any outputs on the columns of a site, by the chains of one choice."""

    def __init__(
        self,
        site: Site,
        choice: Choice,
        columns: Tensor,
        fisher: np.ndarray | None,
        near: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.site, self.choice, self.columns, self.fisher = site, choice, columns, fisher
        self._near = near  # weights of a chain for a similar kernel
        self.moments = moments_of(columns)
        # each direction of the input is regressed as far as its variance carries it
        lifted = self.moments.covariance.copy()
        diagonal = np.arange(lifted.shape[1])
        lifted[:, diagonal, diagonal] += RIDGE * np.trace(lifted, axis1=1, axis2=2)[:, None] / lifted.shape[1] + 1e-30
        self._factors = [linalg.cho_factor(matrix, lower=True) for matrix in lifted]

    def __call__(self, outputs: Tensor) -> Chain:
        """The chain for outputs (g, samples, N/g)."""
        spec, columns = self.site.spec, self.columns
        mean = outputs.double().mean(dim=1).numpy()
        centred = (outputs - torch.from_numpy(mean[:, None].astype("float32"))).transpose(1, 2)
        cross = (centred @ columns).double().numpy() / columns.shape[1]  # (g, N/g, D)
        weight = grouped(self.site.weight, spec)
        missing = cross - weight @ self.moments.covariance
        regressed = weight + np.stack([linalg.cho_solve(f, m.T).T for f, m in zip(self._factors, missing, strict=True)])
        kernel, recipe = regressed.reshape(spec.weight_shape), self.choice
        assert recipe.rank is not None
        chain = decompose(
            kernel,
            spec,
            method=recipe.method,
            rank=recipe.rank,
            moments=self.moments,
            fisher=self.fisher,
            near=self._near,
        )
        self._near = [conv.weight for conv in chain.convs]
        composed = grouped(compose(chain.specs, [conv.weight for conv in chain.convs], spec.groups), spec)
        bias = mean - np.einsum("gnd,gd->gn", composed, self.moments.mean)
        return Chain(chain.convs, bias.reshape(-1).astype(np.float32))


def _split(values: Tensor, groups: int) -> Tensor:
    """(samples, N) as (groups, samples, N/groups)."""
    return values.reshape(len(values), groups, -1).transpose(0, 1)


def moments_of(columns: Tensor) -> Moments:
    """Mean and covariance of (g, samples, D) columns."""
    mean = columns.double().mean(dim=1)
    centred = columns - mean[:, None].float()
    return Moments(mean.numpy(), (centred.transpose(1, 2) @ centred).double().numpy() / columns.shape[1])
