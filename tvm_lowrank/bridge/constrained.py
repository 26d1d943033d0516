"""Networks that are low-rank while they are trained, from the first step on (Tai et al. 2016).

`constrain` replaces layers of a torch module by the factors that a plan names. The result is an ordinary module: any
training loop, `torch.save` and `torch.export` work on it, and the importer folds its batch-norms.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from tvm_lowrank.errors import UserError
from tvm_lowrank.methods import METHODS, ConvSpec, decompose
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.plan import DENSE, Choice, Plan

Layer: TypeAlias = nn.Conv2d | nn.Linear
Start = Literal["fresh", "weights"]


def constrain(
    module: nn.Module,
    plan: Mapping[str, Choice] | Path | str,
    *,
    batch_norm: bool = True,
    initialise: Start = "fresh",
) -> nn.Module:
    """A copy of a module in which each layer that the plan names is an `nn.Sequential` of trainable factors.

        net = tvm_lowrank.constrain(net, {"layer2.0.conv1": Choice("spatial", 48)})

    The factors of a layer are called ``factor1``, ``factor2``, … as in `tvm_lowrank.transform.DecomposeConv2D`, and
    have the geometry of ``METHODS[method].chain_specs``. Only the last one has a bias, if the layer had one and no
    batch-norm follows. What the plan does not name, or calls `dense`, is only copied.

    Parameters
    ----------
    module : any torch module; it stays as it is.
    plan : the choice for each layer by the path of its module (`named_modules`), or the path of a plan's file.
    batch_norm : end each chain with a batch-norm called ``norm``, which makes deep chains trainable. Not needed where
        the module already normalises what these layers compute. After a Linear it takes inputs of shape (batch,
        features).
    initialise : ``"fresh"``: normally distributed factors, drawn from torch's global generator, whose composed kernel
        has the variance of He et al. 2015, 2 / fan-in; ``"weights"``: the decomposition of the present weights. Then
        the result approximates the module (with batch-norm only in evaluation mode: in training mode the outputs are
        normalised).

    Returns
    -------
    The constrained module, its new parameters on the device and of the dtype of those they replace.

    Raises
    ------
    UserError
        If a name is not that of a Conv2d or Linear of the module (those there are are listed), a method is unknown, a
        method or rank does not fit its layer, a layer does not pad with zeros, or the plan cannot be read.

    References
    ----------
    Tai et al., *Convolutional neural networks with low-rank regularization*, ICLR 2016.
    """
    if initialise not in ("fresh", "weights"):
        raise UserError(f"initialise is {initialise!r}; use 'fresh' or 'weights'")
    choices = Plan.of(plan)
    result = copy.deepcopy(module)
    layers = {path: layer for path, layer in result.named_modules() if path and type(layer) in (nn.Conv2d, nn.Linear)}
    places = list(result.named_modules(remove_duplicate=False))  # a layer may be in several
    for site, choice in choices.items():
        if site not in layers:
            raise UserError(_not_a_layer(site, result, layers))
        layer = layers[site]
        assert isinstance(layer, Layer)
        specs = _checked_specs(site, layer, choice)
        if choice.method == DENSE:
            continue
        weights = _drawn(specs) if initialise == "fresh" else _decomposed(site, layer, choice)
        chain = _chain(layer, specs, weights, batch_norm=batch_norm)
        if initialise == "weights":
            _keep_outputs(chain, layer)
        for path, other in places:
            if other is layer:
                result.set_submodule(path, chain)
    return result


def _not_a_layer(site: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    found = dict(module.named_modules()).get(site)
    problem = f"the module has no {site!r}" if found is None or not site else f"{site!r} is a {type(found).__name__}"
    return f"{problem}; a plan can name Conv2d and Linear layers, which here are: {', '.join(layers) or 'none'}"


def _checked_specs(site: str, layer: Layer, choice: Choice) -> tuple[ConvSpec, ...]:
    """The geometry of a layer's factors; none if it stays dense."""
    if not isinstance(choice, Choice):
        raise UserError(f"plan entry {site!r} is {choice!r}; give a Choice such as Choice('spatial', 32)")
    if choice.rank is None:
        return ()
    if choice.method not in METHODS:
        raise UserError(f"plan entry {site!r}: unknown method {choice.method!r}; known are {', '.join(METHODS)}")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise UserError(f"{site!r} has padding_mode {layer.padding_mode!r}; only 'zeros' can be factorised")
    method, spec = METHODS[choice.method], _spec(layer)
    try:
        method.check(spec, choice.rank)
        return method.chain_specs(spec, choice.rank)
    except ValueError as error:
        raise UserError(f"plan entry {site!r}: {error}; choose another method or rank") from error


def _spec(layer: Layer) -> ConvSpec:
    if isinstance(layer, nn.Linear):
        return ConvSpec(layer.in_features, layer.out_features, (1, 1))
    (height, width), (down, across) = layer.kernel_size, layer.dilation
    if layer.padding == "same":
        rows, columns = down * (height - 1), across * (width - 1)
        padding = (rows // 2, columns // 2, rows - rows // 2, columns - columns // 2)
    else:
        top, left = (0, 0) if isinstance(layer.padding, str) else layer.padding
        padding = (top, left, top, left)
    strides = (layer.stride[0], layer.stride[1])
    return ConvSpec(
        layer.in_channels, layer.out_channels, (height, width), strides, padding, (down, across), layer.groups
    )


def _drawn(specs: Sequence[ConvSpec]) -> tuple[np.ndarray, ...]:
    """Random OIHW factors that multiply the variance of white noise by 2 together, as He's initialisation does.

    Their kernel then has He's variance, for each of its entries is the sum of equally many products of weights.
    """
    share = 2 ** (1 / len(specs))
    deviations = [math.sqrt(share / math.prod(spec.weight_shape[1:])) for spec in specs]
    return balance(specs, [d * torch.randn(s.weight_shape).numpy() for s, d in zip(specs, deviations, strict=True)])


def _decomposed(site: str, layer: Layer, choice: Choice) -> tuple[np.ndarray, ...]:
    spec = _spec(layer)
    weight = layer.weight.detach().float().cpu().numpy().reshape(spec.weight_shape)
    if not np.isfinite(weight).all():
        raise UserError(f"the weight of {site!r} has entries that are not finite; use initialise='fresh'")
    assert choice.rank is not None  # `_checked_specs` was asked first
    chain = decompose(weight, spec, method=choice.method, rank=choice.rank)
    return tuple(conv.weight for conv in chain.convs)


def _chain(
    layer: Layer, specs: Sequence[ConvSpec], weights: Sequence[np.ndarray], *, batch_norm: bool
) -> nn.Sequential:
    """The factors, and a batch-norm if wanted, in the layer's place; the bias is zero."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (spec, weight) in enumerate(zip(specs, weights, strict=True), 1):
        factor = _factor(layer, spec, bias=i == len(specs) and layer.bias is not None and not batch_norm)
        with torch.no_grad():
            factor.weight.copy_(torch.from_numpy(weight).reshape(factor.weight.shape))
            if factor.bias is not None:
                factor.bias.zero_()
        parts[f"factor{i}"] = factor
    if batch_norm:
        norm = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
        parts["norm"] = norm(specs[-1].out_channels, device=layer.weight.device, dtype=layer.weight.dtype)
    return nn.Sequential(parts).train(layer.training)


def _factor(layer: Layer, spec: ConvSpec, *, bias: bool) -> Layer:
    device, dtype = layer.weight.device, layer.weight.dtype
    if isinstance(layer, nn.Linear):
        return nn.Linear(spec.in_channels, spec.out_channels, bias=bias, device=device, dtype=dtype)
    top, left, bottom, right = spec.padding
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel,
        spec.strides,
        # more on one side than on the other is only what "same" does to an even kernel
        (top, left) if (top, left) == (bottom, right) else "same",
        spec.dilation,
        spec.groups,
        bias=bias,
        device=device,
        dtype=dtype,
    )


@torch.no_grad()
def _keep_outputs(chain: nn.Sequential, layer: Layer) -> None:
    """Give the end of the chain the layer's bias; a batch-norm is to add it and, in evaluation mode, no more."""
    last = chain[-1]
    if isinstance(last, nn.BatchNorm1d | nn.BatchNorm2d):
        assert last.running_var is not None
        last.running_var.fill_(1 - last.eps)
    if layer.bias is not None:
        assert isinstance(last.bias, torch.Tensor)
        last.bias.copy_(layer.bias)
