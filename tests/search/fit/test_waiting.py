"""What waits in files is found again, and the files go with the object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tvm_lowrank.methods import Moments
from tvm_lowrank.searching.fit.waiting import PREFIX, Rows, Shelf


def test_a_shelf_has_what_was_put_last(tmp_path: Path) -> None:
    shelf: Shelf[Moments] = Shelf(tmp_path / "new")
    for value in (1.0, 2.0):
        shelf.put("conv1", Moments(np.full((1, 3), value), np.full((1, 3, 3), value)))
    assert list(shelf) == ["conv1"] and len(shelf) == 1 and "conv2" not in shelf
    assert shelf["conv1"].covariance.max() == 2 and shelf.get("conv2") is None
    (folder,) = (tmp_path / "new").iterdir()
    assert folder.name.startswith(PREFIX)
    del shelf
    assert not list((tmp_path / "new").iterdir())


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    rows, parts = Rows(tmp_path / "rows"), torch.arange(24.0).reshape(6, 4).split(2)
    for part in parts:
        rows.add(part.T.flip(0)[::2].T)  # not contiguous
    assert torch.equal(rows.read(), torch.cat([part.T.flip(0)[::2].T for part in parts]))
