"""How many milliseconds a site takes under a choice: measured where it matters, estimated between measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tvm.ir import IRModule

from tvm_lowrank import console
from tvm_lowrank.graph import Site
from tvm_lowrank.lower import Kernel, kernels, lower
from tvm_lowrank.plan import Choice
from tvm_lowrank.search.cache import Latency
from tvm_lowrank.search.candidates import chain_specs, site_macs
from tvm_lowrank.search.oracle import LatencyOracle
from tvm_lowrank.transform import replace_sites, shape_chains


class SiteTimes:
    """Times of (site, choice), each the sum of its tuned kernels as they are in the lowered whole model.

    A site's kernels (with the bias, activation and residual addition fused into the last) do not depend on what the
    other sites become, so one lowering serves one choice for every site.
    """

    def __init__(self, mod: IRModule, sites: Sequence[Site], oracle: LatencyOracle, *, batch: int) -> None:
        self._mod = mod
        self._sites = {site.id: site for site in sites}
        self._oracle = oracle
        self._batch = batch
        self._target = oracle.profile.tvm_target(oracle.threads)
        self._kernels: dict[tuple[str, Choice], list[Kernel]] = {}
        self._others: list[Kernel] = []

    def measure(self, wanted: Iterable[tuple[str, Choice]], *, check: Callable[[], None] = lambda: None) -> None:
        """Tune and time these (site, choice) pairs, equal kernels once; what the cache knows costs nothing.

        ``check`` is called between kernels, and may end the work by raising.
        """
        wanted = list(dict.fromkeys(wanted))
        pending = [pair for pair in wanted if pair not in self._kernels]
        while pending:
            plan: dict[str, Choice] = {}
            for site, choice in pending:
                plan.setdefault(site, choice)
            self._lower(plan)
            pending = [pair for pair in pending if pair not in self._kernels]
        self._tune([kernel for pair in wanted for kernel in self._kernels[pair]], check)

    def measure_others(self) -> float:
        """Tune and time the kernels that belong to no site (pooling, classifier, …); returns their sum in ms."""
        self.measure([(site, Choice()) for site in self._sites])
        self._tune(self._others)
        return sum(self._known(kernel).ms for kernel in self._others)

    def _tune(self, wanted: Iterable[Kernel], check: Callable[[], None] = lambda: None) -> None:
        unknown = {kernel.key: kernel for kernel in wanted if self._oracle.known(kernel.key) is None}
        if unknown:
            with console.progress(f"tuning {len(unknown)} kernels", len(unknown)) as advance:
                for kernel in unknown.values():
                    check()
                    self._oracle.measure([kernel])
                    advance(1)

    def _known(self, kernel: Kernel) -> Latency:
        known = self._oracle.known(kernel.key)
        assert known is not None, kernel.name
        return known

    def _lower(self, plan: Mapping[str, Choice]) -> None:
        """Find the kernels of each site under a plan: those of its convolutions, in the order of execution."""
        rewritten = replace_sites(self._mod, shape_chains(self._mod, plan))
        found = kernels(lower(rewritten, batch=self._batch, target=self._target))
        convs = iter([kernel for kernel in found if kernel.is_conv])
        for site in self._sites.values():
            choice = plan.get(site.id, Choice())
            self._kernels[site.id, choice] = [next(convs) for _ in chain_specs(site, choice)]
        self._others = [kernel for kernel in found if not kernel.is_conv]

    def measured(self, site: str, choice: Choice) -> float | None:
        """Measured ms, or None."""
        found = self._kernels.get((site, choice))
        if found is None:
            return None
        times = [self._oracle.known(kernel.key) for kernel in found]
        return None if any(time is None for time in times) else sum(time.ms for time in times if time is not None)

    def estimate(self, site: str, choice: Choice) -> float:
        """Measured ms, or MACs at the ms a MAC of this site and method, interpolated between what was measured.

        Where the method was not measured at this site, its MACs take as long as the dense convolution's.
        """
        exact = self.measured(site, choice)
        if exact is not None:
            return exact
        here = self._sites[site]
        points = sorted(
            (macs, time / macs)
            for (name, other) in self._kernels
            if name == site and other.method == choice.method
            if (time := self.measured(site, other)) is not None
            for macs in [site_macs(here, other)]
        )
        macs = site_macs(here, choice)
        if points:
            known, costs = zip(*points, strict=True)
            return macs * float(np.interp(macs, known, costs))
        dense = self.measured(site, Choice())
        if dense is None:
            raise ValueError(f"site {site!r} has not been measured")
        return macs * dense / here.macs
