"""What follows a site: every activation as the importer emits it, residual additions, max-pools."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.epilogues import ACTIVATIONS, Block, imported
from tvm_lowrank.bridge.epilogue import epilogue, rivals


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_found_and_computed(name: str) -> None:
    torch.manual_seed(0)
    activation = ACTIVATIONS[name]()
    found = epilogue(imported(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 2, 3))["main"], "0")
    x = 3 * torch.randn(5, 8, 2, 3)
    assert found.residual is None and found.window is None and found.activation is not None
    torch.testing.assert_close(found.activation(x), activation(x).detach(), rtol=1e-4, atol=1e-5)


def test_identity_where_nothing_elementwise_follows() -> None:
    mod = imported(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten())
    for site in ("0", "2"):
        found = epilogue(mod["main"], site)
        assert (found.residual, found.activation, found.window) == (None, None, None)
    with pytest.raises(KeyError, match="missing"):
        epilogue(mod["main"], "missing")


def test_value_used_elsewhere_ends_the_activation() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.conv(x))
            return y * torch.sigmoid(y.mean((2, 3), keepdim=True))

    found = epilogue(imported(Gated())["main"], "0.conv").activation
    assert found is not None and found.name == "nn.silu"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("project", [False, True])
def test_residual_addition(project: bool, late: bool) -> None:
    mod = imported(Block(nn.Hardswish(), project=project, late=late))
    first, second = epilogue(mod["main"], "0.first"), epilogue(mod["main"], "0.second")
    assert first.residual is None and first.activation is not None and first.activation.name == "nn.relu"
    assert second.residual is not None and second.activation is not None
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(second.activation(x), F.hardswish(x))
    if project:
        other = epilogue(mod["main"], "0.project")
        assert other.residual is not None and other.result.same_as(second.result)


def test_max_pool() -> None:
    mod = imported(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 2), nn.MaxPool2d((2, 4), (2, 4)))
    assert epilogue(mod["main"], "0").window == (2, 2)
    last = epilogue(mod["main"], "3")
    assert last.activation is None and last.window == (2, 4)
    overlapping = imported(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2))
    assert epilogue(overlapping["main"], "0").window is None


@pytest.mark.parametrize("window", [(2, 2), (2, 3), (1, 1)])
def test_rivals(window: tuple[int, int]) -> None:
    """Whatever an element becomes, the pool's output is the larger of it and its rivals."""
    x = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    floor = rivals(x, window)
    for row, col in ((0, 0), (1, 2), (3, 5), (2, 6)):
        changed = x.clone()
        changed[:, :, row, col] += torch.linspace(-3, 3, 3)
        pooled = F.max_pool2d(changed, window)
        cell = row // window[0], col // window[1]
        if cell[1] < pooled.shape[3]:
            expected = torch.maximum(changed, floor)[:, :, row, col]
            torch.testing.assert_close(pooled[:, :, cell[0], cell[1]], expected)
        else:
            assert (floor[:, :, row, col] == torch.inf).all()
