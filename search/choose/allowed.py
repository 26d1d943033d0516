"""In which number formats the sites of a network may be computed, and why not in others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tvm_lowrank.formats import FORMATS
from tvm_lowrank.graph import Site
from tvm_lowrank.precision import possible


@dataclass(frozen=True)
class Allowed:
    """The formats that were asked for, by name, as far as they hold what the sites read on the calibration images.

    ``largest`` is the largest operand of each site, where a format may be too short for it; ``gridded`` are the sites
    for whose input there is a grid.
    """

    formats: Sequence[str]
    largest: Mapping[str, float] = field(default_factory=dict)
    gridded: Collection[str] = ()

    def __call__(self, site: Site) -> Sequence[str]:
        """Those of a site."""
        largest = self.largest.get(site.id, 0.0)
        return possible(site.spec, self.formats, largest, gridded=site.id in self.gridded)

    def reason(self, site: Site) -> str:
        """What keeps a site out of formats that were asked for, in a few words; "" if nothing does."""
        absent = set(possible(site.spec, self.formats)) - set(self(site))
        whole = sorted(name for name in absent if FORMATS[name].whole)
        short = sorted(absent - set(whole))
        reasons = [f"its operands reach {self.largest[site.id]:.3g}, too much for {', '.join(short)}"] if short else []
        reasons += [f"what it reads tells no range for {', '.join(whole)}"] if whole else []
        return "; ".join(reasons)
