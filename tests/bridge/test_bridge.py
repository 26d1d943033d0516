"""The torch bridge: the same function, differentiable, and back to Relax."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor
from tvm import relax, tirx
from tvm.ir import IRModule

from support import models
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def irregular() -> tuple[torch.nn.Module, IRModule]:
    model = models.randomised(models.Irregular())
    return model, import_model(model, input_shape=(1, 3, 18, 22))


def test_gradients_are_those_of_the_source(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    model, mod = irregular
    bridge = TorchBridge(mod)
    assert not any(p.requires_grad for p in bridge.parameters())
    x = images(3, 18, 22)
    for site in ("dilated", "even"):  # not followed by a batch-norm: the weights are the model's own
        parameters = bridge.site_parameters(site)
        assert parameters.bias is not None
        parameters.weight.requires_grad_(True)
        parameters.bias.requires_grad_(True)
    loss = bridge(x)[:, 3].sum()
    loss.backward()
    model(x)[:, 3].sum().backward()
    for site in ("dilated", "even"):
        ours, theirs = bridge.site_parameters(site), model.get_submodule(site)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.bias.grad.reshape(-1), theirs.bias.grad, rtol=1e-4, atol=1e-5)
    assert bridge.site_parameters("grouped").weight.grad is None


def test_gradient_by_finite_differences(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    bridge = TorchBridge(irregular[1]).double()
    x = images(2, 18, 22).double()
    weight = bridge.site_parameters("grouped").weight.requires_grad_(True)
    bridge(x)[:, 0].sum().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = []
    with torch.no_grad():
        start = weight.clone()
        for step in (1e-7, -1e-7):
            weight.copy_(start + step * direction)
            values.append(bridge(x)[:, 0].sum())
    assert float(values[0] - values[1]) / 2e-7 == pytest.approx(float((weight.grad * direction).sum()), rel=1e-5)


def test_taps_see_input_and_output_of_every_site(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    bridge = TorchBridge(irregular[1])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    x = images(2, 18, 22)
    with torch.no_grad():
        bridge(x, tap=lambda site, before, after: seen.update({site: (before, after)}))
    assert tuple(seen) == bridge.sites == tuple(site.id for site in find_sites(irregular[1]))
    for site in find_sites(irregular[1]):
        before, after = seen[site.id]
        assert tuple(before.shape[1:]) == (site.spec.in_channels, *site.size)
        assert tuple(after.shape[1:]) == (site.spec.out_channels, *site.spec.output_size(site.size))
    torch.testing.assert_close(seen["dilated"][0], x)
    weight = bridge.site_parameters("gate").weight
    torch.testing.assert_close(seen["gate"][1], torch.nn.functional.conv2d(seen["gate"][0], weight))


def test_round_trip_to_relax(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    _, mod = irregular
    bridge = TorchBridge(mod)
    x = images(2, 18, 22)
    same = bridge.to_relax()
    relax.analysis.well_formed(same)
    assert same.script(show_meta=True) == mod.script(show_meta=True)
    with torch.no_grad():
        before = bridge(x)
        for site in bridge.sites:
            bridge.site_parameters(site).weight.mul_(0.9)
        after = bridge(x)
        trained = bridge.to_relax()
        torch.testing.assert_close(TorchBridge(trained)(x), after)
        torch.testing.assert_close(TorchBridge(mod)(x), before)  # the constants of the original are untouched
    sites, changed = find_sites(mod), find_sites(trained)
    for old, new in zip(sites, changed, strict=True):
        np.testing.assert_allclose(new.weight, old.weight * np.float32(0.9), rtol=1e-6)
        assert (new.bias is None) == (old.bias is None)


def test_copies_and_memory_format(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    bridge = TorchBridge(irregular[1])
    x = images(2, 18, 22)
    other = copy.deepcopy(bridge)
    with torch.no_grad():
        other.site_parameters("gate").weight.zero_()
        expected = TorchBridge(irregular[1])(x)
        torch.testing.assert_close(bridge(x), expected)
        assert not torch.allclose(other(x), expected)
        last = bridge.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    assert find_sites(last.to_relax())[0].weight.flags.c_contiguous


def test_wrong_input(irregular: tuple[torch.nn.Module, IRModule]) -> None:
    with pytest.raises(ValueError, match="18"):
        TorchBridge(irregular[1])(images(2, 18, 23))


def module(build: Callable[[relax.Expr], relax.Expr], shape: tuple[int, ...]) -> IRModule:
    """A function of (batch, *shape)."""
    x = relax.Var("x", relax.TensorType([tirx.Var("batch", "int64"), *shape], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(build(x)))
        builder.emit_func_output(out)
    return builder.get()


def const(*shape: int, seed: int = 0) -> relax.Expr:
    return relax.const(np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype("float32"))


OPS: dict[str, tuple[Callable[[relax.Expr], relax.Expr], tuple[int, ...]]] = {
    "conv2d": (lambda x: relax.op.nn.conv2d(x, const(4, 3, 3, 2), 2, [2, 1, 0, 3], [1, 2], 2), (6, 9, 11)),
    "conv2d_transpose": (lambda x: relax.op.nn.conv2d_transpose(x, const(4, 3, 3, 3), 2, 1, 1), (4, 5, 6)),
    "max_pool2d": (lambda x: relax.op.nn.max_pool2d(x, 3, 2, [1, 0, 0, 1], ceil_mode=True), (2, 8, 9)),
    "max_pool2d dilated": (lambda x: relax.op.nn.max_pool2d(x, 3, 2, 1, 2), (2, 12, 9)),
    "avg_pool2d": (lambda x: relax.op.nn.avg_pool2d(x, 3, 2, 1, count_include_pad=True), (2, 8, 9)),
    "avg_pool2d exclusive": (lambda x: relax.op.nn.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 8, 9)),
    "avg_pool2d ceil": (lambda x: relax.op.nn.avg_pool2d(x, 3, 2, [1, 0, 0, 1], ceil_mode=True), (2, 8, 9)),
    "avg_pool2d ceil inclusive": (
        lambda x: relax.op.nn.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=True),
        (2, 8, 9),
    ),
    "adaptive": (lambda x: relax.op.nn.adaptive_avg_pool2d(x, [2, 3]), (2, 7, 8)),
    "pad reflect": (lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 2, 2, 0], "reflect"), (2, 5, 6)),
    "pad channels": (lambda x: relax.op.nn.pad(x, [0, 0, 1, 2, 0, 0, 0, 1], "constant", 0.5), (2, 3, 4)),
    "linear": (lambda x: relax.op.linear(x, const(5, 4), const(5)), (4,)),
    "layer_norm": (lambda x: relax.op.nn.layer_norm(x, const(6), const(6, seed=1), [-1]), (4, 6)),
    "group_norm": (lambda x: relax.op.nn.group_norm(x, const(6), const(6), 3, 1, [2, 3]), (6, 4, 5)),
    "batch_norm": (
        lambda x: relax.op.nn.batch_norm(x, const(3), const(3), const(3), const(3), 1, training=False)[0],
        (3, 4, 5),
    ),
    "softmax": (lambda x: relax.op.nn.softmax(x, 1), (5, 3)),
    "log_softmax": (lambda x: relax.op.nn.log_softmax(x), (5,)),
    "split": (lambda x: relax.op.split(x, [1, 3], 1)[1], (5, 2)),
    "split evenly": (lambda x: relax.op.split(x, 3, 1)[2], (6, 2)),
    "strided_slice": (lambda x: relax.op.strided_slice(x, [1, 2], [1, -4], [9, 5], [2, 1]), (6, 5)),
    "take": (lambda x: relax.op.take(x, relax.const(np.array([2, 0, 0])), 1), (3, 4)),
    "tile": (lambda x: relax.op.tile(x, [1, 2, 3]), (3, 4)),
    "repeat": (lambda x: relax.op.repeat(x, 2, 1), (3, 4)),
    "squeeze": (lambda x: relax.op.squeeze(relax.op.expand_dims(x, [1, 3]), [1]), (3, 4)),
    "permute": (lambda x: relax.op.permute_dims(x, [0, 2, 1]), (3, 4)),
    "reductions": (
        lambda x: relax.op.add(relax.op.max(x, [1], True), relax.op.mean(x, [1, 2], True)) + relax.op.sum(x, [2], True),
        (3, 4),
    ),
    "variance": (lambda x: relax.op.variance(x, [1]), (3, 4)),
    "prelu": (lambda x: relax.op.nn.prelu(x, const(3)), (3, 4, 2)),
    "elementwise": (
        lambda x: (
            relax.op.sqrt(relax.op.abs(x))
            + relax.op.rsqrt(relax.op.exp(x)) * relax.op.tanh(x)
            - relax.op.maximum(relax.op.sigmoid(x), relax.op.nn.silu(x))
            + relax.op.minimum(relax.op.nn.gelu(x), relax.op.nn.gelu_tanh(x))
            + relax.op.where(relax.op.greater(x, const(1)), x, relax.op.nn.leakyrelu(x, 0.2))
        ),
        (3, 4),
    ),
    "resize linear": (lambda x: relax.op.image.resize2d(x, (7, 9), layout="NCHW"), (2, 5, 6)),
    "resize corners": (
        lambda x: relax.op.image.resize2d(x, (7, 9), layout="NCHW", coordinate_transformation_mode="align_corners"),
        (2, 5, 6),
    ),
    "resize nearest": (
        lambda x: relax.op.image.resize2d(
            x,
            (7, 9),
            layout="NCHW",
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        ),
        (2, 5, 6),
    ),
}


def compiled(mods: dict[str, IRModule]) -> relax.VirtualMachine:
    """One library with every module's ``main`` under its own name: starting the compiler is what takes the time."""
    functions = {
        name: mod["main"].with_attr("global_symbol", name.replace(" ", "_")).without_attr("tir_var_lower_bound")
        for name, mod in mods.items()
    }
    mod = IRModule({name.replace(" ", "_"): function for name, function in functions.items()})
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    return relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())


@pytest.mark.slow
def test_operators_mean_what_they_mean_to_tvm() -> None:
    mods = {name: module(build, shape) for name, (build, shape) in OPS.items()}
    machine = compiled(mods)
    wrong = {}
    for name, (_, shape) in OPS.items():
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
        expected = machine[name.replace(" ", "_")](tvm.runtime.tensor(x.numpy())).numpy()
        got = TorchBridge(mods[name])(x).detach().numpy()
        if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-4, atol=1e-5):
            wrong[name] = (got.shape, expected.shape)
    assert not wrong


def test_symbolic_shapes_follow_the_batch() -> None:
    batch = tirx.Var("batch", "int64")
    x = relax.Var("x", relax.TensorType([batch, 4, 6], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            merged = builder.emit(relax.op.reshape(x, (batch * 4, 6)))
            zeros = builder.emit(relax.op.zeros((batch * 4, 2), "float32"))
            out = builder.emit_output(builder.emit(relax.op.concat([merged, zeros], 1)))
        builder.emit_func_output(out)
    bridge = TorchBridge(builder.get())
    for n in (1, 5):
        assert bridge(torch.ones(n, 4, 6)).shape == (4 * n, 8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda x: relax.op.sort(x), "relax.sort"),
        (lambda x: relax.op.nn.max_pool2d(x, 2, layout="NHWC"), "NHWC"),
        (lambda x: relax.op.nn.conv2d(x, const(2, 3, 3, 5), data_layout="NHWC", kernel_layout="OIHW"), "NHWC"),
    ],
)
def test_unknown_operators_are_named_when_the_bridge_is_made(build: Callable, words: str) -> None:
    with pytest.raises(UserError) as caught:
        TorchBridge(module(build, (4, 5, 3)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("network", [models.ResNet20, models.DenseNet, models.MobileNetV2])
def test_a_batch_goes_on_from_anywhere(network: type[torch.nn.Module]) -> None:
    bridge = TorchBridge(import_model(models.randomised(network()).eval(), input_shape=(1, 3, 32, 32)))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, state, widths = bridge(x), bridge.start(x), bridge.widths()
    assert len(widths) == bridge.length + 1
    for position in range(0, bridge.length + 1, 3):
        state = bridge.resume(state, position)
        tensors = [value for value in state.values.values() if isinstance(value, torch.Tensor)]
        assert sum(value.numel() for value in tensors) == 2 * widths[position]
    state = bridge.resume(state, bridge.length)
    assert torch.equal(bridge.result(state), expected)
    with pytest.raises(KeyError):
        bridge.position("nowhere")
