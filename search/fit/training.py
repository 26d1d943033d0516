"""What every training of a network has in common: balanced factors, losses, the shape of the rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank.bridge.answers import Meaning
from tvm_lowrank.bridge.half import Fast
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import bindings, chain_of, conv_spec, is_site
from tvm_lowrank.methods.chain import ConvSpec
from tvm_lowrank.methods.common.balance import balance
from tvm_lowrank.precision import formats_of, operand_formats, with_formats, without_formats

FEATURES = 10.0  # weight of the inputs' relative errors against the divergence in nats


class Learner(Fast):
    """A canonical network in training; its parameters stay float32.

    The factors of a chain are balanced first: a decomposition may leave one of them fifty times smaller than the
    other, and then no learning rate fits both. Where one reads in int8 they are `balanced` already, before its grid was
    found.

    Parameters
    ----------
    net : the module, or a bridge of it; it stays as it is.
    learns : whether the parameters get gradients.
    """

    def __init__(
        self, net: IRModule | TorchBridge, *, device: torch.device | None = None, learns: bool = False
    ) -> None:
        bridge = deepcopy(net) if isinstance(net, TorchBridge) else TorchBridge(net)
        if learns:
            _balance(bridge, but=_whole(bridge.function))
        super().__init__(bridge, device)
        self.bridge.requires_grad_(learns)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights and biases."""
        return list(self.bridge.parameters())

    def network(self) -> IRModule:
        """The module with the present parameters."""
        return self.bridge.to_relax()


def values_of(net: TorchBridge) -> list[Tensor]:
    """Copies of the parameters, on the CPU."""
    return [values.detach().to("cpu", copy=True) for values in net.parameters()]


@torch.no_grad()
def assign(net: TorchBridge, values: Sequence[Tensor]) -> None:
    """Give a network the parameters that `values_of` returned."""
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.copy_(value)


def ramp(done: float, warm_up: float) -> float:
    """The learning rate as a part of the highest when a share `done` of the training is over: up, then a cosine."""
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


Watched = tuple[dict[str, Tensor], Tensor]


def watched(learner: Learner, images: Tensor) -> Watched:
    """The inputs of the sites of the dense network, by their names, and the output, for images (n, C, H, W)."""
    inputs: dict[str, Tensor] = {}

    def tap(name: str, values: Tensor, _: Tensor) -> None:
        inputs.setdefault(chain_of(name), values)  # the first factor has the input of the chain

    output = learner(images, tap=tap)
    return inputs, output


def imitation(
    wanted: Watched, got: Watched, answers: Meaning, *, temperature: float = 1.0, features: float = FEATURES
) -> Tensor:
    """How far a network, as `watched`, is from what is wanted: its answers, and with a weight the inputs of its sites.

    Of answers this is the divergence in nats, by what they mean; of inputs the mean squared error relative to the mean
    square.
    """
    (inputs, output), (own_inputs, own_output) = wanted, got
    loss = answers.divergences(output, own_output, temperature=temperature).mean()
    return loss + features * features_error(inputs, own_inputs)


def features_error(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Tensor:
    """The sum over all sites of the relative errors of their inputs."""
    return torch.stack([_relative_error(values, got[name]) for name, values in wanted.items()]).sum()


def _relative_error(wanted: Tensor, got: Tensor) -> Tensor:
    wanted, got = wanted.float(), got.float()
    return (wanted - got).square().mean() / wanted.square().mean().clamp_min(1e-30)


def parameter_groups(net: TorchBridge) -> list[dict[str, Any]]:
    """All parameters, by the groups of convolutions they are of: as `tvm_lowrank.searching.fit.muon.Muon` wants them.

    The factors of a chain share a rate, for their relative errors add.
    """
    specs = _specs(net)
    lengths = Counter(map(chain_of, specs))
    kinds = {
        id(net.site_parameters(name).weight): (spec.groups, 1 / lengths[chain_of(name)]) for name, spec in specs.items()
    }
    groups: dict[tuple[int, float], list[Tensor]] = {}
    for values in net.parameters():
        groups.setdefault(kinds.get(id(values), (1, 1.0)), []).append(values)
    return [{"params": params, "blocks": blocks, "share": share} for (blocks, share), params in groups.items()]


def balanced(mod: IRModule) -> IRModule:
    """The module with balanced factors, if some of its chains read in int8: their grids are to be found after that."""
    function = mod["main"]
    if not _whole(function):
        return mod
    bridge = TorchBridge(without_formats(mod))
    _balance(bridge)
    return with_formats(bridge.to_relax(), formats_of(function))


def _whole(function: relax.Function) -> set[str]:
    """The chains, by their sites, of which a factor reads in int8."""
    formats = operand_formats(function).items()
    return {chain_of(name) for name, format in formats if format.whole and chain_of(name) != name}


@torch.no_grad()
def _balance(net: TorchBridge, but: Collection[str] = ()) -> None:
    """Scale the factors of each chain, ``but`` of some, until they have one norm; what the network computes stays."""
    specs = _specs(net)
    chains: dict[str, list[str]] = {}
    for name in specs:
        if chain_of(name) not in {name, *but}:
            chains.setdefault(chain_of(name), []).append(name)
    for names in chains.values():
        weights = [net.site_parameters(name).weight for name in names]
        balanced = balance([specs[name] for name in names], [weight.cpu().numpy() for weight in weights])
        for weight, values in zip(weights, balanced, strict=True):
            weight.copy_(torch.from_numpy(values))


def _specs(net: TorchBridge) -> dict[str, ConvSpec]:
    return {b.var.name: conv_spec(b.value) for b in bindings(net.function) if is_site(b.value)}
