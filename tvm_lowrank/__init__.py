"""Low-rank compression of trained CNNs, driven by the latency that TVM-tuned code really has on your device.

model = tvm_lowrank.load("bundle")             # a compiled library as a function of numpy arrays
logits = model(images)                         # float32 NCHW in, float32 out
net = tvm_lowrank.constrain(net, "plan.json")  # a torch module with low-rank layers, to be trained
"""

from typing import TYPE_CHECKING, Any

from tvm_lowrank.bundle import CompiledModel, load
from tvm_lowrank.errors import UserError

if TYPE_CHECKING:
    from tvm_lowrank.constrained import constrain

__all__ = ["CompiledModel", "UserError", "constrain", "load"]


def __getattr__(name: str) -> Any:
    if name == "constrain":  # needs torch, without which a bundle is loaded much faster
        from tvm_lowrank.constrained import constrain

        return constrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
