# SPDX-License-Identifier: Apache-2.0
"""Check that the boxes of a COCO json are [x, y, width, height], in pixels of the image files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from taoq.errors import Fault, Notice, TaoqError
from taoq.tasks.pixels import open_image
from taoq.tasks.rtdetr.coco import Coco
from taoq.tasks.rtdetr.coco_reader import annotation_fault

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_SAMPLE = 200
"""Number of image files whose size is compared with the json."""
_CORRECT = "write each bbox as [x, y, width, height], in pixels of the image file"
_CORNERS = ("[left, top, right, bottom]", "[top, left, bottom, right]")
_MANY = 50
"""Smallest number of boxes of which some lie in the right or lower half of their images."""
_LEAST = 3
"""Smallest number of boxes far outside of their images from which another format is concluded."""


def check_boxes(coco: Coco, paths: Sequence[Path]) -> None:
    """Check all boxes at once: formats are told apart by how many boxes fit their images.

    Boxes that reach a little over an edge are usual, and few that reach far over it cause a warning.

    Args:
        coco: The json.
        paths: Its image files.

    Raises:
        TaoqError: If most boxes are of another format or for images of another size, or if a box is outside of its
            image.
    """
    rows = coco.annotations
    if not len(rows):
        return
    _check_fractions(coco)
    sizes = _sizes(coco, paths)[rows.images]
    known = ~np.isnan(sizes).any(1)
    boxes, sizes, numbers = rows.boxes[known], sizes[known], rows.numbers[known]
    far_outside = ~_fits(_corners(boxes), sizes)
    _check_formats(coco, boxes, sizes, far_outside)
    left, top, width, height = boxes.T
    outside = (left >= sizes[:, 0]) | (top >= sizes[:, 1]) | (left + width <= 0) | (top + height <= 0)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        what = "its bbox {bbox} is outside of the image, " + f"{sizes[first, 0]:g} x {sizes[first, 1]:g}"
        hint = "correct the json: a bbox is [x, y, width, height] in pixels"
        raise TaoqError(annotation_fault(coco.path, int(numbers[first]), what, hint))
    if count := int(far_outside.sum()):
        what = f"{count} of {len(boxes)} boxes reach over the edges of their images by more than a tenth of their size"
        log.warning(Notice(str(coco.path), what))
    reach = ((boxes[:, :2] + boxes[:, 2:]) / sizes).max(0, initial=0)
    if len(boxes) >= _MANY and (reach < 0.5).all():
        what = f"no box reaches beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the height of its image"
        log.warning(Notice(str(coco.path), f"{what}: are they in pixels of these files?"))


def _check_fractions(coco: Coco) -> None:
    """Refuse boxes in fractions of the image's size."""
    boxes = coco.annotations.boxes
    count, total = int((boxes <= 1).all(1).sum()), len(boxes)
    what = f"{count} of {total} boxes have no value above 1, so they are not in pixels"
    if 2 * count >= total:
        raise TaoqError(Fault(str(coco.path), what, _CORRECT))
    if count:
        log.warning(Notice(str(coco.path), what))


def _check_formats(coco: Coco, boxes: Floats, sizes: Floats, far_outside: NDArray[np.bool_]) -> None:
    """Refuse boxes of which many reach far outside of their images, if they do not in another format.

    Boxes that are only badly drawn are few, or do not fit in another format either: as corners, most boxes of natural
    scenes end before they begin; as centers, those near the left and the upper edge reach outside.
    """
    count, total = int(far_outside.sum()), len(boxes)
    if count < max(_LEAST, 0.05 * total):
        return
    what = f"{count} of {total} boxes reach far outside of their images as [x, y, width, height]"
    for name, corners in _other_formats(boxes).items():
        fit = _fits(corners, sizes)
        # Only part of the boxes may be in this format, where few others fit by chance.
        doubtful = ~fit & far_outside if name in _CORNERS else ~fit
        if doubtful.sum() <= count / 5:
            what += f", and {int(fit.sum())} of {total} boxes fit as {name}"
            raise TaoqError(Fault(str(coco.path), what, _CORRECT))
    if 2 * count >= total:
        raise TaoqError(Fault(str(coco.path), what, "give the images that it describes, or correct the boxes"))


def _other_formats(boxes: Floats) -> dict[str, Floats]:
    """Return the corners of boxes (left, top, right, bottom) if their values have another meaning."""
    corners, turned_corners = _CORNERS
    return {
        corners: boxes,
        "[center x, center y, width, height]": _corners(boxes - boxes[:, [2, 3, 2, 3]] * [0.5, 0.5, 0, 0]),
        "[y, x, height, width]": _corners(boxes[:, [1, 0, 3, 2]]),
        turned_corners: boxes[:, [1, 0, 3, 2]],
    }


def _corners(boxes: Floats) -> Floats:
    """Return left, top, right, bottom of boxes that are left, top, width, height, [n, 4]."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _fits(corners: Floats, sizes: Floats) -> NDArray[np.bool_]:
    """Return which boxes lie in their images, or reach over an edge by at most 2 pixels or a tenth of their size.

    Args:
        corners: Left, top, right, bottom, [n, 4].
        sizes: Width and height of the images, [n, 2].
    """
    sides = corners[:, 2:] - corners[:, :2]
    slack = np.maximum(2, sides / 10)
    inside = (sides > 0) & (corners[:, :2] >= -slack) & (corners[:, 2:] <= sizes + slack)
    fits: NDArray[np.bool_] = np.all(inside, axis=1)
    return fits


def _sizes(coco: Coco, paths: Sequence[Path]) -> Floats:
    """Return width and height of each image: as the json says, or of the file where that matters.

    Files are opened if the json says no size, if it says one that a box exceeds, and in a sample.
    """
    rows, said = coco.annotations, coco.images.sizes
    annotated = np.unique(rows.images)
    sample = annotated[np.linspace(0, len(annotated) - 1, min(_SAMPLE, len(annotated))).astype(int)]
    exceeded = np.unique(rows.images[~_fits(_corners(rows.boxes), said[rows.images])])  # Also where the size is NaN.
    sizes = said.copy()
    for index in np.union1d(sample, exceeded):
        sizes[index] = _size_of(paths[index])
    wrong = sample[(np.abs(sizes[sample] - said[sample]) > 1).any(1)]  # Not those that are NaN.
    if len(wrong) and 2 * len(wrong) >= len(sample):
        _check_other_sizes(coco, wrong, sizes, len(sample))
    return sizes


def _check_other_sizes(coco: Coco, wrong: NDArray[np.intp], sizes: Floats, sampled: int) -> None:
    """Refuse boxes that fit images of the size that the json says, if the files have another size.

    Args:
        coco: The json.
        wrong: Indices of images whose file has another size.
        sizes: Sizes of the files, by index.
        sampled: Number of images that were compared.
    """
    rows = coco.annotations.where(np.isin(coco.annotations.images, wrong))
    corners = _corners(rows.boxes)
    said, actual = coco.images.sizes[rows.images], sizes[rows.images]
    fit_said, fit_actual = (int(_fits(corners, size).sum()) for size in (said, actual))
    # Of two sizes that all boxes fit, the smaller is the right one: in larger images, some boxes would be farther out.
    smaller = (said < 0.9 * actual).all(1).all() and len(rows) >= _LEAST
    if fit_said > fit_actual or (fit_said == fit_actual and smaller):
        first = wrong[0]
        width, height = coco.images.sizes[first]
        what = (
            f"{len(wrong)} of {sampled} images have another size than it says, and its boxes are for what it says:"
            f" {coco.images.files[first]} is {sizes[first, 0]:g} x {sizes[first, 1]:g}, not {width:g} x {height:g}"
        )
        hint = "give the images that it describes, or scale its boxes; images are turned upright (EXIF), as in TAO"
        raise TaoqError(Fault(str(coco.path), what, hint))


def _size_of(path: Path) -> tuple[float, float]:
    """Return width and height of an image that is turned upright, without reading its pixels; NaN if it is damaged."""
    try:
        with open_image(path) as file:
            width, height = file.size
            # The method of the base class, because that of PNG files reads all pixels. 0x0112 is the orientation.
            turned = Image.Image.getexif(file).get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return np.nan, np.nan  # Reading the image reports it.
    return (height, width) if turned else (width, height)
