# SPDX-License-Identifier: Apache-2.0
"""Complete the annotations of a COCO json, and remark on what is unusual in them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from taoq.errors import Fault, abbreviated
from taoq.tasks.rtdetr.coco_file import Annotations, CocoFile, Images, Remark


def completed(file: CocoFile) -> CocoFile:
    """Fill in missing areas, and leave out annotations without width or height. Both are remarked on."""
    remarks = list(_of_images(file.images))
    rows = file.annotations
    if isinstance(rows, Fault) or isinstance(file.categories, Fault):
        return dataclasses.replace(file, remarks=remarks)
    has_box = np.all(np.isfinite(rows.boxes) & (rows.boxes > [-np.inf, -np.inf, 0, 0]), axis=1)
    if count := int((~has_box).sum()):
        remarks.append(Remark(logging.WARNING, f"{count} annotation(s) without width or height are left out"))
        rows = rows.where(has_box)
    if count := int(np.isnan(rows.areas).sum()):
        remarks.append(Remark(logging.INFO, f"{count} annotation(s) have no area: that of their box counts"))
        areas = np.where(np.isnan(rows.areas), rows.boxes[:, 2] * rows.boxes[:, 3], rows.areas)
        rows = dataclasses.replace(rows, areas=areas)
    remarks += _of_annotations(rows, list(file.categories.values()))
    return dataclasses.replace(file, annotations=rows, remarks=remarks)


def _of_images(images: Images) -> Iterator[Remark]:
    if images.repeated:
        yield Remark(logging.WARNING, f"{images.repeated} image(s) are in the list of images twice: they count once")
    if count := len(images.files) - len(set(images.files)):
        what = f"{count} image file(s) have several ids: each counts with the annotations of its own id only"
        yield Remark(logging.WARNING, what)


def _of_annotations(rows: Annotations, names: Sequence[str]) -> Iterator[Remark]:
    if count := int((rows.areas <= 0).sum()):
        what = f"{count} annotation(s) have an area of 0 or less: COCO counts 0 as small, and ignores less"
        yield Remark(logging.WARNING, what)
    values = np.column_stack([rows.images, rows.categories, rows.boxes])
    ordered = values[np.lexsort(values.T)]
    if count := int((ordered[1:] == ordered[:-1]).all(1).sum()):
        yield Remark(logging.WARNING, f"{count} annotation(s) repeat another one: same image, category and box")
    without = np.setdiff1d(np.arange(len(names)), rows.categories)
    if len(without) and len(rows):
        what = f"{len(without)} of {len(names)} categories have no annotations, and do not count: "
        yield Remark(logging.INFO, what + abbreviated([names[index] for index in without]))
