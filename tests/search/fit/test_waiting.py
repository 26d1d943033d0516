"""What waits in files is found again, and the files go with the object."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from tvm_lowrank.errors import UserError
from tvm_lowrank.methods import Moments
from tvm_lowrank.searching.fit import waiting
from tvm_lowrank.searching.fit.waiting import PREFIX, Rows, Shelf


def test_a_shelf_has_what_was_put_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "IN_MEMORY", 0)
    shelf: Shelf[Moments] = Shelf(tmp_path / "new")
    for value in (1.0, 2.0):
        shelf.put("conv1", Moments(np.full((1, 3), value), np.full((1, 3, 3), value)))
    assert list(shelf) == ["conv1"] and len(shelf) == 1 and "conv2" not in shelf
    assert shelf["conv1"].covariance.max() == 2 and shelf.get("conv2") is None
    (folder,) = (tmp_path / "new").iterdir()
    assert folder.name.startswith(PREFIX)
    del shelf
    assert not list((tmp_path / "new").iterdir())


def test_little_needs_no_files(tmp_path: Path) -> None:
    shelf: Shelf[str] = Shelf(tmp_path)
    shelf.put("a", "little")
    assert shelf["a"] == "little" and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "IN_MEMORY", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large; make room"):
            Shelf(tmp_path).put("a", "much" * 100)
        with pytest.raises(UserError, match=r"cannot write .*rows: File too large; make room"):
            Rows(tmp_path / "rows").add(torch.zeros(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_come_back_in_order(in_memory: bool, tmp_path: Path) -> None:
    rows, parts = Rows(None if in_memory else tmp_path / "rows"), torch.arange(24.0).reshape(6, 4).split(2)
    for part in parts:
        rows.add(part.T.flip(0)[::2].T)  # not contiguous
    assert torch.equal(rows.read(), torch.cat([part.T.flip(0)[::2].T for part in parts]))
