"""Low-rank compression of trained CNNs, driven by the latency that TVM-tuned code really has on your device.

tvm_lowrank.search(model=net, input_shape=(1, 3, 224, 224), data=splits, budget=1.0, out="bundle")
model = tvm_lowrank.load("bundle")             # a compiled library as a function of numpy arrays
scores = model(images)                         # float32 NCHW in, float32 out
net = tvm_lowrank.constrain(net, "plan.json")  # a torch module with low-rank layers, to be trained
mod = tvm_lowrank.DecomposeConv2D(plan)(mod)   # the pass alone, in a TVM pipeline of your own
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tvm_lowrank.bundle.library import CompiledModel, load
from tvm_lowrank.errors import MeasurementError, UserError

if TYPE_CHECKING:
    from tvm_lowrank.api import compile, decompose, search
    from tvm_lowrank.bridge.constrained import constrain
    from tvm_lowrank.plan import Choice, Plan
    from tvm_lowrank.transform import DecomposeConv2D

__all__ = [
    "Choice",
    "CompiledModel",
    "DecomposeConv2D",
    "MeasurementError",
    "Plan",
    "UserError",
    "compile",
    "constrain",
    "decompose",
    "load",
    "search",
]

# these need torch or much of TVM, without which a bundle is loaded much faster
_LATER = {
    "Choice": "plan",
    "DecomposeConv2D": "transform",
    "Plan": "plan",
    "compile": "api",
    "constrain": "bridge.constrained",
    "decompose": "api",
    "search": "api",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"tvm_lowrank.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
