# SPDX-License-Identifier: Apache-2.0
"""The detections of a class that pycocotools matched with annotations, and their precision in a resample of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

_RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO reads the precision."""


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class, by descending score, and whether pycocotools matched them with an annotation.

    Consecutive detections of one image with the same score are a run. With copies of an image, pycocotools sorts the
    detections of each copy one after the other, so a resample repeats whole runs.

    Attributes:
        truth_images: Image index of each annotation to find, [annotations].
        run_images: Image index of each run, [runs].
        run_starts: Index of the first detection of each run, [runs].
        run_sizes: Number of detections in each run, [runs].
        correct: Whether a detection matches an annotation to find, [IoU thresholds, detections].
        counted: Whether a detection is correct or wrong, [IoU thresholds, detections]. Detections that match a crowd
            are neither.
    """

    truth_images: NDArray[np.int32]
    run_images: NDArray[np.int32]
    run_starts: NDArray[np.int32]
    run_sizes: NDArray[np.int32]
    correct: NDArray[np.bool_]
    counted: NDArray[np.bool_]

    def precision(self, counts: NDArray[np.int64], ious: slice) -> NDArray[np.float64] | None:
        """Compute what `COCOeval.accumulate` does, with each image counted `counts` times.

        Returns:
            The precision, [IoU thresholds, recalls]; None if there are no annotations to find.
        """
        num_truths = int(counts[self.truth_images].sum())
        if not num_truths:
            return None
        runs = np.repeat(np.arange(len(self.run_images)), counts[self.run_images])
        sizes = self.run_sizes[runs]
        ends = np.cumsum(sizes)
        order = np.repeat(self.run_starts[runs] + sizes - ends, sizes) + np.arange(sizes.sum())
        correct = self.correct[ious, order]
        ranks = np.cumsum(self.counted[ious, order], axis=1)
        # The number of correct detections that reaches each recall. At recall 0, COCO reads the first detection, and
        # the envelope is the same there as at the first correct one.
        needed = np.searchsorted(np.arange(num_truths + 1) / num_truths, _RECALLS).clip(min=1)
        curves = []
        for is_correct, rank in zip(correct, ranks, strict=True):
            # Between two correct detections the precision only falls, so the envelope depends on the correct ones only.
            correct_ranks = rank[is_correct]
            precision = np.arange(1, len(correct_ranks) + 1) / (correct_ranks + np.spacing(1))
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            # The appended 0 is the precision at recalls that are not reached.
            curves.append(np.append(envelope, 0.0)[np.minimum(needed - 1, len(correct_ranks))])
        return np.array(curves)


def class_matches(evaluation: COCOeval) -> ClassMatches:
    """Return the matches of an evaluated class, for boxes of all sizes and at most 100 detections per image."""
    # `evalImgs` has all images for each range of box areas; the first range has all boxes.
    per_image = evaluation.evalImgs[: len(evaluation.params.imgIds)]
    entries = [(int(entry["image_id"]), entry) for entry in per_image if entry is not None]
    numbers = [number for number, _ in entries]
    scores = np.array([score for _, entry in entries for score in entry["dtScores"]])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    images = np.repeat(np.array(numbers, np.int32), [len(entry["dtScores"]) for _, entry in entries])[order]
    starts_run = np.ones(len(order), bool)
    starts_run[1:] = (scores[1:] != scores[:-1]) | (images[1:] != images[:-1])
    starts = np.flatnonzero(starts_run).astype(np.int32)
    none = np.empty((len(evaluation.params.iouThrs), 0))
    matched = np.concatenate([none, *(entry["dtMatches"] for _, entry in entries)], axis=1)[:, order] != 0
    counted = np.concatenate([none, *(entry["dtIgnore"] for _, entry in entries)], axis=1)[:, order] == 0
    num_truths = [np.sum(entry["gtIgnore"] == 0) for _, entry in entries]
    return ClassMatches(
        truth_images=np.repeat(np.array(numbers, np.int32), num_truths),
        run_images=images[starts],
        run_starts=starts,
        run_sizes=np.diff(starts, append=np.int32(len(order))),
        correct=matched & counted,
        counted=counted,
    )
