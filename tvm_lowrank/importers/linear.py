"""Linear layers as 1 x 1 convolutions of 1 x 1 images, so that one kind of site serves both.

Where a function multiplies (batch, N) by a constant (N, M) it is given the convolution of (batch, N, 1, 1) instead.
What is computed elementwise on the result moves in front of the reshape back to (batch, M): there it is a bias, a
scale or an activation like that of any other convolution. A matrix that is multiplied with more than once, as a
recurrent layer's is at every step, stays as it is: its parts would be made for each use apart.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tvm import relax, tirx
from tvm.ir import Call, GenericConst, Op

from tvm_lowrank.bridge.epilogue import ELEMENTWISE
from tvm_lowrank.importers.nodes import Node, op_name

MATMUL, RESHAPE = Op.get("relax.matmul"), Op.get("relax.reshape")


def weight_digest(weight: np.ndarray) -> str:
    """What identifies the weight (M, N) of a linear layer: frontends keep its values, but not its name."""
    return hashlib.sha256(str(weight.shape).encode() + np.ascontiguousarray(weight).tobytes()).hexdigest()


def _digest(call: Call) -> str | None:
    """The `weight_digest` of a product of a variable and a constant matrix."""
    x, weight = call.args
    if not (isinstance(x, relax.Var) and isinstance(weight, GenericConst) and len(weight.ty.shape) == 2):
        return None
    return weight_digest(weight.value.numpy().T)


def as_convolutions(
    nodes: Sequence[Node], batch: tirx.Var, ids: Mapping[str, str | None]
) -> tuple[list[Node], dict[relax.Var, str]]:
    """The nodes with linear layers as convolutions, and the wanted id of each of these.

    Parameters
    ----------
    nodes : operator calls, as `tvm_lowrank.importers.canonical` collects them.
    batch : the symbolic batch; a product of other rows than one for each image stays as it is.
    ids : the id of a linear layer by `weight_digest`; others are numbered.
    """
    digests = {node.var: _digest(node.call) for node in nodes if isinstance(node.call, Call) and node.call.op == MATMUL}
    repeated = Counter(digest for digest in digests.values() if digest)
    rewriter = _Rewriter(batch, ids, {var: d for var, d in digests.items() if d and repeated[d] == 1})
    for node in nodes:
        rewriter.visit(node)
    return rewriter.nodes, rewriter.wanted


@dataclass
class _Rewriter:
    batch: tirx.Var
    ids: Mapping[str, str | None]
    digests: Mapping[relax.Var, str]  # of each matmul's weight that has no other use
    nodes: list[Node] = field(default_factory=list)
    wanted: dict[relax.Var, str] = field(default_factory=dict)
    images: dict[relax.Var, relax.Var] = field(default_factory=dict)  # of each (batch, M): its (batch, M, 1, 1)
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)

    def visit(self, node: Node) -> None:
        image = self._image_of(node) if isinstance(node.call, Call) else None
        if image is None:
            self.nodes.append(node)
            self._note_flattened(node)
            return
        self.images[node.var] = image
        self.nodes.append(Node(node.var, relax.op.reshape(image, node.var.ty.shape)))

    def _image_of(self, node: Node) -> relax.Var | None:
        """The (batch, M, 1, 1) variable that replaces a call's (batch, M), if it can be one."""
        call = node.call
        if call.op == MATMUL:
            return self._convolution(call, self.digests[node.var]) if node.var in self.digests else None
        if op_name(call) in ELEMENTWISE and any(arg in self.images for arg in call.args if isinstance(arg, relax.Var)):
            args = [self._lifted(arg) for arg in call.args]
            if all(arg is not None for arg in args):
                return self._emit(Call(call.op, args, call.attrs, call.ty_args))
        return None

    def _convolution(self, call: Call, digest: str) -> relax.Var | None:
        x, weight = call.args
        rows, *columns = x.ty.shape
        if len(columns) != 1 or not (isinstance(rows, tirx.Var) and rows.same_as(self.batch)):
            return None
        if x not in self.images:
            self.images[x] = self._emit(relax.op.reshape(x, [*x.ty.shape, 1, 1]))
        matrix = np.ascontiguousarray(weight.value.numpy().T)
        kernel = relax.const(matrix[:, :, None, None], str(weight.ty.dtype))
        image = self._emit(relax.op.nn.conv2d(self.images[x], kernel))
        self.wanted[image] = self.ids.get(digest) or f"linear_{len(self.wanted) + 1}"
        return image

    def _lifted(self, arg: relax.Expr) -> relax.Expr | None:
        """An argument of an elementwise call on (batch, M) as one of the same call on (batch, M, 1, 1)."""
        if isinstance(arg, relax.Var):
            return self.images.get(arg)
        if not isinstance(arg, GenericConst) or not len(arg.ty.shape):
            return arg
        values = arg.value.numpy()
        if values.ndim > 2 or (values.ndim == 2 and values.shape[0] != 1):
            return None
        return relax.const(values.reshape(1, -1, 1, 1), str(arg.ty.dtype))

    def _note_flattened(self, node: Node) -> None:
        """Remember the image of a variable that is nothing but a flattened (batch, M, 1, 1)."""
        call = node.call
        if isinstance(call, Call) and call.op == RESHAPE and isinstance(call.args[0], relax.Var):
            before, after = list(call.args[0].ty.shape), list(node.var.ty.shape)
            ends = [int(d) if isinstance(d, tirx.IntImm) else 0 for d in before[2:]]
            if len(after) == 2 and len(before) == 4 and ends == [1, 1]:
                self.images[node.var] = call.args[0]

    def _emit(self, call: Call) -> relax.Var:
        call = self.builder.normalize(call)
        var = relax.DataflowVar("v", call.ty)
        self.nodes.append(Node(var, call))
        return var
