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
from pathlib import Path

import numpy as np
import torch
from scipy import linalg
from torch import Tensor
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.epilogue import Epilogue, epilogue
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bridge.torch_nn import chain as chain_function
from tvm_lowrank.data.images import Images
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import METHODS, Chain, Moments, SampledMoments, decompose, grouped
from tvm_lowrank.methods.chain import response
from tvm_lowrank.methods.moments import wide
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.fit.nonlinear import BLOCK, Response, joined, refit_last_factor, refit_through
from tvm_lowrank.searching.fit.sweep import Sweep
from tvm_lowrank.searching.fit.targets import Target, split
from tvm_lowrank.searching.fit.waiting import give_back

RIDGE = 1e-2  # pulls B towards the dense kernel where the calibration images say little


def site_columns(
    bridge: TorchBridge,
    site: Site,
    images: Images,
    *,
    residual: relax.Var | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`Sweep.columns` of one site of a network."""
    return Sweep(bridge, [site], images, seed=seed).columns(site, residual)


def refit(
    mod: IRModule,
    sites: Sequence[Site],
    plan: Mapping[str, Choice],
    images: Images,
    targets: Mapping[str, Target],
    *,
    fisher: Mapping[str, np.ndarray] | None = None,
    known: Callable[[str, Choice], Sequence[np.ndarray]] | None = None,
    start: Callable[[str, Choice], Chain] | None = None,
    nonlinear: bool = True,
    seed: int = 0,
    folder: Path | None = None,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Chain]:
    """Chains of a plan, fitted one after another in network order.

    Parameters
    ----------
    mod : the dense canonical module.
    images : calibration images, float32 NCHW.
    targets : what `tvm_lowrank.searching.fit.targets.dense_outputs` returned for the same images and seed.
    fisher : Fisher information (N, N) of the sites' outputs, which weights their errors where it is given.
    known : OIHW weights of the chain of a dense site; CP solves start near them.
    start : the chain of a site, of which only the last factor and the bias are then fitted. It takes half the time,
        and loses nothing where there are few samples for a regression: with a ResNet-50 0.028 nats instead of 0.032.
    nonlinear : minimise the error after residual addition, activation and max-pool, not that of the output itself.
    folder : where images may wait between the sites.
    check : called often; what it raises ends the refit.
    advance : called after each site.
    """
    chains: dict[str, Chain] = {}
    bridge = TorchBridge(mod)
    sweep = Sweep(bridge, sites, images, folder=folder, seed=seed, check=check)
    for site in sites:
        choice = plan.get(site.id, Choice())
        if choice.rank is not None:
            after, target = epilogue(bridge.function, site.id), targets[site.id]
            columns, addend = sweep.columns(site, after.residual if nonlinear else None)
            weighting = (fisher or {}).get(site.id)
            own = start(site.id, choice) if start else None
            if own is None and wide(site.spec):
                own = _of_samples(site, choice, columns, weighting)
            if own is not None:
                _, fitted = refit_last_factor(own, columns, *_goal(site, after, target, addend))
            else:
                near = known(site.id, choice) if known and METHODS[choice.method].starts else None
                regression = _Regression(site, choice, columns, weighting, near)
                check()
                fitted = _through(regression, after, target, addend) if nonlinear else regression(target.outputs)
            sweep.replace(site.id, chain_function(fitted.convs, fitted.bias_correction))
            chains[site.id] = fitted
            give_back()
        advance()
    return chains


def _of_samples(site: Site, choice: Choice, columns: Tensor, fisher: np.ndarray | None) -> Chain:
    """The chain of a wide site's own kernel: there are fewer samples than inputs to regress on."""
    assert choice.rank is not None
    moments = SampledMoments.of(columns.numpy())
    return decompose(site.weight, site.spec, method=choice.method, rank=choice.rank, moments=moments, fisher=fisher)


def _goal(site: Site, after: Epilogue, target: Target, addend: Tensor | None) -> tuple[Tensor, Tensor, Response]:
    """What the site is to make, what is added to it, and what sees it, as in `refit_through`.

    `addend` is the residual operand in the compressed network: the site can make up for what the other branch lost.
    """
    bias = torch.zeros(site.spec.out_channels) if site.bias is None else torch.from_numpy(site.bias.copy())
    wanted, rest = joined(target.outputs) + bias, bias
    if target.addend is not None and addend is not None:
        wanted, rest = wanted + target.addend, bias + addend
    return wanted, rest, Response(after.activation, target.floor)


def _through(regression: _Regression, after: Epilogue, target: Target, addend: Tensor | None) -> Chain:
    """The chain that is regressed and decomposed anew, fitted to what follows its site."""
    wanted, rest, respond = _goal(regression.site, after, target, addend)

    def fit(values: Tensor) -> Chain:
        return regression(split(values - rest, regression.site.spec.groups))

    chain = fit(wanted)
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
        self._factors = [linalg.cho_factor(matrix, lower=True, overwrite_a=True) for matrix in lifted]

    def __call__(self, outputs: Tensor) -> Chain:
        """The chain for outputs (g, samples, N/g)."""
        spec, choice = self.site.spec, self.choice
        assert choice.rank is not None
        mean = outputs.double().mean(dim=1).numpy()
        chain = decompose(
            self._kernel(outputs, mean),
            spec,
            method=choice.method,
            rank=choice.rank,
            moments=self.moments,
            fisher=self.fisher,
            near=self._near,
        )
        self._near = [conv.weight for conv in chain.convs]
        column = self.moments.mean.reshape(-1, *spec.weight_shape[2:])
        bias = mean.reshape(-1) - response(chain.specs, self._near, column)
        return Chain(chain.convs, bias.astype(np.float32))

    def _kernel(self, outputs: Tensor, mean: np.ndarray) -> np.ndarray:
        """The OIHW kernel that makes outputs of this mean (g, N/g) of the columns."""
        spec = self.site.spec
        centred = (outputs - torch.from_numpy(mean[:, None].astype("float32"))).transpose(1, 2)
        cross = (centred @ self.columns).double().numpy() / self.columns.shape[1]  # (g, N/g, D)
        weight = grouped(self.site.weight, spec)
        missing = cross - weight @ self.moments.covariance
        regressed = weight + np.stack([linalg.cho_solve(f, m.T).T for f, m in zip(self._factors, missing, strict=True)])
        return regressed.reshape(spec.weight_shape)


def moments_of(columns: Tensor) -> Moments:
    """Mean and covariance of (g, samples, D) columns, summed in double precision over blocks of the samples."""
    groups, samples, depth = columns.shape
    mean = torch.zeros(groups, depth, dtype=torch.float64)
    for part in columns.split(BLOCK, dim=1):
        mean += part.double().sum(dim=1) / samples
    covariance = torch.zeros(groups, depth, depth, dtype=torch.float64)
    for part in columns.split(BLOCK, dim=1):
        centred = part - mean[:, None].float()
        covariance += centred.mT @ centred
    return Moments.of(mean.numpy(), (covariance / samples).numpy(), samples)
