"""What the data say of each site by itself: its statistics, its factorisations, and what each form of it would cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.bridge.calibrate import each_fisher, each_moments, predict, predict_each
from tvm_lowrank.bridge.grids import calibrated
from tvm_lowrank.bridge.ranges import largest_operands
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import Images
from tvm_lowrank.data.synthetic import shrunk
from tvm_lowrank.graph import Site, find_sites
from tvm_lowrank.methods import METHODS, AnyMoments, Chain, Factors, cut, factorise
from tvm_lowrank.plan import Choice, formats_in
from tvm_lowrank.precision import with_formats
from tvm_lowrank.searching.candidates import candidates, site_macs
from tvm_lowrank.searching.damage import DamageCurve, divergence, interpolated, probes, to_solve
from tvm_lowrank.searching.fit.samples import apart, sampled
from tvm_lowrank.searching.fit.targets import Targets, dense_outputs
from tvm_lowrank.searching.fit.training import balanced
from tvm_lowrank.searching.fit.waiting import Shelf, give_back
from tvm_lowrank.searching.journal import Journal
from tvm_lowrank.transform import replace_sites

T = TypeVar("T")

PROBE_IMAGES, FEWEST_IMAGES = 500, 50
PROBE_MACS = 2e11  # of a probe: large networks are probed with fewer images
# at most, of all images. Statistics do not see them: the last layer of a ResNet-50 at rank 384, of whose 2,048 inputs
# there were 375 samples, loses 0.002 nats on their images and 0.18 on others
PROBE_SHARE = 0.2
HARDLY = 0.05  # part of the first damage limit that rounding all sites may take without a look at each
LARGE = 2**27  # bytes of a covariance


class Sensitivity:
    """How the answers of a network depend on each of its sites, computed when first needed.

    Parameters
    ----------
    mod : the dense canonical module.
    images : calibration images, float32 NCHW; ``sampled`` are those that gradients and the refit look at, ``probed``
        those that probes do.
    methods, lanes : of the candidates; ranks are multiples of `lanes`.
    share : damage in nats that a site may take in a likely plan of all sites; probes are chosen around it.
    examined : ids of the sites whose statistics are needed; None are those that have candidates.
    synthetic : the images stand in for data that there is not.
    folder : where what is known of the sites waits in files.
    """

    def __init__(
        self,
        mod: IRModule,
        images: Images,
        *,
        methods: Sequence[str] = (),
        lanes: int = 1,
        share: float = 0.01,
        examined: Iterable[str] | None = None,
        synthetic: bool = False,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.mod, self.images, self.seed = mod, images, seed
        self.sites = {site.id: site for site in find_sites(mod)}
        sites = list(self.sites.values())
        wanted = int(np.clip(PROBE_MACS / max(1, sum(site.macs for site in sites)), FEWEST_IMAGES, PROBE_IMAGES))
        self.probed, self._rest = apart(images, max(1, min(wanted, int(PROBE_SHARE * len(images)))))
        self.sampled = sampled(self._rest, sites)
        self._bridge = TorchBridge(mod)
        self._methods, self._lanes, self._synthetic = methods, lanes, synthetic
        self._share, self._wanted = share, None if examined is None else set(examined)
        self.folder = folder
        self._targets: Targets | None = None
        self._kept: Shelf[Factors] = Shelf(folder)
        self._chains: Shelf[Chain] = Shelf(folder)  # of candidates that were decomposed by themselves
        self._to_probe: Shelf[Chain] = Shelf(folder)  # likewise, but they depend on what was factorised beside them

    @cached_property
    def candidates(self) -> dict[str, list[Choice]]:
        """What each site may become, besides dense."""
        return {name: candidates(site, methods=self._methods, lanes=self._lanes) for name, site in self.sites.items()}

    @cached_property
    def moments(self) -> Shelf[AnyMoments]:
        """Input statistics of the examined sites, in the dense network."""
        return self._collected_moments()

    def _collected_moments(self) -> Shelf[AnyMoments]:
        shelf: Shelf[AnyMoments] = Shelf(self.folder)
        with console.progress("calibrating", len(self._rest)) as advance:
            found = each_moments(self._bridge, self._examined, self._rest, seed=self.seed, advance=advance)
            for name, own in found:
                shelf.put(name, shrunk(own) if self._synthetic else own)
        give_back()
        return shelf

    @cached_property
    def fisher(self) -> Shelf[np.ndarray]:
        """Fisher information of the outputs of the examined sites, in the dense network."""
        return self._collected_fisher()

    def _collected_fisher(self) -> Shelf[np.ndarray]:
        shelf: Shelf[np.ndarray] = Shelf(self.folder)
        with console.progress("weighing errors", len(self.sampled)) as advance:
            for name, own in each_fisher(self._bridge, self._examined, self.sampled, seed=self.seed, advance=advance):
                shelf.put(name, own)
        give_back()
        return shelf

    def targets(self, check: Callable[[], None]) -> Targets:
        """What the dense network computes at every examined site, for the refit.

        ``check`` is called after each batch of images, and may end the work by raising.
        """
        if self._targets is None:
            with console.progress("targets of the refit", len(self.sampled)) as advance:

                def done(images: int) -> None:
                    advance(images)
                    check()

                self._targets = dense_outputs(
                    self._bridge, self._examined, self.sampled, seed=self.seed, folder=self.folder, advance=done
                )
        return self._targets

    def factors(self, name: str, method: str) -> Factors:
        """The factorisation of a site; where others start from what it has solved, it was kept."""
        known = self._kept.get(f"{name} {method}")
        return self._factorised(name, method, self.moments[name]) if known is None else known

    def weights(self, name: str, choice: Choice) -> tuple[np.ndarray, ...]:
        """OIHW weights of the chain of a candidate, decomposed by itself; what was solved for them is kept."""
        assert choice.rank is not None
        factors = self.factors(name, choice.method)
        found = factors.weights(choice.rank)
        self._kept.put(f"{name} {choice.method}", factors)
        return found

    def _factorised(self, name: str, method: str, moments: AnyMoments) -> Factors:
        site = self.sites[name]
        return factorise(site.weight, site.spec, method=method, moments=moments, fisher=self.fisher[name])

    def network(self, plan: Mapping[str, Choice]) -> IRModule:
        """The network of a plan whose chains were decomposed one by one, in the norm of the data, and not fitted."""
        chosen = {name: choice.float32 for name, choice in plan.items() if choice.rank is not None}
        unknown = [name for name, choice in chosen.items() if f"{name} {choice}" not in self._chains]
        if unknown:
            _ = self.moments, self.fisher  # by all cores, before each core has a site of its own
            for _ in self._each(lambda name: self.chain(name, chosen[name]), unknown, "decomposing"):
                pass
        chains = {name: self.chain(name, choice) for name, choice in chosen.items()}
        return self.calibrated(replace_sites(self.mod, chains, formats=formats_in(plan)))

    def calibrated(self, network: IRModule) -> IRModule:
        """A network with grids for what its chains read in int8; the sites have theirs."""
        return calibrated(balanced(network), self._rest, seed=self.seed)

    def chain(self, name: str, choice: Choice) -> Chain:
        """The chain of one candidate, decomposed by itself; it is kept."""
        key = f"{name} {choice}"
        if key not in self._chains:
            self._chains.put(key, self._cut(name, choice, self.factors(name, choice.method), self.moments[name]))
        return self._chains[key]

    def probe(
        self, journal: Journal, check: Callable[[], None], enough: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[Choice, float]]:
        """Damage of every candidate in nats: predicted, and corrected by a few real evaluations of each site.

        The evaluations are kept in the journal; ``check`` is called before those of each site. Once ``enough`` says
        so, no more are made: the corrections of the other sites are the mean of those that there are.
        """
        images = self.probed
        dense = predict(self._bridge, images)
        names = list(self.candidates)
        unpredicted = [name for name in names if journal.get("predicted", name) is None]
        if unpredicted:
            _ = self.moments, self.fisher  # by all cores, before each core has a site of its own
        # the largest first, so that no core waits long for another's last
        unpredicted.sort(key=lambda name: self.sites[name].weight.size, reverse=True)
        for name, own in self._each(self._predicted, unpredicted, "predicting damage"):
            journal.record("predicted", name, [own[choice] for choice in self.candidates[name]])
            check()
        give_back()
        predicted = {
            name: dict(zip(self.candidates[name], journal.get("predicted", name), strict=True)) for name in names
        }
        found: dict[str, dict[float, float]] = {}
        for name, own in console.track(predicted.items(), "probing damage", total=len(predicted)):
            check()
            keys = {f"{name} {choice}": choice for choice in self._probes(name, own)}
            unknown = [key for key in keys if journal.get("probe", key) is None]
            if unknown and enough():
                continue
            if unknown:
                chains = [self._to_probe.get(key) or self.chain(name, keys[key]) for key in unknown]
                for key, changed in zip(unknown, predict_each(self._bridge, images, name, chains), strict=True):
                    journal.record("probe", key, divergence(self._bridge.answers, dense, changed))
            if keys:
                found[name] = {own[choice]: journal.get("probe", key) for key, choice in keys.items()}
        self._to_probe = Shelf(self.folder)  # they are not needed any more
        usual = DamageCurve.mean(found.values())
        curves = {name: DamageCurve.through(found[name]) if name in found else usual for name in predicted}
        return {name: {choice: curves[name](value) for choice, value in own.items()} for name, own in predicted.items()}

    def largest(self, journal: Journal) -> dict[str, float]:
        """The largest operand of each site on all calibration images; the journal keeps it."""

        def look() -> dict[str, float]:
            with console.progress("largest activations", len(self.images)) as advance:
                return largest_operands(self._bridge, list(self.sites.values()), self.images, advance=advance)

        return journal.once("largest", "operands", look)

    def rounding(self, journal: Journal, format: str, names: Sequence[str]) -> dict[str, float]:
        """Damage in nats of computing a dense site in a format, for the sites of these names.

        Rounding all of them together is looked at first. Where that is hardly anything, as it is with most networks,
        each site is said to have its part of it; else every site is looked at by itself.
        """
        together = self._rounded(journal, names, format)
        if together <= HARDLY * self._share:
            return dict.fromkeys(names, together / max(1, len(names)))
        return {name: self._rounded(journal, [name], format) for name in console.track(names, f"rounding to {format}")}

    def _rounded(self, journal: Journal, names: Sequence[str], format: str) -> float:
        """Damage in nats of computing these sites in a format."""

        def look() -> float:
            network = TorchBridge(self.calibrated(with_formats(self.mod, dict.fromkeys(names, format))))
            return divergence(self._bridge.answers, predict(self._bridge, self.probed), predict(network, self.probed))

        return float(journal.once("probe", f"{', '.join(names)} in {format}", look))

    @property
    def _examined(self) -> list[Site]:
        wanted = {name for name, own in self.candidates.items() if own} if self._wanted is None else self._wanted
        return [site for name, site in self.sites.items() if name in wanted]

    def _cut(self, name: str, choice: Choice, factors: Factors, moments: AnyMoments) -> Chain:
        assert choice.rank is not None
        return cut(choice.method, factors, choice.rank, self.sites[name].weight, moments)

    def _probes(self, name: str, predicted: Mapping[Choice, float]) -> list[Choice]:
        """With which candidates to probe a site: among those whose error was computed."""
        share = self._share / max(1, sum(bool(choices) for choices in self.candidates.values()))
        return probes({choice: predicted[choice] for choice in self._solved(name)}, share)

    def _costs(self, name: str) -> dict[str, dict[Choice, int]]:
        """MACs of a site's candidates, by method; the costliest first."""
        costs = {choice: site_macs(self.sites[name], choice) for choice in self.candidates[name]}
        ordered = sorted(costs, key=lambda choice: (choice.method, -costs[choice]))
        return {
            method: {choice: costs[choice] for choice in group}
            for method, group in groupby(ordered, key=lambda choice: choice.method)
        }

    def _solved(self, name: str) -> list[Choice]:
        """The candidates whose error is computed; it is interpolated for the others."""
        groups = self._costs(name).items()
        return [choice for method, own in groups for choice in (to_solve(own) if METHODS[method].solves else own)]

    def _predicted(self, name: str) -> dict[Choice, float]:
        """Damage of a site's candidates to second order, in nats, before the refit.

        The chains of its probes are cut as well, for the factorisations take too much memory to be kept.
        """
        if not self.candidates[name]:
            return {}
        moments = self.moments[name]
        factors: dict[str, Factors] = {}
        found = {}
        for method, own in self._costs(name).items():
            factors[method] = self._factorised(name, method, moments)

            def error(choice: Choice, method: str = method) -> float:
                assert choice.rank is not None
                return factors[method].error(choice.rank)

            # the costliest first: what it computes serves the others
            errors = interpolated(own, error) if METHODS[method].solves else {choice: error(choice) for choice in own}
            found.update({choice: value / 2 for choice, value in errors.items()})
        for choice in self._probes(name, found):
            self._to_probe.put(f"{name} {choice}", self._cut(name, choice, factors[choice.method], moments))
        for method, own_factors in factors.items():
            if METHODS[method].starts:
                self._kept.put(f"{name} {method}", own_factors)
        return found

    def _each(self, function: Callable[[str], T], names: Sequence[str], description: str) -> Iterator[tuple[str, T]]:
        """Every site with what the function makes of it, on all cores: linear algebra on one thread each.

        Sites whose covariances are large, of which a factorisation makes several copies, come one after another.
        """
        with (
            threadpool_limits(1, user_api="blas"),
            ThreadPoolExecutor(os.cpu_count()) as many,
            ThreadPoolExecutor(1) as alone,
            console.progress(description, len(names)) as advance,
        ):

            def done(name: str) -> T:
                result = function(name)
                advance()
                return result

            results = [(alone if self._large(name) else many).submit(done, name) for name in names]
            try:
                for name, result in zip(names, results, strict=True):
                    yield name, result.result()
            finally:
                for result in results:
                    result.cancel()

    def _large(self, name: str) -> bool:
        return 8 * self.sites[name].weight[0].size ** 2 >= LARGE
