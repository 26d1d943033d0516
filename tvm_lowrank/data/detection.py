"""Average precision of boxes and of key points, by pycocotools. What makes boxes of outputs is the user's function.

Images are matched one by one and once; a value is what their matches accumulate to, so that images can be drawn again
without being matched again.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.data.builtin import library
from tvm_lowrank.data.measure import FEW, UNKNOWN, Metric, Rows, Statistic, Unscored
from tvm_lowrank.data.parts import Outputs, Targets, count, objects
from tvm_lowrank.errors import UserError

EVERYTHING = 1e10  # no area is larger; what is to be ignored has a larger one
MOST_BOXES, MOST_PEOPLE = 100, 20  # of an image
VOC_OVERLAP = 0.5
SIGMA = 0.05  # of key points that are not COCO's 17

Found = Mapping[str, np.ndarray]


def voc() -> Metric:
    """Average precision of boxes that overlap by half."""
    return _metric("voc-map", boxes_in, lambda rows: precision(rows, "bbox", [VOC_OVERLAP]))


def coco() -> Metric:
    """Average precision of boxes, the mean over overlaps of 0.5 to 0.95."""
    return _metric("coco-map", boxes_in, lambda rows: precision(rows, "bbox"))


def oks() -> Metric:
    """Average precision of key points, the mean over object key point similarities of 0.5 to 0.95."""
    return _metric("oks-map", people_in, lambda rows: precision(rows, "keypoints"))


def _metric(name: str, of: Callable[[Any, str, bool], Found], whole: Callable[[Rows], Statistic]) -> Metric:
    library("pycocotools.cocoeval", name)

    def rows(outputs: Outputs | list[Any], targets: Targets) -> Rows:
        if not isinstance(outputs, list):
            raise UserError(
                f"{name} needs a function that makes of outputs a list with what is found in each image; give --metric "
                f"{name}:file.py:function"
            )
        if len(outputs) != count(targets):
            raise UserError(f"{name}: the function gave {len(outputs)} items for {count(targets)} images; one for each")
        pairs = zip(outputs, list(targets), strict=True)
        return objects(
            [(of(got, f"{name} outputs", True), of(wanted, f"{name} targets", False)) for got, wanted in pairs]
        )

    return Metric(name, rows, whole=whole, resamples=FEW, cost=UNKNOWN)


def boxes_in(item: Any, what: str, found: bool) -> Found:
    """Of an image: boxes (k, 4), labels (k,), scores (k,) of those found, and which are to be ignored, of the others.

    Targets may be an array (k, 5) as well, of x1, y1, x2, y2 and a label, which is negative where there is no box.
    """
    if not isinstance(item, Mapping):
        values = _array(item, what, "a mapping of boxes and labels")
        if found or values.ndim != 2 or values.shape[1] != 5:
            raise UserError(f"{what} have shape {values.shape}; give a mapping of boxes, labels" + ", scores" * found)
        values = values[values[:, 4] >= 0]
        item = {"boxes": values[:, :4], "labels": values[:, 4]}
    boxes = _part(item, "boxes", what)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise UserError(f"{what}: boxes have shape {boxes.shape}; give x1, y1, x2, y2 of each")
    boxes = boxes.reshape(-1, 4)
    return {"boxes": boxes, **_others(item, what, found, len(boxes), "labels")}


def people_in(item: Any, what: str, found: bool) -> Found:
    """Of an image: key points (k, points, 2 or 3), scores (k,) of those found, areas (k,) of the others.

    The third number of a target is above 0 where the point is known; areas that are not given are those of the boxes
    around such points.
    """
    if not isinstance(item, Mapping):
        item = {"keypoints": _array(item, what, "a mapping of keypoints")}
    points = _part(item, "keypoints", what)
    if points.ndim != 3 or points.shape[2] not in (2, 3):
        if points.size:
            raise UserError(f"{what}: keypoints have shape {points.shape}; give (people, points, 2 or 3)")
        points = points.reshape(0, 1, 3)
    if points.shape[2] == 2:
        points = np.concatenate([points, np.full((*points.shape[:2], 1), 2.0)], axis=2)
    known = [own[own[:, 2] > 0, :2] if not found else own[:, :2] for own in points]
    boxes = np.array([[*own.min(axis=0), *own.max(axis=0)] if len(own) else [0] * 4 for own in known]).reshape(-1, 4)
    more = {"area": _part(item, "area", what).reshape(-1)} if "area" in item else {}
    labels = {"labels": np.zeros(len(points))}
    return {
        "boxes": boxes,
        "keypoints": points,
        **more,
        **_others({**item, **labels}, what, found, len(points), "labels"),
    }


def _others(item: Mapping[str, Any], what: str, found: bool, length: int, *names: str) -> dict[str, np.ndarray]:
    own = {name: _part(item, name, what).reshape(-1) for name in (*names, *(("scores",) if found else ()))}
    ignored = next((item[name] for name in ("ignored", "iscrowd", "difficult") if name in item), None)
    if not found:
        own["ignored"] = np.zeros(length) if ignored is None else _array(ignored, what, "ignored").reshape(-1)
    for name, values in own.items():
        if len(values) != length:
            raise UserError(f"{what}: {len(values)} {name} for {length} boxes; give one for each")
    return own


def _part(item: Mapping[str, Any], name: str, what: str) -> np.ndarray:
    if name not in item:
        raise UserError(f"{what} have {', '.join(map(str, item)) or 'nothing'}, but no {name!r}; add it")
    return _array(item[name], what, name)


def _array(value: Any, what: str, name: str) -> np.ndarray:
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype="float64")
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {type(value).__name__} is no {name} of numbers; correct it") from error
    if not np.isfinite(array).all():
        raise Unscored(f"{what}: {name} hold NaN or Inf; correct them")
    return array


def precision(rows: Rows, kind: str, overlaps: Sequence[float] | None = None) -> Statistic:
    """Average precision, the mean over classes, as a function of the images that are picked."""
    cocoeval = library("pycocotools.cocoeval", "coco-map")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        known = _table([wanted for _, wanted in rows], found=False)
        found = _table([got for got, _ in rows], found=True, classes=known.getCatIds())
        run = cocoeval.COCOeval(known, found, kind)
        run.params.imgIds = list(range(len(rows)))
        run.params.areaRng, run.params.areaRngLbl = [[0, EVERYTHING]], ["all"]
        run.params.maxDets = [MOST_BOXES if kind == "bbox" else MOST_PEOPLE]
        if overlaps is not None:
            run.params.iouThrs = np.array(overlaps)
        points = (
            max((own["keypoints"].shape[1] for _, own in rows if len(own["boxes"])), default=0) if kind != "bbox" else 0
        )
        if kind != "bbox" and points != len(run.params.kpt_oks_sigmas):
            run.params.kpt_oks_sigmas = np.full(points, SIGMA)
        run.evaluate()
    classes = len(run.params.catIds)
    matches = objects(run.evalImgs).reshape(classes, len(rows))

    def value(picked: np.ndarray) -> float:
        if not classes:
            return 0.0
        run.evalImgs = matches[:, picked].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            run.accumulate()
        values = run.eval["precision"]
        values = values[values > -1]
        return float(values.mean()) if values.size else 0.0

    return value


def _table(items: Sequence[Found], *, found: bool, classes: Sequence[int] | None = None) -> Any:
    """Images with what is in them, as pycocotools keeps them; numbers of what is in them count from 1."""
    table = library("pycocotools.coco", "coco-map").COCO()
    entries: list[dict[str, Any]] = []
    for image, own in enumerate(items):
        for k, (x1, y1, x2, y2) in enumerate(own["boxes"].tolist()):
            area = float(own["area"][k]) if "area" in own else (x2 - x1) * (y2 - y1)
            entry = {
                "id": len(entries) + 1,
                "image_id": image,
                "category_id": int(own["labels"][k]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": 0,
            }
            if found:
                entry["score"] = float(own["scores"][k])
            elif own["ignored"][k]:
                entry["area"] = 2 * EVERYTHING
            if "keypoints" in own:
                entry["keypoints"] = own["keypoints"][k].ravel().tolist()
                entry["num_keypoints"] = int((own["keypoints"][k, :, 2] > 0).sum())
            entries.append(entry)
    names = sorted({entry["category_id"] for entry in entries}) if classes is None else classes
    table.dataset = {
        "images": [{"id": image} for image in range(len(items))],
        "annotations": entries,
        "categories": [{"id": name} for name in names],
    }
    table.createIndex()
    return table
