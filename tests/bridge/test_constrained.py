"""Networks that are low-rank while they are trained: factors in place of layers, up to the compiled library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from torch.nn import functional as F
from tvm import relax

import tvm_lowrank
from tvm_lowrank.errors import UserError
from tvm_lowrank.graph import bindings, find_sites
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.importers.nodes import op_name
from tvm_lowrank.methods import METHODS, ConvSpec, Rank, compose
from tvm_lowrank.plan import Choice, Plan

ROOT = Path(__file__).parents[2]
# a rank of each method for 8 channels to 12, 3x3 (1x1 for `svd`), in one or two groups
RANKS: dict[str, Rank] = {
    "channel": 3,
    "channel_in": 3,
    "spatial": 5,
    "spatial_rows": 5,
    "spatial_channel": (5, 3),
    "tucker2": (3, 4),
    "btd": (4, 6, 2),
    "cp4": 6,
    "cp3": 6,
    "dac": 2,
    "dac_out": 2,
    "svd": 3,
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def layer(method: str, groups: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(8, 12, 1 if method == "svd" else (3, 3), groups=groups, **options)  # type: ignore[arg-type]


def replaced(conv: nn.Module, choice: Choice, **options: object) -> nn.Sequential:
    """What a layer alone becomes."""
    return tvm_lowrank.constrain(nn.Sequential(OrderedDict(it=conv)), {"it": choice}, **options).it  # type: ignore


def kernel(chain: nn.Sequential, groups: int) -> np.ndarray:
    """The OIHW kernel that a chain computes."""
    factors = [part for part in chain if isinstance(part, nn.Conv2d)]
    specs = [ConvSpec(f.in_channels, f.out_channels, f.kernel_size, groups=f.groups) for f in factors]  # type: ignore
    return compose(specs, [f.weight.detach().numpy() for f in factors], groups)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 12, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(12, 10),
        )
    )


SMALL = {"conv1": Choice("cp4", 8), "conv2": Choice("spatial", 6), "fc": Choice("svd", 4)}


def trained(net: nn.Module, steps: int) -> tuple[nn.Module, list[float]]:
    """The network after some steps of SGD on one random batch, and the losses."""
    x, y = random(32, 3, 12, 12), torch.arange(32) % 10
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(steps):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return net, losses


def test_ranks_cover_all_methods() -> None:
    assert set(RANKS) == set(METHODS)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_kernels_have_the_variance_of_he(method: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = layer(method, groups)
    kernels = [kernel(replaced(conv, Choice(method, RANKS[method])), groups) for _ in range(200)]
    fan_in = np.prod(conv.weight.shape[1:])
    assert np.var(kernels) == pytest.approx(2 / fan_in, rel=0.1)
    assert np.mean(kernels) == pytest.approx(0, abs=0.1 * np.sqrt(2 / fan_in))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_gradients(method: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    conv = layer(method, 2, stride=(1, 2), padding=0 if method == "svd" else (2, 1), bias=True)
    chain = replaced(conv, Choice(method, RANKS[method]), batch_norm=batch_norm)
    spec = ConvSpec(8, 12, conv.kernel_size, (1, 2), groups=2)  # type: ignore[arg-type]
    factors = METHODS[method].chain_specs(spec, RANKS[method])
    assert [name for name, _ in chain.named_children()] == [
        *(f"factor{i}" for i in range(1, len(factors) + 1)),
        *(["norm"] if batch_norm else []),
    ]
    assert [part.weight.shape for part in chain if isinstance(part, nn.Conv2d)] == [f.weight_shape for f in factors]
    assert [name for name, _ in chain.named_parameters() if name.endswith("bias")] == [
        "norm.bias" if batch_norm else f"factor{len(factors)}.bias"
    ]
    x = random(2, 8, 9, 7)
    y = chain(x)
    assert y.shape == conv(x).shape
    (y * random(*y.shape)).sum().backward()
    for parameter in chain.parameters():
        assert parameter.grad is not None and bool(parameter.grad.ne(0).all())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(
    ("conv", "choice"),
    [
        (nn.Conv2d(6, 8, 3, (2, 1), (1, 2)), Choice("spatial", 18)),
        (nn.Conv2d(6, 8, (3, 5), padding="valid", groups=2), Choice("spatial_rows", 12)),
        (nn.Conv2d(6, 8, (4, 3), padding="same", dilation=(1, 2)), Choice("spatial", 24)),
        (nn.Conv2d(6, 8, (2, 4), padding="same"), Choice("tucker2", (6, 8))),
        (nn.Conv2d(6, 8, 3, dilation=2, bias=False), Choice("channel", 8)),
        (nn.Conv2d(6, 8, 3, padding=1), Choice("dac", 8)),
        (nn.Conv2d(6, 8, 1, 2), Choice("svd", 6)),
    ],
)
def test_full_rank_is_the_layer(conv: nn.Conv2d, choice: Choice, batch_norm: bool) -> None:
    x = random(2, 6, 11, 12)
    chain = replaced(conv, choice, initialise="weights", batch_norm=batch_norm).eval()
    torch.testing.assert_close(chain(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_linear_at_full_rank(batch_norm: bool) -> None:
    linear, x = nn.Linear(6, 9), random(4, 6)
    chain = replaced(linear, Choice("svd", 6), initialise="weights", batch_norm=batch_norm).eval()
    torch.testing.assert_close(chain(x), linear(x), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_from_weights_approximates() -> None:
    net = small().eval()
    close = tvm_lowrank.constrain(net, {"conv2": Choice("spatial", 16)}, initialise="weights", batch_norm=False)
    far = tvm_lowrank.constrain(net, {"conv2": Choice("spatial", 4)}, initialise="weights", batch_norm=False)
    x = random(4, 3, 12, 12)
    with torch.no_grad():
        errors = [float((other(x) - net(x)).norm() / net(x).norm()) for other in (close, far)]
    assert errors[0] < 0.1 and errors[0] < errors[1]


def test_seed_decides_fresh_factors() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(replaced(layer("spatial"), Choice("spatial", 5)).factor1.weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_the_rest_is_copied() -> None:
    net = small().to(torch.float64).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = Plan({"conv1": Choice(), "conv2": Choice("spatial", 6)})
    result = tvm_lowrank.constrain(net, plan)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(net.conv2, nn.Conv2d) and isinstance(result.conv1, nn.Conv2d)
    assert torch.equal(result.conv1.weight, net.conv1.weight) and result.conv1.weight is not net.conv1.weight
    assert {p.dtype for p in result.parameters()} == {torch.float64}
    assert not any(part.training for part in result.modules())


def test_a_shared_layer_stays_shared() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    result = tvm_lowrank.constrain(nn.Sequential(conv, nn.ReLU(), conv), {"0": Choice("spatial", 4)})
    assert isinstance(result[0], nn.Sequential) and result[0] is result[2]


def test_plan_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(Plan(SMALL).to_json())
    for plan in (file, str(file)):
        assert len(tvm_lowrank.constrain(small(), plan).conv1) == 5
    with pytest.raises(UserError, match="cannot read plan"):
        tvm_lowrank.constrain(small(), tmp_path / "absent.json")


REFUSED = {
    "the module has no 'conv9'; .* which here are: conv1, conv2, fc$": (small, {"conv9": Choice("spatial", 2)}),
    "'relu1' is a ReLU; .* conv1, conv2, fc$": (small, {"relu1": Choice()}),
    "the module has no ''; .* none$": (nn.ReLU, {"": Choice("svd", 2)}),
    "'0' is a ConvTranspose2d; ": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), {"0": Choice("spatial", 2)}),
    "'conv2': unknown method 'dct'; known are channel, ": (small, {"conv2": Choice("dct", 2)}),
    "'conv2': rank 99 of spatial is outside 1..24; choose": (small, {"conv2": Choice("spatial", 99)}),
    "'conv2': rank 2 of tucker2 is outside 1..8, 1..12; choose": (small, {"conv2": Choice("tucker2", 2)}),
    "'conv2': .*; choose another method or rank": (small, {"conv2": Choice("btd", (3, 4, 2))}),
    "'fc': spatial does not apply to a 1x1 convolution": (small, {"fc": Choice("spatial", 2)}),
    "'0' has padding_mode 'reflect'; only 'zeros'": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        {"0": Choice("spatial", 2)},
    ),
    "'conv2' is \\('spatial', 2\\); give a Choice": (small, {"conv2": ("spatial", 2)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_said(message: str) -> None:
    make, plan = REFUSED[message]
    with pytest.raises(UserError, match=message) as raised:
        tvm_lowrank.constrain(make(), plan)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_bad_start_is_said() -> None:
    with pytest.raises(UserError, match="initialise is 'zeros'; use 'fresh' or 'weights'"):
        tvm_lowrank.constrain(small(), {}, initialise="zeros")  # type: ignore[arg-type]
    net = small()
    net.conv2.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="'conv2' has entries that are not finite; use initialise='fresh'"):
        tvm_lowrank.constrain(net, SMALL, initialise="weights")


@pytest.mark.slow
def test_trained_exported_and_compiled(tmp_path: Path) -> None:
    """A constrained network learns, and its library computes what torch does, with the batch-norms folded."""
    net, losses = trained(tvm_lowrank.constrain(small(), SMALL), 30)
    assert losses[-1] < 0.5 * losses[0]
    net.eval()
    file, batch = tmp_path / "net.pt2", torch.export.Dim("batch")
    torch.export.save(torch.export.export(net, (random(2, 3, 12, 12),), dynamic_shapes=({0: batch},)), file)
    x = random(3, 3, 12, 12)
    for mod in (import_model(net, input_shape=(1, 3, 12, 12)), import_model(file)):
        chains = {"conv1": 4, "conv2": 2, "fc": 2}
        expected = [f"{site}.factor{i}" for site, length in chains.items() for i in range(1, length + 1)]
        sites = find_sites(mod)
        assert [site.id for site in sites] == expected
        assert [site.id for site in sites if site.bias is not None] == ["conv1.factor4", "conv2.factor2", "fc.factor2"]
        operators = {op_name(b.value) for b in bindings(mod["main"]) if isinstance(b.value, tvm.ir.Call)}
        assert not {name for name in operators if name and "batch_norm" in name}
        library = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
        got = library["main"](tvm.runtime.tensor(x.numpy())).numpy()
        np.testing.assert_allclose(got, net(x).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_package_imports_torch_only_when_needed() -> None:
    script = (
        "import sys, tvm_lowrank\n"
        "assert 'torch' not in sys.modules and 'tvm' not in sys.modules\n"
        "from tvm_lowrank import constrain\n"
        "assert 'torch' in sys.modules and tvm_lowrank.constrain is constrain\n"
        "assert not hasattr(tvm_lowrank, 'absent')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("networks", ROOT / "examples" / "cifar10" / "networks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def macs(net: nn.Module) -> int:
    return sum(site.macs for site in find_sites(import_model(net, input_shape=(1, 3, 32, 32))))


@pytest.mark.slow
def test_network_in_network(networks: ModuleType) -> None:
    dense = networks.nin()
    assert macs(dense) == 222_486_528
    lowrank = tvm_lowrank.constrain(dense, ROOT / "plans" / "cifar10_nin_tai.json", batch_norm=False)
    assert macs(lowrank) == 106_807_296
    plain = networks.nin(batch_norm=False)
    assert sum(p.numel() for p in plain.parameters()) == 966_986  # Lin et al.'s network
    assert plain(random(2, 3, 32, 32)).shape == lowrank(random(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_resnet20(networks: ModuleType) -> None:
    net = networks.resnet20()
    assert sum(p.numel() for p in net.parameters()) == 272_474
    assert macs(net) == 40_813_184
