"""Which images are looked at."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tvm_lowrank.searching.fit.samples import apart, evenly, sampled


def test_large_networks_are_sampled_on_fewer_images_of_all_kinds() -> None:
    images = np.arange(1000, dtype=np.float32)[:, None, None, None]
    site = SimpleNamespace(macs=4e9)
    assert len(sampled(images, [site])) == 375  # type: ignore[list-item, arg-type]
    assert sampled(images, [site, site])[np.array([-1])] == 999  # type: ignore[list-item]
    assert len(sampled(images, [site] * 100)) == 256  # type: ignore[list-item]
    assert len(sampled(images[:100], [site])) == 100  # type: ignore[list-item]
    assert np.diff(evenly(images, 300)[:].ravel()).max() == 4


def test_probes_see_other_images_than_statistics() -> None:
    images = np.arange(100, dtype=np.float32)[:, None, None, None]
    probed, rest = (own[:].ravel().tolist() for own in apart(images, 20))
    assert len(probed) == 20 and sorted(probed + rest) == list(range(100))
    assert np.diff(probed).max() <= 6
    one = apart(images[:1], 1)
    assert [own[:].ravel().tolist() for own in one] == [[0.0], [0.0]]
