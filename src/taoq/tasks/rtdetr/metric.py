# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from taoq.errors import Fault, Notice, SpecError
from taoq.files import digest
from taoq.network import Outputs
from taoq.plain import JsonMapping, JsonObject
from taoq.tasks.rtdetr.data import Targets, evaluation_source
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.predict import Detections, detections
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)

FIGURES = (
    "val_mAP", "val_mAP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve numbers in the order of `COCOeval.stats`; the first two under TAO's names (AP and AP50)."""
_RESAMPLED = {"val_mAP": slice(None), "val_mAP50": slice(0, 1), "AP75": slice(5, 6)}  # among COCO's ten IoUs
_RECALLS = np.linspace(0, 1, 101)  # where COCO reads the precision
_COLUMNS = 7  # image id, class index, score, x, y, width, height


class CocoMetric:
    """Keeps at most 90 bytes a detection, and evaluates one class at a time: memory does not grow with the classes."""

    def __init__(self, spec: RtdetrSpec) -> None:
        _, self._coco = evaluation_source(spec)
        self._spec = spec
        known = set(self._coco.category_ids) - {-1}
        chosen = spec.dataset.eval_class_ids
        if chosen == []:
            hint = "name category ids, or leave the field out to evaluate all"
            raise SpecError(Fault("dataset.eval_class_ids", "empty: nothing would be evaluated", hint))
        strange = sorted(set(chosen or ()) - known)
        if strange:
            what = f"{strange} are no category ids of {self._coco.path}"
            raise SpecError(Fault("dataset.eval_class_ids", what, f"its ids are {sorted(known)}"))
        self._classes = [
            index
            for index, id_ in enumerate(self._coco.category_ids)
            if id_ in known and (chosen is None or id_ in chosen)
        ]
        self._images = {image["id"]: image for image in self._coco.data["images"]}
        self._of_another_size: list[str] = []
        self._rows: list[NDArray[np.float64]] = []
        self._truth: COCO | None = None
        self._precision: NDArray[np.float64] | None = None
        self._matched: list[_Matched] = []
        self._per_class: dict[str, float | None] = {}
        self._stats: list[float] = []

    @property
    def figures(self) -> Sequence[str]:
        """Average precision: COCO's own, at IoU 0.5, at IoU 0.75."""
        return tuple(_RESAMPLED)

    @property
    def num_samples(self) -> int:
        """Number of images that the json names."""
        return len(self._images)

    @property
    def key(self) -> str:
        """The annotations, the classes that count, and which detections do."""
        spec = self._spec
        aspect = spec.dataset.augmentation.preserve_aspect_ratio
        chosen = [spec.model.num_select, spec.evaluate.conf_threshold, input_size(spec), aspect]
        truth = [self._coco.data[part] for part in ("images", "annotations", "categories")]
        return digest([truth, self._coco.category_ids, self._classes, chosen])

    def update(self, outputs: Outputs, targets: Targets) -> None:
        """Add logits [N, queries, classes] and boxes [N, queries, 4]."""
        for image_id, size in zip(targets.image_ids, targets.sizes.tolist(), strict=True):
            image = self._images[image_id]
            said = [image.get("width"), image.get("height")]
            if None not in said and said != size:
                self._of_another_size.append(str(image["file_name"]))
        for image_id, found in zip(
            targets.image_ids, detections(self._spec, outputs, targets, self._spec.evaluate.conf_threshold), strict=True
        ):
            self._rows.append(_rows(image_id, found))

    def compute(self) -> dict[str, float]:
        """COCO's twelve numbers, in 0..1; those of a size that no annotation has are left out."""
        if self._of_another_size:
            count, first = len(self._of_another_size), self._of_another_size[0]
            what = f"{count} image(s) are of another size than it says, first {first}: are its boxes for these files?"
            log.warning(Notice(str(self._coco.path), what))
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, _COLUMNS))
        self._rows = [rows]
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = _index(self._coco.data, self._coco.data["annotations"])
            self._matched.clear()
            parts = [self._evaluate(index, rows) for index in self._classes]
            whole = COCOeval(self._truth, _index(self._coco.data, ()), "bbox")
            whole.params.catIds = [self._coco.category_ids[index] for index in self._classes]
            whole.eval = {
                "params": whole.params,
                "precision": np.concatenate([part["precision"] for part in parts], axis=2),
                "recall": np.concatenate([part["recall"] for part in parts], axis=1),
                "scores": np.concatenate([part["scores"] for part in parts], axis=2),
            }
            whole.summarize()
        self._precision = whole.eval["precision"]
        self._stats = [float(value) for value in whole.stats]
        for column, index in enumerate(self._classes):
            precision = self._precision[:, :, column, 0, -1]
            there = precision[precision > -1]
            self._per_class[self._coco.names[index]] = float(there.mean()) if there.size else None
        return {name: value for name, value in zip(FIGURES, self._stats, strict=True) if value > -1}

    def resampled(self, figure: str, counts: NDArray[np.int64]) -> float:
        """A figure as if the images, by ascending id, were there `counts` times; call `compute` before.

        A copy is an image of its own, with an id between its original's and the next: the figure is the one of
        pycocotools over all of them.

        Returns:
            The figure; NaN if these images have no annotation to find.
        """
        assert self._precision is not None
        ious = _RESAMPLED[figure]
        precisions = [matched.precision(counts, ious) for matched in self._matched]
        there = [precision.mean() for precision in precisions if precision is not None]
        return float(np.mean(there)) if there else math.nan

    def write(self, directory: Path) -> JsonMapping:
        """Write detections.json, in COCO's results format, and precision_recall.png."""
        with (directory / "detections.json").open("w", encoding="utf-8") as file:
            file.write("[")
            for number, line in enumerate(self._results()):
                file.write((",\n" if number else "\n") + json.dumps(line))
            file.write("\n]\n")
        assert self._precision is not None
        _draw(self._precision, [self._coco.names[index] for index in self._classes], directory)
        coco = {name: value if value > -1 else None for name, value in zip(FIGURES, self._stats, strict=True)}
        return {"coco": coco, "classes": self._per_class}

    def _evaluate(self, index: int, rows: NDArray[np.float64]) -> JsonMapping:
        """Evaluate one class; keep what a resample needs."""
        category = self._coco.category_ids[index]
        found = [
            {
                "id": number + 1,
                "image_id": int(row[0]),
                "category_id": category,
                "score": row[2],
                "bbox": row[3:].tolist(),
                "area": row[5] * row[6],
                "iscrowd": 0,
            }
            for number, row in enumerate(rows[rows[:, 1] == index])
        ]
        run = COCOeval(self._truth, _index(self._coco.data, found), "bbox")
        run.params.catIds = [category]
        run.evaluate()
        run.accumulate()
        self._matched.append(_matched(run))
        result: JsonMapping = run.eval
        return result

    def _results(self) -> Iterator[JsonObject]:
        for rows in self._rows:
            for row in rows:
                if (category := self._coco.category_ids[int(row[1])]) >= 0:
                    yield {
                        "image_id": int(row[0]),
                        "category_id": category,
                        "bbox": [round(value, 2) for value in row[3:].tolist()],
                        "score": round(row[2], 5),
                    }


@dataclass(frozen=True)
class _Matched:
    """Which detections of a class pycocotools matched, best first, [IoU, D].

    What an image has at one score is a run of detections: copies of the image repeat it as a whole, one copy after the
    other, which is their order in pycocotools.

    Attributes:
        truths: The image of each annotation that is to be found.
        images: The image of each run.
        starts: First detection of each run.
        sizes: Number of detections of each run.
        right: Those that found an annotation.
        counted: Those that are right or wrong; not those that found a crowd.
    """

    truths: NDArray[np.int32]
    images: NDArray[np.int32]
    starts: NDArray[np.int32]
    sizes: NDArray[np.int32]
    right: NDArray[np.bool_]
    counted: NDArray[np.bool_]

    def precision(self, counts: NDArray[np.int64], ious: slice) -> NDArray[np.float64] | None:
        """`COCOeval.accumulate` with each image `counts` times: [IoU, recall], None if there is nothing to find."""
        truths = int(counts[self.truths].sum())
        if not truths:
            return None
        runs = np.repeat(np.arange(len(self.images)), counts[self.images])
        sizes = self.sizes[runs]
        ends = np.cumsum(sizes)
        found = np.repeat(self.starts[runs] + sizes - ends, sizes) + np.arange(sizes.sum())
        right = self.right[ious, found]
        places = np.cumsum(self.counted[ious, found], axis=1)
        # the number of right detections that reaches each recall; the recall of 0 is that of the first one
        needed = np.searchsorted(np.arange(truths + 1) / truths, _RECALLS).clip(min=1)
        curves = []
        for mask, place in zip(right, places, strict=True):
            # between two right detections precision only falls: their own is all that the envelope needs
            at = place[mask]
            precision = np.arange(1, len(at) + 1) / (at + np.spacing(1))
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            curves.append(np.append(envelope, 0.0)[np.minimum(needed - 1, len(at))])  # 0: a recall not reached
        return np.array(curves)


def _matched(run: COCOeval) -> _Matched:
    """Of an evaluated class: all sizes of boxes, 100 detections an image."""
    every = run.evalImgs[: len(run.params.imgIds)]  # of the first range of areas, which is all
    there = [(number, entry) for number, entry in enumerate(every) if entry is not None]
    numbers = [number for number, _ in there]
    scores = np.array([score for _, entry in there for score in entry["dtScores"]])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    images = np.repeat(np.array(numbers, np.int32), [len(entry["dtScores"]) for _, entry in there])[order]
    first = np.ones(len(order), bool)
    first[1:] = (scores[1:] != scores[:-1]) | (images[1:] != images[:-1])
    starts = np.flatnonzero(first).astype(np.int32)
    none = np.empty((len(run.params.iouThrs), 0))
    matches = np.concatenate([none, *(entry["dtMatches"] for _, entry in there)], axis=1)[:, order] != 0
    counted = np.concatenate([none, *(entry["dtIgnore"] for _, entry in there)], axis=1)[:, order] == 0
    return _Matched(
        truths=np.repeat(np.array(numbers, np.int32), [np.sum(entry["gtIgnore"] == 0) for _, entry in there]),
        images=images[starts],
        starts=starts,
        sizes=np.diff(starts, append=np.int32(len(order))),
        right=matches & counted,
        counted=counted,
    )


def _rows(image_id: int, found: Detections) -> NDArray[np.float64]:
    """The detections of an image, best first, as rows of `_COLUMNS` numbers; pycocotools takes 100 of each class."""
    boxes = found.boxes.double().numpy()
    rows = np.empty((len(boxes), _COLUMNS))
    rows[:, 0] = image_id
    rows[:, 1] = found.labels.numpy()
    rows[:, 2] = found.scores.double().numpy()
    rows[:, 3:5] = boxes[:, :2]
    rows[:, 5:] = boxes[:, 2:] - boxes[:, :2]
    return rows


def _index(data: JsonMapping, annotations: Sequence[JsonMapping]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": data["images"], "categories": data["categories"], "annotations": list(annotations)}
    coco.createIndex()
    return coco


def _draw(precision: NDArray[np.float64], names: Sequence[str], directory: Path) -> None:
    """Precision over recall at IoU 0.5: of each class in grey, of their mean in blue."""
    from matplotlib.figure import Figure

    recall = np.linspace(0, 1, precision.shape[1])
    curves = precision[0, :, :, 0, -1]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    there = [column for column in range(len(names)) if (curves[:, column] > -1).all()]
    for column in there:
        axes.plot(recall, curves[:, column], color="0.7", linewidth=1)
    if there:
        mean = curves[:, there].mean(1)
        axes.plot(recall, mean, color="tab:blue", linewidth=2.5, label=f"mean, AP50 {mean.mean():.3f}")
        axes.plot([], [], color="0.7", label=f"{len(there)} classes")
        axes.legend(loc="lower left")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5")
    figure.savefig(directory / "precision_recall.png", dpi=100)
