"""What the time of a convolution depends on, whether or not it has been lowered yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from tvm_lowrank.codegen.lower import Kernel
from tvm_lowrank.codegen.schedule import Workload, workload
from tvm_lowrank.codegen.units import Unit, depth_of, lanes_of, usable
from tvm_lowrank.codegen.vectors import computed_channels
from tvm_lowrank.formats import FLOAT32, FORMATS, Format
from tvm_lowrank.methods import ConvSpec, Pair


@dataclass(frozen=True)
class Convolution:
    """What the time of a convolution depends on: its loop nest and the bytes that it reads."""

    space: Workload
    input_bytes: int

    @classmethod
    def of(
        cls,
        spec: ConvSpec,
        size: Pair,
        *,
        batch: int,
        lanes: int,
        format: Format = FORMATS[FLOAT32],
        units: Sequence[Unit] = (),
    ) -> Convolution:
        """The loop nest that a convolution of (height, width) images is lowered to, with operands of this format.

        ``units`` are the target's instructions for dot products.
        """
        height, width = spec.output_size(size)
        out, inner, *kernel = spec.weight_shape
        out = computed_channels(out, spec.groups, lanes_of(format.name, lanes))
        depthwise = spec.groups == out
        possible = usable(units, format.name, inner=inner, groups=spec.groups)
        inner += -inner % depth_of(possible)
        space = Workload(
            spatial=(batch, height, width, out),
            reduction=(*kernel, inner),
            group=out if depthwise else out // spec.groups,
            padded=any(spec.padding),
            format=format.name,
            units=tuple(unit.name for unit in possible),
        )
        return cls(space, format.bytes * batch * prod(size) * spec.in_channels)

    @classmethod
    def lowered(cls, kernel: Kernel) -> Convolution | None:
        """That of a kernel; None if it is no 2-D convolution in NHWC."""
        space = workload(kernel.func) if kernel.is_conv else None
        if space is None or len(space.spatial) != 4 or len(space.reduction) != 3:
            return None
        main = kernel.func["main"]
        data = main.params[0]
        return cls(space, np.dtype(str(data.dtype)).itemsize * prod(int(extent) for extent in data.shape))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.space), "input_bytes": self.input_bytes}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Convolution:
        """The inverse of `to_json`; TypeError or KeyError if the entry is not one."""
        spatial, reduction = (tuple(int(extent) for extent in entry[name]) for name in ("spatial", "reduction"))
        format, units = str(entry["format"]), tuple(map(str, entry["units"]))
        space = Workload(spatial, reduction, int(entry["group"]), bool(entry["padded"]), format, units)
        return cls(space, int(entry["input_bytes"]))
