"""How many milliseconds a site takes under a choice: measured where it matters, predicted elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.codegen.lower import Kernel, kernels_of
from tvm_lowrank.codegen.units import units_of
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.graph import Site, factor_names
from tvm_lowrank.plan import Choice, Plan
from tvm_lowrank.precision import applies
from tvm_lowrank.searching.candidates import chain_specs, site_macs
from tvm_lowrank.searching.latency.cache import Latency
from tvm_lowrank.searching.latency.convolution import Convolution
from tvm_lowrank.searching.latency.oracle import LatencyOracle
from tvm_lowrank.searching.latency.surrogate import Surrogate
from tvm_lowrank.searching.latency.whole import Measured, Traffic, WholeNetworks
from tvm_lowrank.transform import shaped


class SiteTimes:
    """Times of (site, choice), each the sum of its tuned kernels as they are in the lowered whole model.

    To the sum is added what the kernels take beyond it in a network (`tvm_lowrank.searching.latency.whole`), so that
    the sites and the other kernels together are the predicted latency of the whole network.

    A site's kernels (with the bias, activation and residual addition fused into the last) do not depend on what the
    other sites become, but for which of two branches a residual addition is fused into. So one lowering serves one
    choice for every site, and the library that is built may still have a kernel that was not measured for it.
    """

    def __init__(self, mod: IRModule, sites: Sequence[Site], oracle: LatencyOracle, *, batch: int) -> None:
        self._mod = mod
        self._sites = {site.id: site for site in sites}
        self._oracle = oracle
        self._batch = batch
        self._target = oracle.profile.tvm_target(oracle.threads)
        self._kernels: dict[tuple[str, Choice], list[Kernel]] = {}
        self._surrogate = Surrogate(lanes=oracle.profile.lanes, registers=oracle.profile.registers)
        self._learnt = 0
        self._whole = WholeNetworks(oracle.folder)

    def measure(self, wanted: Iterable[tuple[str, Choice]], *, check: Callable[[], None] = lambda: None) -> None:
        """Tune and time these (site, choice) pairs, equal kernels once; what the cache knows costs nothing.

        ``check`` is called between kernels, and may end the work by raising.
        """
        wanted = list(dict.fromkeys(wanted))
        pending = [pair for pair in wanted if pair not in self._kernels]
        while pending:
            # in the company of sites in the same format, so that no kernel converts what others do not
            format = pending[0][1].format
            plan: dict[str, Choice] = {}
            for site, choice in pending:
                if choice.format == format:
                    plan.setdefault(site, choice)
            others = {site: Choice(format=format) for site in self._sites}
            self._lower({**others, **plan})
            pending = [pair for pair in pending if pair not in self._kernels]
        self._tune([kernel for pair in wanted for kernel in self._kernels[pair]], check)

    def fastest_dense(self, formats: Callable[[Site], Sequence[str]]) -> Plan:
        """The dense network with each site in the fastest of its formats, all of which are measured."""
        choices = {site.id: [Choice(format=format) for format in formats(site)] for site in self._sites.values()}
        self.measure([(name, choice) for name, own in choices.items() for choice in own])
        fastest = {name: min(own, key=partial(self.estimate, name)) for name, own in choices.items()}
        return Plan({name: choice for name, choice in fastest.items() if choice != Choice()})

    def measure_others(self, plan: Mapping[str, Choice]) -> float:
        """Tune and time the kernels that belong to no site (pooling, …) under a plan; returns their sum in ms."""
        others = [kernel for kernel, name in self._network(plan) if name is None]
        self._tune(others)
        return self._sum(others)

    def whole(self, plan: Mapping[str, Choice]) -> float:
        """Predicted milliseconds of the whole network under a plan; its kernels are tuned, if they were not."""
        return self._sum(self._whole_network(plan))

    def rest(self) -> None:
        """Stop the processes that compile and measure, which take memory; the next measurement starts new ones."""
        self._oracle.close()

    def learn(self, plan: Mapping[str, Choice], ms: float) -> None:
        """Correct the predictions by the measured milliseconds of a whole network."""
        found = self._whole_network(plan)
        self._whole.add(Measured(sum(self._known(kernel).ms for kernel in found), ms, Traffic.of(found)))

    def _network(self, plan: Mapping[str, Choice]) -> list[tuple[Kernel, str | None]]:
        """The kernels of the network under a plan, in the order of execution, with the names of their convolutions."""
        rewritten = shaped(self._mod, plan) if plan else self._mod
        return kernels_of(rewritten, batch=self._batch, target=self._target)

    def _whole_network(self, plan: Mapping[str, Choice]) -> list[Kernel]:
        """The kernels of the network under a plan, tuned."""
        found = [kernel for kernel, _ in self._network(plan)]
        self._tune(found)
        return found

    def _sum(self, kernels: Sequence[Kernel]) -> float:
        """Milliseconds of kernels that have been measured, as they are in a network."""
        return sum(self._known(kernel).ms for kernel in kernels) + self._whole.beyond(kernels)

    def _tune(self, wanted: Iterable[Kernel], check: Callable[[], None] = lambda: None) -> None:
        unknown = {kernel.key: kernel for kernel in wanted if self._oracle.known(kernel.key) is None}
        if not unknown:
            return
        with console.progress(f"tuning {len(unknown)} kernels", len(unknown)) as advance:
            before = 0

            def report(done: int, _: int) -> None:
                nonlocal before
                check()
                advance(done - before)
                before = done

            self._oracle.measure(unknown.values(), report)

    def _known(self, kernel: Kernel) -> Latency:
        known = self._oracle.known(kernel.key)
        assert known is not None, kernel.name
        return known

    def _lower(self, plan: Mapping[str, Choice]) -> None:
        """Find the kernels of each site under a plan: those of its convolutions, from its input to its output."""
        found = self._network(plan)
        by_name = {name: kernel for kernel, name in found if name is not None}
        for site in self._sites.values():
            choice = plan.get(site.id, Choice())
            names = factor_names(site.id, len(chain_specs(site, choice))) if choice.rank else [site.id]
            self._kernels.setdefault((site.id, choice), [by_name[name] for name in names])

    def measured(self, site: str, choice: Choice) -> float | None:
        """Measured ms, as they are in a network, or None."""
        found = self._kernels.get((site, choice))
        if found is None or any(self._oracle.known(kernel.key) is None for kernel in found):
            return None
        return self._sum(found)

    def estimate(self, site: str, choice: Choice) -> float:
        """`estimates` of one (site, choice)."""
        return self.estimates({site: [choice]})[site, choice]

    def estimates(self, wanted: Mapping[str, Iterable[Choice]]) -> dict[tuple[str, Choice], float]:
        """Milliseconds of every (site, choice): measured where that was done, else an optimistic prediction.

        A prediction is the surrogate's, times the factor by which it is off where the same method was measured at
        this site; between several such points the factor is interpolated over the MACs. It is lowered by the
        surrogate's uncertainty, so that a candidate that may be the best is chosen, and then measured.
        """
        pairs = [(site, choice) for site, choices in wanted.items() for choice in choices]
        exact = {pair: ms for pair in pairs if (ms := self.measured(*pair)) is not None}
        unknown = [pair for pair in pairs if pair not in exact]
        if not unknown:
            return exact
        known = [pair for pair in self._kernels if pair[0] in wanted and self.measured(*pair) is not None]
        if not known:
            raise ValueError(f"none of the sites {', '.join(wanted)} has been measured")
        middle, low = self._predict([*unknown, *known])
        predicted = dict(zip([*unknown, *known], middle, strict=True))
        optimistic = dict(zip(unknown, low, strict=False))
        factors: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for site, choice in known:
            off = float(np.log(self.measured(site, choice) / predicted[site, choice]))
            factors.setdefault((site, choice.method, choice.format), []).append(
                (site_macs(self._sites[site], choice), off)
            )
        for site, choice in unknown:
            points = sorted(factors.get((site, choice.method, choice.format), [(1, 0.0)]))
            known_macs, known_factors = zip(*points, strict=True)
            factor = float(np.exp(np.interp(site_macs(self._sites[site], choice), known_macs, known_factors)))
            exact[site, choice] = optimistic[site, choice] * factor
        return exact

    def _predict(self, pairs: Sequence[tuple[str, Choice]]) -> tuple[np.ndarray, np.ndarray]:
        """The surrogate's milliseconds of every (site, choice), and those less its uncertainty.

        It learns from all that is known of the target first.
        """
        measured = self._oracle.convolutions()
        if len(measured) != self._learnt:
            self._surrogate.fit([conv for conv, _ in measured], [ms for _, ms in measured])
            self._learnt = len(measured)
        convs, owners = [], []
        lanes, units = self._oracle.profile.lanes, units_of(self._target)
        for owner, (name, choice) in enumerate(pairs):
            site = self._sites[name]
            size = site.size
            for spec in chain_specs(site, choice):
                format = FORMATS[choice.format if applies(spec) else FLOAT32]
                convs.append(Convolution.of(spec, size, batch=self._batch, lanes=lanes, format=format, units=units))
                owners.append(owner)
                size = spec.output_size(size)
        ms, unsure = self._surrogate.predict(convs)
        totals, low = np.zeros(len(pairs)), np.zeros(len(pairs))
        np.add.at(totals, owners, ms)
        np.add.at(low, owners, ms * np.exp(-unsure))
        return totals, low
