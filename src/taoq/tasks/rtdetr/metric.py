# SPDX-License-Identifier: Apache-2.0
"""Average precision of COCO, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from taoq.errors import Notice
from taoq.files import digest
from taoq.network import Outputs
from taoq.plain import JsonMapping, JsonObject
from taoq.tasks.rtdetr.data import Targets, read_annotations
from taoq.tasks.rtdetr.evaluated import all_classes, check_annotations, evaluated_classes
from taoq.tasks.rtdetr.matches import ClassMatches, class_matches
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.plausibility import Plausibility
from taoq.tasks.rtdetr.predict import Detections, detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

FIGURES = (
    "val_mAP", "val_mAP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""The twelve numbers of COCO in the order of `COCOeval.stats`. The first two, AP and AP50, have their names in TAO."""
_IOU_THRESHOLDS = {"val_mAP": slice(None), "val_mAP50": slice(0, 1), "AP75": slice(5, 6)}
"""The figures that models can be compared by, and which of COCO's ten IoU thresholds (0.5 to 0.95) each averages."""
_COLUMNS = 7
"""Columns of a row of detections: image number, class index, score, x, y, width, height."""


class CocoMetric:
    """Average precision over all images.

    Keeps at most 90 bytes per detection. Classes are evaluated one at a time, so that memory does not grow with their
    number.
    """

    def __init__(self, spec: RtdetrSpec) -> None:
        self._coco = read_annotations(spec)
        self._spec = spec
        self._all_classes = all_classes(self._coco)
        self._classes = evaluated_classes(self._coco, spec)
        check_annotations(self._coco, self._classes)
        if self._classes != self._all_classes:
            what = f"{len(self._classes)} of {len(self._all_classes)} classes are evaluated"
            log.warning(Notice("dataset.eval_class_ids", f"{what}; TAO's evaluate ignores this field"))
        # pycocotools gets numbers of images instead of ids, in the order of the ids. Ids can be texts, or integers that
        # a float cannot hold.
        ids = self._coco.images.ids
        self._by_id = sorted(range(len(ids)), key=ids.__getitem__)
        self._numbers = np.argsort(self._by_id)
        self._indices = {id_: index for index, id_ in enumerate(ids)}
        self._wrong_sizes: list[str] = []
        self._plausibility = Plausibility(self._coco)
        self._rows: list[NDArray[np.float64]] = []
        self._precision: NDArray[np.float64] | None = None
        self._matches: list[ClassMatches] = []
        self._per_class: dict[str, float | None] = {}
        self._stats: list[float] = []

    @property
    def figures(self) -> Sequence[str]:
        """The names of COCO's AP, AP50 (at IoU 0.5) and AP75 (at IoU 0.75)."""
        return tuple(_IOU_THRESHOLDS)

    @property
    def num_samples(self) -> int:
        """Number of images in the json."""
        return len(self._indices)

    @property
    def key(self) -> str:
        """Digest of the annotations, the evaluated classes, and the settings that select and scale detections."""
        spec = self._spec
        aspect = spec.dataset.augmentation.preserve_aspect_ratio
        settings = [spec.model.num_select, spec.evaluate.conf_threshold, input_size(spec), aspect]
        return digest([self._coco.key, self._classes, settings])

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add logits [N, queries, classes] and boxes [N, queries, 4]."""
        per_image = detections(self._spec, outputs, targets, self._spec.evaluate.conf_threshold)
        for image_id, size, image_detections in zip(targets.image_ids, targets.sizes.tolist(), per_image, strict=True):
            index = self._indices[image_id]
            said = self._coco.images.sizes[index]
            if not np.isnan(said).any() and said.tolist() != size:
                self._wrong_sizes.append(self._coco.images.files[index])
            self._plausibility.add(index, image_detections)
            self._rows.append(_rows(int(self._numbers[index]), image_detections))

    def compute(self) -> dict[str, float]:
        """Return the twelve numbers of COCO, in 0..1, without those for a size of boxes that no annotation has."""
        if self._wrong_sizes:
            count, first = len(self._wrong_sizes), self._wrong_sizes[0]
            what = f"{count} image(s) have another size than it says, first {first}: are its boxes for these files?"
            log.warning(Notice(str(self._coco.path), what))
        for doubt in self._plausibility.doubts():
            log.warning(Notice(str(self._coco.path), doubt))
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, _COLUMNS))
        self._rows = [rows]
        with contextlib.redirect_stdout(io.StringIO()):
            self._matches.clear()
            parts: list[JsonMapping] = []
            for index in self._classes:
                evaluation = self._evaluate(index, rows)
                parts.append(evaluation.eval)
                self._matches.append(class_matches(evaluation))
            joined = _joined(self._classes, parts)
        self._precision = joined.eval["precision"]
        self._stats = [float(value) for value in joined.stats]
        for column, index in enumerate(self._classes):
            precision = self._precision[:, :, column, 0, -1]
            defined = precision[precision > -1]
            self._per_class[self._coco.names[index]] = float(defined.mean()) if defined.size else None
        return {name: value for name, value in zip(FIGURES, self._stats, strict=True) if value > -1}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """Compute a figure with each image counted `counts` times. Call `compute` first.

        The result is that of pycocotools for a data set with copies of the images, where the ids of the copies of an
        image lie between its own id and that of the next image.

        Args:
            figure: A name in `figures`.
            counts: How many times to count each image, by ascending image id, [num_samples].

        Returns:
            The figure; NaN if these images have no annotations.
        """
        assert self._precision is not None
        ious = _IOU_THRESHOLDS[figure]
        precisions = [matches.precision(counts, ious) for matches in self._matches]
        means = [precision.mean() for precision in precisions if precision is not None]
        return float(np.mean(means)) if means else math.nan

    def write(self, directory: Path) -> JsonMapping:
        """Write detections.json, in the results format of COCO, and precision_recall.png.

        Returns:
            The twelve numbers of COCO, and AP by class name; None for those that are not defined. If eval_class_ids
            leaves classes out, also AP and AP50 over all classes, which are logged.
        """
        with (directory / "detections.json").open("w", encoding="utf-8") as file:
            file.write("[")
            for number, line in enumerate(self._results()):
                file.write((",\n" if number else "\n") + json.dumps(line))
            file.write("\n]\n")
        assert self._precision is not None
        _draw(self._precision, [self._coco.names[index] for index in self._classes], directory)
        coco = {name: value if value > -1 else None for name, value in zip(FIGURES, self._stats, strict=True)}
        details: JsonObject = {"coco": coco, "classes": self._per_class}
        if self._classes != self._all_classes:
            details["all_classes"] = self._over_all_classes()
        return details

    def _over_all_classes(self) -> JsonObject:
        """Compute and log AP and AP50 over all classes, whatever eval_class_ids says."""
        (rows,) = self._rows
        with contextlib.redirect_stdout(io.StringIO()):
            parts = [self._evaluate(index, rows).eval for index in self._all_classes]
            stats = _joined(self._all_classes, parts).stats
        figures = {name: float(value) for name, value in zip(FIGURES[:2], stats[:2], strict=True)}
        values = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        what = f"over all {len(self._all_classes)} classes, as TAO's evaluate counts: {values}"
        log.warning(Notice("dataset.eval_class_ids", what))
        return figures

    def _evaluate(self, class_index: int, rows: NDArray[np.float64]) -> COCOeval:
        """Evaluate one class."""
        truth = self._coco.annotations.where(self._coco.labels == class_index)
        numbers, found = self._numbers[truth.images], rows[rows[:, 1] == class_index]
        # pycocotools skips images without annotations and detections, but needs time for each.
        images = np.union1d(numbers, found[:, 0]).astype(int).tolist()
        evaluation = COCOeval(
            _indexed(images, numbers, truth.boxes, truth.areas, truth.crowds, np.zeros(len(truth))),
            _indexed(images, found[:, 0], found[:, 3:], found[:, 5] * found[:, 6], np.zeros(len(found)), found[:, 2]),
            "bbox",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation

    def _results(self) -> Iterator[JsonObject]:
        """Yield all detections in the results format of COCO."""
        for rows in self._rows:
            for row in rows:
                if (category := self._coco.written_ids[int(row[1])]) is not None:
                    yield {
                        "image_id": self._coco.images.ids[self._by_id[int(row[0])]],
                        "category_id": category,
                        "bbox": [round(value, 2) for value in row[3:].tolist()],
                        "score": round(row[2], 5),
                    }


def _joined(classes: Sequence[int], parts: Sequence[JsonMapping]) -> COCOeval:
    """Summarize the evaluations of classes."""
    joined = COCOeval(iouType="bbox")
    joined.params.catIds = list(classes)
    joined.eval = {
        "params": joined.params,
        "precision": np.concatenate([part["precision"] for part in parts], axis=2),
        "recall": np.concatenate([part["recall"] for part in parts], axis=1),
        "scores": np.concatenate([part["scores"] for part in parts], axis=2),
    }
    joined.summarize()
    return joined


def _rows(number: int, image_detections: Detections) -> NDArray[np.float64]:
    """Return the detections of an image, by descending score, as rows of `_COLUMNS` numbers."""
    boxes = image_detections.boxes.double().numpy()
    rows = np.empty((len(boxes), _COLUMNS))
    rows[:, 0] = number
    rows[:, 1] = image_detections.labels.numpy()
    rows[:, 2] = image_detections.scores.double().numpy()
    rows[:, 3:5] = boxes[:, :2]
    rows[:, 5:] = boxes[:, 2:] - boxes[:, :2]
    return rows


def _indexed(
    images: Sequence[int],
    numbers: NDArray[Any],
    boxes: NDArray[np.float64],
    areas: NDArray[np.float64],
    crowds: NDArray[Any],
    scores: NDArray[np.float64],
) -> COCO:
    """Return an indexed COCO data set of one class.

    Args:
        images: Numbers of its images.
        numbers: Number of the image of each annotation or detection, [n].
        boxes: Left, top, width, height, [n, 4].
        areas: Areas, [n].
        crowds: Whether they are crowds, [n].
        scores: Scores of detections, [n].
    """
    columns = numbers.astype(int), boxes, areas, crowds.astype(int), scores
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in images],
        "categories": [{"id": 0}],
        "annotations": [
            {
                "id": id_,
                "category_id": 0,
                "image_id": number,
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
                "score": score,
            }
            for id_, (number, box, area, crowd, score) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ],
    }
    coco.createIndex()
    return coco


def _draw(precision: NDArray[np.float64], names: Sequence[str], directory: Path) -> None:
    """Draw precision over recall at IoU 0.5, for each class in grey and for their mean in blue."""
    from matplotlib.figure import Figure

    recall = np.linspace(0, 1, precision.shape[1])
    curves = precision[0, :, :, 0, -1]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    columns = [column for column in range(len(names)) if (curves[:, column] > -1).all()]
    for column in columns:
        axes.plot(recall, curves[:, column], color="0.7", linewidth=1)
    if columns:
        mean = curves[:, columns].mean(1)
        axes.plot(recall, mean, color="tab:blue", linewidth=2.5, label=f"mean, AP50 {mean.mean():.3f}")
        axes.plot([], [], color="0.7", label=f"{len(columns)} classes")
        axes.legend(loc="lower left")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5")
    figure.savefig(directory / "precision_recall.png", dpi=100)
