# SPDX-License-Identifier: Apache-2.0
"""Tell from the detections whether annotations may be misread: boxes of another format, categories of other outputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torchvision.ops import box_iou

from taoq.tasks.rtdetr.coco import Coco
from taoq.tasks.rtdetr.predict import Detections

_SCORE, _IOU = 0.3, 0.5
"""Smallest score of the detections that are compared, and smallest IoU with an annotation that they find."""
_ENOUGH = 20
"""Smallest number of annotations from which anything is concluded."""


class Plausibility:
    """Counts the annotations that any confident detection finds, and those that one of their own category finds."""

    def __init__(self, coco: Coco) -> None:
        rows = coco.annotations
        usable = np.flatnonzero(~rows.crowds & (coco.labels >= 0))
        order = usable[np.argsort(rows.images[usable], kind="stable")]
        boxes = rows.boxes[order]
        self._boxes = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1))
        self._labels = torch.from_numpy(coco.labels[order])
        self._starts = np.searchsorted(rows.images[order], np.arange(len(coco.images.ids) + 1))
        self._annotations = self._detections = self._found = self._right = 0

    def add(self, image: int, detections: Detections) -> None:
        """Add the detections in an image, given its index."""
        confident = detections.scores >= _SCORE
        place = slice(int(self._starts[image]), int(self._starts[image + 1]))
        truth, labels = self._boxes[place], self._labels[place]
        self._annotations += len(truth)
        self._detections += int(confident.sum())
        if len(truth) and bool(confident.any()):
            iou, nearest = box_iou(truth, detections.boxes[confident].double()).max(1)
            found = iou >= _IOU
            self._found += int(found.sum())
            self._right += int((detections.labels[confident][nearest] == labels)[found].sum())

    def doubts(self) -> Iterator[str]:
        """Yield what looks wrong."""
        if self._found >= _ENOUGH and self._right < 0.2 * self._found:
            yield (
                f"detections find {self._found} of its boxes, but only {self._right} with its category:"
                " are the outputs those of dataset.category_ids?"
            )
        enough = self._annotations >= _ENOUGH and self._detections >= self._annotations / 2
        if enough and self._found < 0.05 * self._annotations:
            yield (
                f"{self._detections} detections find {self._found} of its {self._annotations} boxes, of any category:"
                " are they [x, y, width, height] in pixels of these image files?"
            )
