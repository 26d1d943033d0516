"""Composed scenes: what they are said to contain is where it is said to be."""

from __future__ import annotations

import numpy as np
import pytest
import scenes
from scenes import SIZE, Scene, compose, placement, sample, two_classes

PICTURES = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype="uint8")
KINDS = np.arange(20) % 2


def made(seed: int) -> Scene:
    return compose(np.random.default_rng(seed), PICTURES, KINDS)


@pytest.mark.parametrize("seed", range(10))
def test_boxes_points_and_masks_agree(seed: int) -> None:
    scene = made(seed)
    assert scene.pixels.shape == (SIZE, SIZE, 3)
    assert scene.pixels.dtype == scene.mask.dtype == np.uint8
    assert 1 <= len(scene.classes) <= 4
    np.testing.assert_allclose(scene.points[:, 0], scene.points[:, 1:].mean(1), atol=1e-3)  # the centre of the corners
    np.testing.assert_allclose(scene.boxes[:, :2], scene.points.min(1))
    np.testing.assert_allclose(scene.boxes[:, 2:], scene.points.max(1))
    assert scene.boxes.min() >= 0
    assert scene.boxes.max() <= SIZE
    assert (scene.mask > 0).sum() == pytest.approx(scene.areas.sum(), rel=0.05)
    for c in np.unique(scene.classes):  # a class's pixels fill its boxes to their edges
        rows, columns = np.nonzero(scene.mask == 1 + c)
        boxes = scene.boxes[scene.classes == c]
        extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        np.testing.assert_allclose(extent, [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)], atol=2.5)


def test_the_same_seed_gives_the_same_scene() -> None:
    np.testing.assert_array_equal(made(3).pixels, made(3).pixels)
    assert (made(3).pixels != made(4).pixels).any()


def test_a_picture_as_large_as_its_square_is_not_changed() -> None:
    rows, columns = np.mgrid[:32, :32] + 0.5
    at = np.stack([columns, rows], -1) / 16 - 1
    np.testing.assert_allclose(sample(PICTURES[0], at), PICTURES[0], atol=1e-9)


def test_pictures_lie_within_the_scene_and_upright() -> None:
    for seed in range(50):
        frame, centre = placement(np.random.default_rng(seed))
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) @ frame.T + centre
        assert corners.min() >= 0
        assert corners.max() <= SIZE
        assert corners[0, 1] < corners[3, 1]  # the upper left corner is above the lower left one
        assert corners[0, 0] < corners[1, 0]


def test_classes() -> None:
    assert two_classes(np.arange(10)).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]


def test_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {"calibration": 2, "selection": 3, "evaluation": 4})
    scenes.split.cache_clear()
    data = scenes.splits(lambda scene: scene.boxes)
    scenes.split.cache_clear()
    assert data["calibration"].shape == (2, 3, SIZE, SIZE)
    for part, count in (("selection", 3), ("evaluation", 4)):
        x, y = data[part]
        assert (x.shape, x.dtype, len(y)) == ((count, 3, SIZE, SIZE), np.float32, count)
