"""Weights are fetched ahead: each line of the next tile of channels, once, and nothing else changes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from support.asked import marked
from tvm_lowrank.codegen.ahead import LINE
from tvm_lowrank.codegen.lower import kernels, lower
from tvm_lowrank.codegen.schedule import Tiling, apply
from tvm_lowrank.targets.profile import load_profile


def convolution(inner: int, out: int, size: int, kernel: int) -> tvm.ir.IRModule:
    """The kernel of a float32 convolution."""
    rng = np.random.default_rng(0)
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((1, inner, size, size), "float32"))
    weights = relax.const(rng.standard_normal((out, inner, kernel, kernel)).astype("float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            made = builder.emit_output(builder.emit(relax.op.nn.conv2d(x, weights, padding=kernel // 2)))
        builder.emit_func_output(made)
    lowered = lower(builder.get(), batch=1, target=load_profile("x86").tvm_target())
    return next(found.func for found in kernels(lowered) if found.is_conv)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tile", "kernel"),
    [
        ((1, 1, 4, 16), 1),  # more tiles of positions than lines a step
        ((1, 2, 8, 16), 3),
        ((1, 4, 8, 16), 1),  # two lines a step
    ],
)
def test_the_next_tile_is_asked_for_line_by_line(tile: tuple[int, ...], kernel: int, threads: int) -> None:
    inner, out = 64, 48
    memory, size = marked(convolution(inner, out, 8, kernel), Tiling(tile, 8), threads)
    of_tile = size * tile[-1] // out
    assert of_tile == 4 * kernel**2 * inner * tile[-1] and of_tile % LINE == 0
    lines = np.flatnonzero(memory)
    assert set(range(of_tile, size, LINE)) <= set(lines), "all tiles but the first"
    assert not np.any(lines % LINE) and lines[0] == of_tile
    steps = kernel**2 * inner
    assert lines[-1] < size + of_tile + steps * LINE, "behind the last tile, not more than a step's lines too many"


@pytest.mark.parametrize(
    "tiling", [Tiling((1, 8, 8, 16), 8), Tiling((1, 1, 4, 48), 8), Tiling((1, 1, 4, 16), 8, False)]
)
def test_what_is_read_once_is_not_asked_for(tiling: Tiling) -> None:
    """One tile of positions or channels, or channels that are run over for each position."""
    memory, _ = marked(convolution(64, 48, 8, 1), tiling, 1)
    assert not memory.any()


@pytest.mark.parametrize(("threads", "stripe"), [(1, 0), (2, 0), (2, 4)])
def test_the_result_is_the_same(threads: int, stripe: int) -> None:
    func = convolution(32, 48, 8, 3)
    profile = load_profile("x86")
    made = apply(func, Tiling((1, 2, 4, 16), 8, stripe=stripe), target=profile.tvm_target(), threads=threads)
    assert "prefetch" in str(made)
    rng = np.random.default_rng(0)
    shapes = [[int(extent) for extent in p.shape] for p in func["main"].params]
    x, weights = (rng.standard_normal(shape).astype("float32") for shape in shapes[:2])
    built = tvm.tirx.build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(made), target=profile.tvm_target())
    result = tvm.runtime.tensor(np.zeros(shapes[2], "float32"))
    packed = weights.reshape(3, 3, 32, 3, 2, 8).transpose(3, 0, 1, 2, 4, 5)
    assert packed.size == weights.size
    built["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(packed.copy()), result)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, r : r + 8, c : c + 8] @ weights[r, c] for r, c in product(range(3), repeat=2)]
    np.testing.assert_allclose(result.numpy(), sum(windows), atol=1e-4)
