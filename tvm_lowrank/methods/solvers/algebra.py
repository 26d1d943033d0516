"""tensorly's unfolding and mode products (Kolda & Bader 2009), on numpy arrays whatever backend it is set to.

tensorly computes by the backend of the thread. An application may have set torch's, which refuses numpy arrays.
tensorly's own `backend_context` would make the backend of this thread, on leaving, that of all others too. After its
`use_static_dispatch` with another backend, what is called here fails.

What else tensorly has is ours where it is slower, with the figure beside it (one core, numpy 2.4, tensorly 0.10). It
has no norm but the weights' own: what fits the outputs under a covariance has no counterpart there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import tensorly
from tensorly import backend
from tensorly.tenalg import core_tenalg


def _on_numpy(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """The function with numpy's backend in this thread, and the former one afterwards."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> np.ndarray:
        if tensorly.get_backend() == "numpy":
            return function(*args, **options)
        former = backend.current_backend()
        tensorly.set_backend("numpy", local_threadsafe=True)
        try:
            return function(*args, **options)
        finally:
            tensorly.set_backend(former, local_threadsafe=True)

    return call


unfold = _on_numpy(tensorly.unfold)
mode_dot = _on_numpy(core_tenalg.mode_dot)
multi_mode_dot = _on_numpy(core_tenalg.multi_mode_dot)
