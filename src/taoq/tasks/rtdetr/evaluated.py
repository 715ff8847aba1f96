# SPDX-License-Identifier: Apache-2.0
"""Which classes are evaluated, and whether there is anything to find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taoq.errors import Fault, SpecError, TaoqError, abbreviated
from taoq.tasks.rtdetr.coco import Coco
from taoq.tasks.rtdetr.spec import RtdetrSpec

_LARGEST_AREA = 1e10
"""COCO ignores annotations with a larger area, and those with an area below 0."""


def all_classes(coco: Coco) -> list[int]:
    """Return the class indices that are a category."""
    return [index for index, id_ in enumerate(coco.category_ids) if id_ is not None]


def evaluated_classes(coco: Coco, spec: RtdetrSpec) -> list[int]:
    """Return the class indices that are evaluated: all that are a category, or those of dataset.eval_class_ids.

    Raises:
        SpecError: If that field is empty, or has other ids.
    """
    chosen = spec.dataset.eval_class_ids
    classes = all_classes(coco)
    if chosen is None:
        return classes
    if not chosen:
        hint = "name category ids, or leave the field out to evaluate all"
        raise SpecError(Fault("dataset.eval_class_ids", "empty: nothing would be evaluated", hint))
    ids = [coco.category_ids[index] for index in classes]
    if unknown := sorted(set(chosen) - set(ids)):
        what = f"{unknown} are no category ids of {coco.path}"
        raise SpecError(Fault("dataset.eval_class_ids", what, f"its ids are {ids}"))
    return [index for index in classes if coco.category_ids[index] in chosen]


def check_annotations(coco: Coco, classes: Sequence[int]) -> None:
    """Raise TaoqError if there is nothing to find."""
    rows, where = coco.annotations, str(coco.path)
    if not len(rows):
        what = "has no annotations with a box, so there is nothing to find"
        raise TaoqError(Fault(where, what, "name a COCO json with annotations"))
    evaluated = np.isin(coco.labels, classes)
    if not evaluated.any():
        names = abbreviated([coco.names[index] for index in classes])
        what = f"none of its {len(rows)} annotations is of a category that is evaluated: {names}"
        raise TaoqError(Fault(where, what, "correct the json, dataset.category_ids or dataset.eval_class_ids"))
    if not (evaluated & ~rows.crowds & (rows.areas >= 0) & (rows.areas <= _LARGEST_AREA)).any():
        what = f"its {evaluated.sum()} annotations are crowds, or have an area below 0: COCO looks for none of them"
        raise TaoqError(Fault(where, what, "name a COCO json with other annotations"))
