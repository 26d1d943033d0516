"""Fitted networks on disk: a search that was killed does not fit them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tvm.ir import IRModule

from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.files import replaced
from tvm_lowrank.plan import Plan
from tvm_lowrank.precision import GRIDS, grid_texts, parsed, with_grids
from tvm_lowrank.transform import shaped


class FittedNetworks:
    """The networks that a dense one became under its plans, by plan and by how they were fitted.

    Only parameters and grids are stored, as arrays of a ``.npz`` file; nothing is unpickled. Without a folder they are
    kept in memory.
    """

    def __init__(self, mod: IRModule, folder: Path | None = None) -> None:
        self._mod, self._folder = mod, folder
        self._known: dict[tuple[str, str], IRModule] = {}

    def once(self, plan: Plan, how: str, fit: Callable[[], IRModule]) -> IRModule:
        """The network of a plan that was fitted in the way `how`, or else that of `fit`, stored before it is returned.

        Raises
        ------
        UserError
            If it cannot be stored.
        """
        key = plan.to_json(), how
        if key not in self._known:
            stored = None if self._folder is None else self._read(self._path(*key), plan)
            if stored is None:
                stored = fit()
                self._write(self._path(*key), stored)
            self._known[key] = stored
        return self._known[key]

    def _path(self, plan: str, how: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{how} {plan}".encode()).hexdigest()
        return self._folder / f"{digest[:16]}.npz"

    def _read(self, path: Path | None, plan: Plan) -> IRModule | None:
        """The network of a file, None if there is none or it is not whole: then it is fitted again."""
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored, torch.no_grad():
                grids = parsed(dict(stored[GRIDS].tolist()))
                bridge = TorchBridge(with_grids(shaped(self._mod, plan), grids))
                for name, parameter in bridge.named_parameters():
                    parameter.copy_(torch.from_numpy(stored[name]))
        # numpy, zipfile and zlib have exceptions of their own for damaged files
        except Exception:
            return None
        return bridge.to_relax()

    def _write(self, path: Path | None, mod: IRModule) -> None:
        if path is None:
            return
        values = {name: p.detach().numpy() for name, p in TorchBridge(mod).named_parameters()}
        values[GRIDS] = np.array(list(grid_texts(mod["main"]).items()), str).reshape(-1, 2)
        with replaced(path) as file:
            np.savez(file, allow_pickle=False, **values)
