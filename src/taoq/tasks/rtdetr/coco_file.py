# SPDX-License-Identifier: Apache-2.0
"""The content of a COCO json as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taoq.errors import Fault

Id = int | float | str
"""An id of an image or a category. As pycocotools, taoq takes texts as well."""


@dataclass(frozen=True)
class Images:
    """The images of a COCO json, in its order.

    Attributes:
        ids: Their ids, either all numbers or all texts.
        files: Their file names.
        sizes: Width and height that the json says, pixels, [images, 2]; NaN if it says none.
        repeated: Number of entries with the id and the file of an earlier one, which are left out.
    """

    ids: tuple[Id, ...]
    files: tuple[str, ...]
    sizes: NDArray[np.float64]
    repeated: int


@dataclass(frozen=True)
class Annotations:
    """Annotations of a COCO json, in its order.

    Attributes:
        numbers: Number of each annotation in the json, from 0, [annotations].
        images: Index of its image, [annotations].
        categories: Index of its category, [annotations].
        boxes: Left, top, width and height of its box, pixels, [annotations, 4].
        areas: Its area, square pixels, [annotations]; NaN if the json says none.
        crowds: Whether its box is around a crowd, [annotations].
    """

    numbers: NDArray[np.int64]
    images: NDArray[np.int32]
    categories: NDArray[np.int32]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of annotations."""
        return len(self.numbers)

    def where(self, keep: NDArray[np.bool_]) -> Annotations:
        """Return the annotations for which `keep`, [annotations], is true."""
        return Annotations(
            numbers=self.numbers[keep],
            images=self.images[keep],
            categories=self.categories[keep],
            boxes=self.boxes[keep],
            areas=self.areas[keep],
            crowds=self.crowds[keep],
        )


@dataclass(frozen=True)
class Remark:
    """Something to log about a COCO json.

    Attributes:
        level: Level of logging.
        what: The message.
    """

    level: int
    what: str


@dataclass(frozen=True)
class CocoFile:
    """The content of a COCO json that a detector needs.

    Calibration needs its images only. Therefore faults of the other parts are kept, for those that need these parts.

    Attributes:
        path: The file.
        images: Its images.
        categories: Name of each category by id, in its order. Ids that are texts of whole numbers are numbers here.
        written_ids: The category ids as written in the file, in the same order.
        annotations: Its annotations, whose images and categories are indices into those of this object.
        remarks: What is to be logged whenever the file is used.
    """

    path: Path
    images: Images
    categories: Mapping[Id, str] | Fault
    written_ids: tuple[Id, ...]
    annotations: Annotations | Fault
    remarks: Sequence[Remark] = ()
