"""Asymmetric refit: each chain is fitted to the dense network's outputs from the compressed network's inputs.

The sites are visited in network order. With x the site's input columns in the network compressed so far and y the
dense network's outputs, the best unrestricted kernel is the regression B = Cov(y, x) Cov(x)^-1, and the best chain is
the decomposition of B in the norm of Cov(x): E|y - Mx|^2 = const + |(B - M) Cov(x)^(1/2)|^2. For `channel` this is the
closed form of Zhang et al. 2015, section 3.2; it holds for every method that minimises the error in that norm. No
labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tvm.ir import IRModule

from tvm_lowrank.bridge import TorchBridge
from tvm_lowrank.calibrate import sample_columns, sample_positions
from tvm_lowrank.decompose import Chain, Moments, Rank, compose, decompose, grouped
from tvm_lowrank.graph import Site
from tvm_lowrank.plan import Choice
from tvm_lowrank.transform import replace_sites

RIDGE = 1e-2  # pulls B towards the dense kernel where the calibration images say little


class _Reached(Exception):
    """Ends a forward pass at the site of interest."""


@torch.no_grad()
def dense_outputs(
    bridge: TorchBridge, sites: Sequence[Site], images: np.ndarray, *, batch: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """The outputs (g, samples, N/g) of each site at its sampled positions, before the bias."""
    wanted = {site.id: site for site in sites}
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    start = 0

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name in wanted:
            n, _, height, width = outputs.shape
            rows, cols = sample_positions(name, start, n, (height, width), seed)
            picked = outputs.permute(0, 2, 3, 1)[torch.arange(n).view(-1, 1), rows, cols].flatten(0, 1)
            parts[name].append(picked.reshape(len(picked), wanted[name].spec.groups, -1).transpose(0, 1))

    for start in range(0, len(images), batch):
        bridge(torch.from_numpy(images[start : start + batch]), tap=tap)
    return {name: torch.cat(chunks, dim=1) for name, chunks in parts.items()}


@torch.no_grad()
def site_columns(mod: IRModule, site: Site, images: np.ndarray, *, batch: int = 100, seed: int = 0) -> Tensor:
    """The columns (g, samples, D) that a still dense site of a module multiplies at its sampled positions."""
    parts: list[Tensor] = []
    start = 0

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name == site.id:
            rows, cols = sample_positions(name, start, len(inputs), (outputs.shape[2], outputs.shape[3]), seed)
            parts.append(sample_columns(inputs, site.spec, rows, cols))
            raise _Reached

    bridge = TorchBridge(mod)
    for start in range(0, len(images), batch):
        try:
            bridge(torch.from_numpy(images[start : start + batch]), tap=tap)
        except _Reached:
            continue
    return torch.cat(parts, dim=1)


def refit(
    mod: IRModule,
    sites: Sequence[Site],
    plan: Mapping[str, Choice],
    images: np.ndarray,
    targets: Mapping[str, Tensor],
    *,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Chain]:
    """Chains of a plan, fitted one after another in network order.

    Parameters
    ----------
    mod : the dense canonical module.
    images : calibration images, float32 NCHW.
    targets : what `dense_outputs` returned for the same images and seed.
    advance : called after each site.
    """
    chains: dict[str, Chain] = {}
    for site in sites:
        choice = plan.get(site.id, Choice())
        if choice.rank is not None:
            columns = site_columns(replace_sites(mod, chains), site, images, seed=seed)
            chains[site.id] = _fit(site, choice.method, choice.rank, columns, targets[site.id])
        advance()
    return chains


def _fit(site: Site, method: str, rank: Rank, columns: Tensor, target: Tensor) -> Chain:
    moments = moments_of(columns)
    mean_target = target.double().mean(dim=1).numpy()
    centred = (target - torch.from_numpy(mean_target[:, None].astype("float32"))).transpose(1, 2)
    cross = (centred @ columns).double().numpy() / columns.shape[1]  # (g, N/g, D)
    weight = grouped(site.weight, site.spec)
    # each direction of the input is regressed as far as its variance carries it
    lifted = moments.covariance.copy()
    diagonal = np.arange(lifted.shape[1])
    lifted[:, diagonal, diagonal] += RIDGE * np.trace(lifted, axis1=1, axis2=2)[:, None] / lifted.shape[1]
    missing = cross - weight @ moments.covariance
    regressed = weight + np.linalg.solve(lifted, missing.transpose(0, 2, 1)).transpose(0, 2, 1)
    kernel = regressed.reshape(site.spec.weight_shape)
    chain = decompose(kernel, site.spec, method=method, rank=rank, moments=moments)
    composed = grouped(compose(chain.specs, [conv.weight for conv in chain.convs], site.spec.groups), site.spec)
    bias = mean_target - np.einsum("gnd,gd->gn", composed, moments.mean)
    return Chain(chain.convs, bias.reshape(-1).astype(np.float32))


def moments_of(columns: Tensor) -> Moments:
    """Mean and covariance of (g, samples, D) columns."""
    mean = columns.double().mean(dim=1)
    centred = columns - mean[:, None].float()
    return Moments(mean.numpy(), (centred.transpose(1, 2) @ centred).double().numpy() / columns.shape[1])
