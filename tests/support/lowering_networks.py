"""Small canonical Relax modules for tests, with the numbers that torch gets for them."""

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.relax import transform
from tvm.relax.frontend.torch import from_exported_program

# one convolution of each kind
LAYERS = {
    "padded": nn.Conv2d(16, 32, 3, padding=1),
    "pointwise": nn.Conv2d(16, 48, 1),
    "column": nn.Conv2d(16, 16, (3, 1), padding=(1, 0), bias=False),
    "strided and dilated": nn.Conv2d(16, 16, 3, stride=2, padding=2, dilation=2),
    "grouped": nn.Conv2d(32, 64, 3, padding=1, groups=2),
    "odd channels": nn.Conv2d(17, 29, 3, padding=1),
    "odd groups": nn.Conv2d(18, 32, 1, groups=2),
    "input": nn.Conv2d(3, 32, 5, stride=2, padding=2),
    "depthwise": nn.Conv2d(48, 48, 3, padding=1, groups=48),
}


def canonical(net: nn.Module, shape: tuple[int, ...]) -> tvm.IRModule:
    """A torch module as a Relax module with a symbolic batch."""
    dims = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(net.eval(), (torch.zeros(2, *shape),), dynamic_shapes=dims)
    mod = from_exported_program(program, keep_params_as_input=False, unwrap_unit_return_tuple=True)
    passes = [
        transform.FoldBatchnormToConv2D(),
        transform.FoldConstant(),
        transform.CanonicalizeBindings(),
        transform.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(passes)(mod)


def network(*layers: nn.Module) -> nn.Module:
    """The layers in sequence, with reproducible weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def expected(net: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(x)).numpy()


def run(executable: relax.VMExecutable, x: np.ndarray) -> np.ndarray:
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def sample(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
