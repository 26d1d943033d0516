"""Which images are looked at."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tvm_lowrank.searching.fit.samples import evenly, sampled


def test_large_networks_are_sampled_on_fewer_images_of_all_kinds() -> None:
    images = np.arange(1000, dtype=np.float32)[:, None, None, None]
    site = SimpleNamespace(macs=4e9)
    assert len(sampled(images, [site])) == 375  # type: ignore[list-item, arg-type]
    assert sampled(images, [site, site])[np.array([-1])] == 999  # type: ignore[list-item]
    assert len(sampled(images, [site] * 100)) == 256  # type: ignore[list-item]
    assert len(sampled(images[:100], [site])) == 100  # type: ignore[list-item]
    assert np.diff(evenly(images, 300)[:].ravel()).max() == 4
