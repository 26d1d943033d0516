"""Which weights a kernel asks for ahead of time."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from tvm_lowrank.codegen import ahead
from tvm_lowrank.codegen.blocks import call, unravelled
from tvm_lowrank.codegen.schedule import Tiling, apply
from tvm_lowrank.targets.profile import load_profile


def marked(func: tvm.ir.IRModule, tiling: Tiling, threads: int) -> tuple[np.ndarray, int]:
    """The bytes of a kernel's packed weights, and of as many behind them, of which the lines that are asked for are 1.

    The kernel is run with functions that write in the place of the instructions; the second number is how many bytes
    the weights have. Its parameters are the image, the weights and the result.
    """

    def ask(buffer: Any, number: Any) -> tirx.Stmt:
        address = tirx.address_of(buffer[unravelled(number, buffer)])
        return call("memset", address, tirx.const(1, "int32"), tirx.const(1, "int64"))

    target = load_profile("x86").tvm_target()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ahead, "_ask", ask)
        made = apply(func, tiling, target=target, threads=threads)
    made = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(made)
    image, weights, result = [([int(d) for d in p.shape], np.dtype(str(p.dtype))) for p in made["main"].params]
    size = weights[1].itemsize * prod(weights[0])
    memory = np.zeros(2 * size + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: 2 * size]  # as the code takes for granted
    packed = tvm.runtime.from_dlpack(memory[:size].view(weights[1]).reshape(weights[0]))
    x, y = (tvm.runtime.tensor(np.zeros(*own)) for own in (image, result))
    tvm.tirx.build(made, target=target)["main"](x, packed, y)
    return memory, size
