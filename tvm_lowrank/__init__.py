"""Low-rank compression of trained CNNs, driven by the latency that TVM-tuned code really has on your device.

model = tvm_lowrank.load("bundle")      # a compiled library as a function of numpy arrays
logits = model(images)                  # float32 NCHW in, float32 out
"""

from tvm_lowrank.bundle import CompiledModel, load
from tvm_lowrank.errors import UserError

__all__ = ["CompiledModel", "UserError", "load"]
