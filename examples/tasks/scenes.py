"""Scenes with known boxes, key points and masks: real pictures, scaled and turned, on an enlarged piece of another.

The pictures are CIFAR-10's (Krizhevsky 2009). Those that come with tvm_lowrank make the scenes of the three splits, so
that these need no download; training takes the rest (`train_tasks.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tvm_lowrank import example

SIZE = 96
CLASSES = ("animal", "vehicle")
VEHICLES = (0, 1, 8, 9)  # airplane, automobile, ship, truck
# key points of a picture on its own square from -1 to 1, x before y
POINTS = {"centre": (0, 0), "top left": (-1, -1), "top right": (1, -1), "bottom right": (1, 1), "bottom left": (-1, 1)}
GAP = 1.1  # no other picture so near, in half sides
COUNTS = {"calibration": 300, "selection": 400, "evaluation": 800}


@dataclass(frozen=True, eq=False)
class Scene:
    """Pixels (SIZE, SIZE, 3), uint8, and k objects in them; positions in pixels, x before y.

    Classes (k,); boxes (k, 4), left, top, right, bottom; points (k, 5, 2), in the order of POINTS; areas (k,) in square
    pixels; mask (SIZE, SIZE), 0 for the background, else 1 + class.
    """

    pixels: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    areas: np.ndarray
    mask: np.ndarray


def compose(rng: np.random.Generator, pictures: np.ndarray, classes: np.ndarray) -> Scene:
    """One to four of the pictures (n, 32, 32, 3) at random places, none over another."""
    at = np.stack(np.meshgrid(*[np.arange(SIZE) + 0.5] * 2), -1)  # the pixels' centres, x before y
    pixels = backdrop(rng, pictures, at)
    mask = np.zeros((SIZE, SIZE), "uint8")
    picked, points, areas = [], [], []
    for i in rng.integers(len(pictures), size=rng.integers(1, 5)):
        frame, centre = placement(rng)
        own = (at - centre) @ np.linalg.inv(frame).T  # on the picture's square, from -1 to 1
        reach = np.abs(own).max(-1)
        if mask[reach <= GAP].any():
            continue
        inside = reach <= 1
        pixels[inside] = sample(pictures[i], own[inside])
        mask[inside] = 1 + classes[i]
        picked.append(i)
        points.append(np.array(list(POINTS.values())) @ frame.T + centre)
        areas.append(4 * np.linalg.det(frame))
    corners = np.array(points, "float32")
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    return Scene(pixels.round().astype("uint8"), classes[picked], boxes, corners, np.array(areas, "float32"), mask)


def backdrop(rng: np.random.Generator, pictures: np.ndarray, at: np.ndarray) -> np.ndarray:
    """30 to 60 % of a picture's height and width, enlarged: (SIZE, SIZE, 3)."""
    piece = rng.uniform(0.3, 0.6)
    picture = pictures[rng.integers(len(pictures))]
    return sample(picture, (at / SIZE * 2 - 1) * piece + rng.uniform(piece - 1, 1 - piece, 2))


def placement(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture's half sides as columns of a matrix (2, 2), and its centre, so that it lies within the scene."""
    angle, half = np.deg2rad(rng.uniform(-35, 35)), rng.uniform(9, 21) * rng.uniform(0.8, 1, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    frame = turn * half
    reach = np.abs(frame).sum(1)
    return frame, rng.uniform(reach, SIZE - reach)


def sample(picture: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The colours (..., 3) of a picture (h, w, 3) at positions (..., 2) from -1 to 1, x before y; bilinear."""
    size = np.array(picture.shape[1::-1])
    at = np.clip((at + 1) / 2 * size - 0.5, 0, size - 1)
    low = np.minimum(at.astype(int), size - 2)
    right, down = np.moveaxis(at - low, -1, 0)[..., None]
    x, y = np.moveaxis(low, -1, 0)
    upper = picture[y, x] * (1 - right) + picture[y, x + 1] * right
    lower = picture[y + 1, x] * (1 - right) + picture[y + 1, x + 1] * right
    return upper * (1 - down) + lower * down


def two_classes(labels: np.ndarray) -> np.ndarray:
    """CIFAR-10's labels as those of CLASSES."""
    return np.isin(labels, VEHICLES).astype("int64")


@cache
def split(part: str) -> list[Scene]:
    """The scenes of calibration, selection or evaluation; no two of these share a picture."""
    with np.load(example.HERE / "images.npz", allow_pickle=False) as stored:
        pictures = stored[f"{part}_x"]
        labels = stored[f"{part}_y"] if part != "calibration" else np.zeros(len(pictures), int)  # has none, needs none
    rng = np.random.default_rng(list(COUNTS).index(part))
    return [compose(rng, pictures, two_classes(labels)) for _ in range(COUNTS[part])]


def images(scenes: list[Scene]) -> np.ndarray:
    """The scenes as networks take them: float32 (n, 3, SIZE, SIZE), normalised."""
    return example.normalise(np.stack([scene.pixels for scene in scenes]))


def splits(target: Callable[[Scene], Any]) -> dict[str, Any]:
    """Calibration, selection and evaluation, as `--data` takes them, with a scene's target in place of a label."""
    labelled = {part: (images(split(part)), [target(s) for s in split(part)]) for part in ("selection", "evaluation")}
    return {"calibration": images(split("calibration")), **labelled}
