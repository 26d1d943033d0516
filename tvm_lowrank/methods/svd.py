"""The matrix SVD of a 1 x 1 convolution (and so of a linear layer): 1 x 1 to d channels -> 1 x 1 to N.

What tells it from the channel decomposition is only that the kernel has nothing else to share. With moments the
SVD is that of W S^(1/2), S the covariance of the input channels: the smallest expected error that any two factors can
have. The first convolution takes the site's strides, so that nothing is computed that the second would skip.
"""

from __future__ import annotations

from tvm_lowrank.methods.chain import ConvSpec
from tvm_lowrank.methods.channel import chain_specs, factorise, max_rank

__all__ = ["applies", "chain_specs", "factorise", "max_rank"]


def applies(spec: ConvSpec) -> bool:
    """Whether this is a 1 x 1 convolution that mixes channels."""
    return spec.kernel == (1, 1) and (spec.groups == 1 or spec.groups < spec.in_channels)
