"""The networks of plans, fitted: without labels and with them, by one worker or by several."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.data.training_data import Batches
from tvm_lowrank.errors import TimeUp
from tvm_lowrank.graph import find_sites
from tvm_lowrank.methods import Chain
from tvm_lowrank.plan import Choice, Plan, formats_in
from tvm_lowrank.precision import grid_texts, parsed, with_grids
from tvm_lowrank.searching.choose.fitted import FittedNetworks
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.fit.finetune import Judged, Settings, finetune
from tvm_lowrank.searching.fit.reconstruct import affordable, reconstruct_if_better
from tvm_lowrank.searching.fit.refit import refit
from tvm_lowrank.searching.fit.torchrun import Workers
from tvm_lowrank.transform import replace_sites, shaped

Fit = Literal["decomposed", "refitted", "reconstructed", "finetuned"]
RECONSTRUCTION_SHARE = 0.3  # of the time that is left, for one plan


@dataclass(frozen=True)
class Training:
    """Labelled batches, and how the networks of plans learn from them.

    Parameters
    ----------
    batches : of an epoch, by its number.
    name : tells what one training gave from what another did.
    epochs : passes over the images, for each stage.
    stages : parts of the network, from its input to its output, of which one after another is decomposed and the
        whole then trained (Lebedev et al. 2015 went on layer by layer).
    """

    batches: Batches
    name: str
    epochs: int
    stages: int = 1
    workers: Workers = field(default_factory=Workers)
    seed: int = 0

    def run(
        self,
        bridge: TorchBridge,
        teacher: TorchBridge,
        judge: Callable[[TorchBridge], Judged],
        folder: Path,
        deadline: float,
    ) -> None:
        """Train a network in place; every worker must do so."""
        settings = Settings(epochs=self.epochs, seed=self.seed)
        finetune(
            bridge,
            self.batches,
            settings,
            teacher=teacher,
            judge=judge,
            folder=folder,
            key=self.name,
            workers=self.workers,
            deadline=deadline,
        )


class Networks:
    """The network of each plan, fitted in a way that goes on from the one before, once.

    decomposed : each chain by itself, in the norm of the data and of the loss.
    refitted : the last factors one after another, to the calibration images (`tvm_lowrank.searching.fit.refit`).
    reconstructed : all parameters together, to the calibration images, or as it was if that was nearer to the dense
        network on the selection images, without their labels (`tvm_lowrank.searching.fit.reconstruct`). From twelve
        passes nothing is better when it was refitted first; networks too large for them are refitted instead.
    finetuned : then with labels (`tvm_lowrank.searching.fit.finetune`); or decomposed and trained in stages.

    Parameters
    ----------
    selection : images on which reconstructions are compared, float32 NCHW.
    judge : a network on the selection split, by whose damage the best epoch is chosen; needed for `training`.
    folder : where fitted networks and checkpoints are kept; needed for `training`.
    deadline : as `time.monotonic` counts; training that would not end before raises TimeUp.
    """

    def __init__(
        self,
        sensitivity: Sensitivity,
        selection: Images,
        judge: Callable[[TorchBridge], Judged] | None = None,
        *,
        folder: Path | None = None,
        training: Training | None = None,
        deadline: float = float("inf"),
    ) -> None:
        self.mod = sensitivity.mod
        self.training = training
        self._known = sensitivity
        self._selection, self._judge = selection, judge
        self._folder, self._deadline = folder, deadline
        self._fitted = FittedNetworks(self.mod, folder)

    def _check(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeUp

    @property
    def best_fit(self) -> Fit:
        """The best that can be done."""
        return self.recovery if self.training is None else "finetuned"

    @cached_property
    def recovery(self) -> Fit:
        """The best that can be done without labels."""
        return "reconstructed" if affordable(self.mod, len(self._known.images)) else "refitted"

    def __call__(self, plan: Plan, fit: Fit) -> IRModule:
        """The network of a plan, fitted in this way."""
        how = {
            "decomposed": self.decomposed,
            "refitted": self.refitted,
            "reconstructed": self.reconstructed,
            "finetuned": self.finetuned,
        }
        return how[fit](plan)

    def decomposed(self, plan: Plan) -> IRModule:
        return self._fitted.once(plan, "decomposed", lambda: self._known.network(plan))

    def refitted(self, plan: Plan) -> IRModule:
        return self._fitted.once(plan, "refitted", lambda: self._refit(self.mod, plan, self._known.chain))

    def reconstructed(self, plan: Plan) -> IRModule:
        def fit() -> IRModule:
            images, seed = self._known.images, self._known.seed
            decomposed = self.decomposed(plan)
            self._check()
            limit = RECONSTRUCTION_SHARE * (self._deadline - time.monotonic())
            return reconstruct_if_better(
                self.mod, decomposed, images, self._selection, limit=limit, seed=seed, check=self._check
            )

        return self._fitted.once(plan, "reconstructed", fit)

    def finetuned(self, plan: Plan) -> IRModule:
        assert self.training is not None
        if self.training.stages == 1:
            return self._trained(plan, "finetuned", lambda: self(plan, self.recovery))
        return self._in_stages(plan, self.training.stages)

    def _in_stages(self, plan: Plan, stages: int) -> IRModule:
        network, sofar = self.mod, Plan()
        names = [name for name in self._known.sites if name in plan]
        parts = [list(part) for part in np.array_split(names, min(stages, len(names))) if len(part)]
        for number, part in enumerate(parts, 1):
            own = {name: plan[name] for name in part}
            sofar = Plan({**sofar, **own})
            label = f"stage {number} of {len(parts)} of {plan.to_json()}"
            console.phase(f"stage {number} of {len(parts)}: {', '.join(part)}")

            def start(network: IRModule = network, own: Mapping[str, Choice] = own) -> IRModule:
                return self._refit(network, own)

            def begun(sofar: Plan = sofar, label: str = label, start: Callable[[], IRModule] = start) -> IRModule:
                return self._fitted.once(sofar, f"{label}, {self._name}", start)

            network = self._trained(sofar, f"finetuned, {label}", begun)
        return network

    def _refit(
        self, network: IRModule, plan: Mapping[str, Choice], start: Callable[[str, Choice], Chain] | None = None
    ) -> IRModule:
        """A network with dense sites replaced by the chains of a plan, which do what the sites of the dense one did."""
        known, sites, formats = self._known, find_sites(network), formats_in(plan)
        plan = {name: choice.float32 for name, choice in plan.items() if choice.rank is not None}
        with console.progress("refitting", len(sites)) as advance:
            chains = refit(
                network,
                sites,
                plan,
                known.sampled,
                known.targets(self._check),
                fisher=known.fisher,
                known=known.weights,
                start=start,
                seed=known.seed,
                folder=known.folder,
                check=self._check,
                advance=advance,
            )
        return known.calibrated(replace_sites(network, chains, formats=formats))

    @property
    def _name(self) -> str:
        assert self.training is not None
        return self.training.name

    def _trained(self, plan: Plan, how: str, start: Callable[[], IRModule]) -> IRModule:
        def fit() -> IRModule:
            training, folder = self.training, self._folder
            assert training is not None and folder is not None and self._judge is not None
            bridge = TorchBridge(start())
            # the others wait for it, in `follow`
            training.workers.of_first(lambda: _started(plan, bridge.function))
            training.run(bridge, TorchBridge(self.mod), self._judge, folder, self._deadline)
            return bridge.to_relax()

        return self._fitted.once(plan, f"{how}, {self._name}", fit)


def _started(plan: Plan, function: relax.Function) -> str:
    """What other workers must know of a network that is trained, besides its parameters."""
    return json.dumps({"plan": plan.to_json(), "grids": grid_texts(function)})


def follow(mod: IRModule, training: Training) -> None:
    """What workers besides the first do during a search: train each network that it trains, until `dismiss`."""

    def nobody(bridge: TorchBridge) -> Judged:
        raise AssertionError("only the first worker judges")

    while (text := training.workers.of_first(str)) is not None:
        begun = json.loads(text)
        bridge = TorchBridge(with_grids(shaped(mod, Plan.from_json(begun["plan"])), parsed(begun["grids"])))
        with suppress(TimeUp):
            training.run(bridge, TorchBridge(mod), nobody, Path(), float("inf"))


def dismiss(workers: Workers) -> None:
    """Let the workers that `follow` go, when the search has ended."""
    workers.of_first(lambda: None)
