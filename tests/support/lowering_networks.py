"""Small canonical Relax modules for tests, with the numbers that torch gets for them."""

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.relax import transform
from tvm.relax.frontend.torch import from_exported_program


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
