"""The networks in `examples/tasks` have the numbers of parameters and of operations that are known of them."""

from __future__ import annotations

from collections.abc import Callable

import centernet
import densenet
import espcn
import mobilenet
import numpy as np
import openpose
import pytest
import ssd300
import torch
import unet
from torch import Tensor, nn

from support.models import randomised
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.graph import find_sites
from tvm_lowrank.importers.importer import import_model

IMAGENET = (1, 3, 224, 224)
KNOWN = {
    # Intel's Open Model Zoo, page `ssd300`: 26.285 M parameters, 62.815 G operations, two to a MAC
    "ssd300": (ssd300.ssd300, (1, 3, 300, 300), 26_285_486, 62.815e9 / 2, [(8732, 4), (8732, 21)]),
    # torchvision's ssd300_vgg16 (COCO, 91 classes): 35,641,826 parameters, 34.858 G MACs
    "ssd300 of 91": (lambda: ssd300.SSD300(91), (1, 3, 300, 300), 35_641_826, 34.858e9, [(8732, 4), (8732, 91)]),
    # the authors' model for COCO (pose_iter_440000.caffemodel): 209.3 MB of float32; operations counted by hand
    "openpose": (openpose.openpose, (1, 3, 368, 368), 52_311_446, 135.9e9, [(38, 46, 46), (19, 46, 46)]),
    # 31.03 M is told of the paper's widths; operations counted by hand
    "unet": (unet.unet, (1, 1, 256, 256), 31_030_658, 48.1e9, [(2, 256, 256)]),
    "centernet": (centernet.centernet, (1, 3, 96, 96), 329_134, 83.6e6, [(2, 24, 24)] * 3),
    # the paper's (5, 64) - (3, 32) - 3 for a factor of 3: 25 x 64 + 9 x 64 x 32 + 9 x 32 x 9 = 22,624 MACs a pixel
    "espcn": (espcn.espcn, (1, 1, 100, 100), 22_624 + 64 + 32 + 9, 22_624e4, [(1, 300, 300)]),
    # torchvision's densenet121, mobilenet_v2, mobilenet_v3_large and mobilenet_v3_small
    "densenet121": (densenet.densenet121, IMAGENET, 7_978_856, 2.834e9, [(1000,)]),
    "mobilenet_v2": (mobilenet.mobilenet_v2, IMAGENET, 3_504_872, 301e6, [(1000,)]),
    "mobilenet_v3_large": (mobilenet.mobilenet_v3_large, IMAGENET, 5_483_032, 217e6, [(1000,)]),
    "mobilenet_v3_small": (mobilenet.mobilenet_v3_small, IMAGENET, 2_542_856, 56.5e6, [(1000,)]),
}


def operations(net: nn.Module, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, ...]]]:
    """MACs of the convolutions and linear layers, and the shapes of the outputs without the batch; computes nothing."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        each = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        counts.append(each.numel() * layer.weight[0].numel())

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.register_forward_hook(count)
    outputs = net.to("meta").eval()(torch.empty(shape, device="meta"))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(counts), [tuple(output.shape[1:]) for output in outputs]


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_operations(name: str) -> None:
    make, shape, parameters, macs, outputs = KNOWN[name]
    net = make()
    assert sum(p.numel() for p in net.parameters()) == parameters
    counted, shapes = operations(net, shape)
    assert counted == pytest.approx(macs, rel=2e-3)
    assert shapes == outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "sites"),
    [
        (unet.unet, (2, 1, 32, 32), 19),  # the four transposed convolutions are none
        (espcn.espcn, (2, 1, 20, 20), 3),
        (densenet.densenet121, (2, 3, 64, 64), 121),
        (mobilenet.mobilenet_v2, (2, 3, 64, 64), 53),
        (mobilenet.mobilenet_v3_large, (2, 3, 64, 64), 64),
        (mobilenet.mobilenet_v3_small, (2, 3, 64, 64), 54),
    ],
)
def test_import(make: Callable[[], nn.Module], shape: tuple[int, ...], sites: int) -> None:
    net = randomised(make())
    mod = import_model(net, input_shape=shape)
    assert len(find_sites(mod)) == sites
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x).numpy()
        answer = TorchBridge(mod)(x).numpy()
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
