"""From outputs to boxes and key points: what was put into perfect outputs comes out again."""

from __future__ import annotations

import detection
import keypoints
import numpy as np
import pytest
import segmentation
import upscaling
from boxes import overlaps, ssd_boxes, ssd_default_boxes, ssd_found, suppress
from peaks import between, bumps, peaks
from scenes import Scene, compose

SQUARES = np.array([(0, 0, 4, 4), (2, 0, 6, 4), (10, 10, 12, 12)], "float64")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 32, 32, 3), dtype="uint8")
    return [compose(rng, pictures, np.arange(20) % 2) for _ in range(20)]


def test_overlaps() -> None:
    np.testing.assert_allclose(overlaps(SQUARES, SQUARES), [(1, 1 / 3, 0), (1 / 3, 1, 0), (0, 0, 1)])
    assert overlaps(SQUARES[:0], SQUARES).shape == (0, 3)


def test_suppress() -> None:
    scores = np.array([0.5, 0.9, 0.1])
    assert suppress(SQUARES, scores, 0.3).tolist() == [1, 2]
    assert suppress(SQUARES, scores, 0.4).tolist() == [1, 0, 2]
    assert suppress(SQUARES[:0], scores[:0]).tolist() == []


def test_default_boxes_of_ssd() -> None:
    default = ssd_default_boxes()
    assert default.shape == (8732, 4)
    np.testing.assert_allclose(default[:2], [(0.5 / 38, 0.5 / 38, 0.1, 0.1), (0.5 / 38, 0.5 / 38, *(0.02**0.5,) * 2)])
    np.testing.assert_allclose(default[-1], (0.5, 0.5, 0.9 / 2**0.5, 0.9 * 2**0.5), rtol=1e-6)
    corners = ssd_boxes(np.zeros((1, 8732, 4), "float32"))[0]
    np.testing.assert_allclose(corners[:, 2:] - corners[:, :2], default[:, 2:], atol=1e-6)
    moved = ssd_boxes(np.full((1, 8732, 4), 1, "float32"))[0]  # a tenth of the size aside, larger by exp(0.2)
    np.testing.assert_allclose((moved[:, :2] + moved[:, 2:]) / 2 - default[:, :2], default[:, 2:] / 10, atol=1e-6)
    np.testing.assert_allclose(moved[:, 2:] - moved[:, :2], default[:, 2:] * np.exp(0.2), rtol=1e-5)


def test_what_ssd_found() -> None:
    scores = np.zeros((2, 8732, 3), "float32")
    scores[..., 0] = 10  # background
    scores[0, [5, 4000], 1:] = [(20, 0), (0, 15)]
    scores[0, 4 + 1, 0] = scores[0, 4000, 0] = 0
    one, none = ssd_found((np.zeros((2, 8732, 4), "float32"), scores))
    assert one["labels"].tolist() == [0, 1]
    np.testing.assert_allclose(one["boxes"], ssd_boxes(np.zeros((1, 8732, 4)))[0, [5, 4000]])
    assert len(none["boxes"]) == len(none["scores"]) == 0


def test_peaks() -> None:
    heat = np.zeros((2, 6, 6), "float32")
    heat[0, 1, 1], heat[0, 1, 2], heat[1, 5, 0] = 0.5, 0.4, 0.9
    at, heights = peaks(heat, 0.1)
    assert at.tolist() == [[1, 5, 0], [0, 1, 1]]
    np.testing.assert_allclose(heights, [0.9, 0.5])
    assert len(peaks(heat, 0.95)[0]) == 0


def test_between_positions() -> None:
    for x, y in ((5.3, 2.9), (0.2, 9.4), (-0.4, 3)):
        heat = bumps(np.array([(x, y)]), np.array([1.2]), 10).numpy()
        np.testing.assert_allclose(between(heat, round(y), round(x)), (x, y), atol=1e-3)


def test_boxes_come_out_again(scenes: list[Scene]) -> None:
    maps = np.stack([detection.wanted(scene).numpy() for scene in scenes])
    found = detection.decode((maps[:, :2], maps[:, 2:4], maps[:, 4:6]), least=0.99)
    for one, scene in zip(found, scenes, strict=True):
        best = overlaps(scene.boxes, one["boxes"]).argmax(1)
        np.testing.assert_allclose(one["boxes"][best], scene.boxes, atol=1e-3)
        assert one["labels"][best].tolist() == scene.classes.tolist()
        assert len(one["boxes"]) == len(scene.boxes)


def test_points_come_out_again(scenes: list[Scene]) -> None:
    maps = np.stack([keypoints.wanted(scene.points).numpy() for scene in scenes])
    for one, scene in zip(keypoints.decode((maps[:, :8], maps[:, 8:])), scenes, strict=True):
        apart = np.linalg.norm(one["keypoints"][:, None] - scene.points[None], axis=-1).max(-1)
        assert len(one["keypoints"]) == len(scene.points)
        assert (apart.min(0) < 2.5).all()  # pixels: points of one kind that are near each other blur


def test_an_object_without_a_corner() -> None:
    points = np.array([[(40, 40), (30, 30), (50, 30), (50, 50), (30, 50)]], "float64")
    maps = keypoints.wanted(points).numpy()
    maps[8 + 2] = 0  # no upper right corner
    (one,) = keypoints.decode((maps[None, :8], maps[None, 8:]))
    np.testing.assert_allclose(one["keypoints"][0, [0, 1, 3, 4]], points[0, [0, 1, 3, 4]], atol=0.1)
    np.testing.assert_allclose(one["keypoints"][0, 2], points[0, 0], atol=0.1)
    assert one["scores"][0] == pytest.approx(4 / 5, abs=0.05)


def test_nothing_found() -> None:
    (one,) = keypoints.decode((np.zeros((1, 8, 24, 24)), np.zeros((1, 6, 24, 24))))
    assert one["keypoints"].shape == (0, 5, 2)
    (found,) = detection.decode(tuple(np.zeros((1, 2, 24, 24)) for _ in range(3)))
    assert found["boxes"].shape == (0, 4)


def test_mean_overlap() -> None:
    truth = np.array([[[0, 0], [1, 2]]])
    said = np.eye(3)[np.array([[0, 1], [1, 2]])].transpose(2, 0, 1)[None]
    assert segmentation.mean_overlap(said, truth) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_psnr() -> None:
    truth = np.zeros((2, 1, 4, 4))
    np.testing.assert_allclose(upscaling.psnr(truth + 0.1, truth), 20)
    np.testing.assert_allclose(upscaling.psnr(truth, truth), 60)


def test_small_pictures_are_means() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype="uint8")
    small, large = upscaling.small_and_large(pictures)
    assert (small.shape, large.shape) == ((2, 1, 16, 16), (2, 1, 32, 32))
    assert 0 <= large.min() < large.max() <= 1
    np.testing.assert_allclose(small[0, 0, 0, 0], large[0, 0, :2, :2].mean(), rtol=1e-5)
