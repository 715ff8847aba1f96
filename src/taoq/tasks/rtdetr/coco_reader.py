# SPDX-License-Identifier: Apache-2.0
"""Read a COCO json into arrays, entry by entry. Segmentations and the like are dropped."""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taoq.errors import Fault, TaoqError
from taoq.plain import JsonMapping, JsonObject, Plain
from taoq.tasks.rtdetr.coco_file import Annotations, CocoFile, Id, Images
from taoq.tasks.rtdetr.json_stream import read_lists

_CORRECT = "correct the json"
_CROWDS = {"none": 0, "": 0, "0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
"""What `iscrowd` may be, as text in lower case."""


def read_coco_file(path: Path) -> CocoFile:
    """Read a COCO json.

    Raises:
        OSError: If the file cannot be read.
        NotJson: If it is not JSON.
        TaoqError: If it is not a COCO json, or has no images.
    """
    reader = _Reader(path)
    take = {"images": reader.add_image, "categories": reader.add_category, "annotations": reader.add_annotation}
    are_lists = read_lists(path, take)
    if are_lists is None:
        raise TaoqError(_not_coco(path, "it is not an object with images, annotations and categories"))
    if not are_lists.get("images"):
        raise TaoqError(_not_coco(path, "it has no list 'images'"))
    for part in ("categories", "annotations"):
        if not are_lists.get(part):
            reader.faults.setdefault(part, _not_coco(path, f"it has no list '{part}'"))
    return reader.result()


def _not_coco(path: Path, reason: str) -> Fault:
    return Fault(str(path), f"is not a COCO json: {reason}", "see cocodataset.org/#format-data")


def annotation_fault(path: Path, number: int, what: str, hint: str = _CORRECT) -> Fault:
    """Return the fault of an annotation. The json is read again for it, because few of its values are kept.

    Args:
        path: The json.
        number: Number of the annotation, from 0.
        what: What is wrong; `{bbox}` stands for its box as it is written, and so on.
        hint: What to do.
    """
    numbers = itertools.count()
    found: list[JsonMapping] = []

    def take(entry: Plain) -> None:
        if next(numbers) == number:
            found.append(entry)

    read_lists(path, {"annotations": take})
    (entry,) = found
    return Fault(f"{path}: annotation {entry.get('id', number)}", what.format(**entry), hint)


class _Reader:
    """Collects the entries of a COCO json.

    Attributes:
        faults: The first fault of categories and annotations; further entries of such a part are ignored.
    """

    def __init__(self, path: Path) -> None:
        self.faults: dict[str, Fault] = {}
        self._path = path
        self._images: dict[Id, tuple[str, float, float]] = {}
        self._categories: dict[Id, str] = {}
        self._image_ids, self._category_ids = _Ids(), _Ids()
        self._boxes, self._areas, self._crowds = array("d"), array("d"), array("b")
        self._counts = {"images": 0, "categories": 0, "annotations": 0}

    def add_image(self, entry: Plain) -> None:
        """Add an image. Raise TaoqError if it has a fault."""
        id_ = self._id("images", entry, "file_name", others=self._images)
        file = entry["file_name"]
        if not isinstance(file, str) or not file:
            raise TaoqError(Fault(str(self._path), f"its image {id_!r} has the file_name {file!r}", _CORRECT))
        sizes = _positive(entry.get("width")), _positive(entry.get("height"))
        before, *_ = self._images.setdefault(id_, (file, *sizes))
        if before != file:
            what = f"its images '{before}' and '{file}' have the same id, {id_!r}"
            raise TaoqError(Fault(str(self._path), what, _CORRECT))

    def add_category(self, entry: Plain) -> None:
        """Add a category, unless an earlier one has a fault."""
        if "categories" in self.faults:
            return
        try:
            id_ = self._id("categories", entry, others=self._categories)
        except TaoqError as error:
            (self.faults["categories"],) = error.faults
            return
        name = str(id_ if entry.get("name") is None else entry["name"])
        before = self._categories.setdefault(id_, name)
        if before != name:
            what = f"its categories '{before}' and '{name}' have the same id, {id_!r}"
            self.faults["categories"] = Fault(str(self._path), what, _CORRECT)

    def add_annotation(self, entry: Plain) -> None:
        """Add an annotation, unless an earlier one has a fault."""
        if "annotations" in self.faults:
            return
        try:
            self._count("annotations", entry, ("image_id", "category_id", "bbox"))
        except TaoqError as error:
            (self.faults["annotations"],) = error.faults
            return
        if what := self._add_values(entry):
            number = self._counts["annotations"] - 1
            name = f"{self._path}: annotation {entry.get('id', number)}"
            self.faults["annotations"] = Fault(name, what, _CORRECT)

    def _add_values(self, entry: JsonObject) -> str:
        """Add the values of an annotation. Return what is wrong with them; an empty text if nothing is."""
        if not self._image_ids.add(entry["image_id"]):
            return f"its image_id {entry['image_id']} is not in images"
        if not self._category_ids.add(entry["category_id"]):
            return f"its category_id {entry['category_id']} is not in categories"
        if not self._add_box(entry["bbox"]):
            return "its bbox is not [x, y, width, height]"
        area = _number_or_nan(entry.get("area"))
        if area is None:
            return f"its area {entry['area']!r} is not a number"
        crowd = _CROWDS.get(str(entry.get("iscrowd")).lower())
        if crowd is None:
            return f"its iscrowd {entry['iscrowd']!r} is neither 0 nor 1"
        self._areas.append(area)
        self._crowds.append(crowd)
        return ""

    def _add_box(self, box: Plain) -> bool:
        """Add a box. Return whether it is one."""
        if not isinstance(box, list) or len(box) != 4:
            return False
        try:
            self._boxes.extend(box)
        except (TypeError, OverflowError):
            return False
        return True

    def result(self) -> CocoFile:
        """Return what was collected. Raise TaoqError if there are no images."""
        if not self._images:
            raise TaoqError(Fault(str(self._path), "names no images", "name a COCO json with images"))
        files, widths, heights = zip(*self._images.values(), strict=True)
        repeated = self._counts["images"] - len(self._images)
        images = Images(tuple(self._images), files, np.array([widths, heights]).T, repeated)
        written = tuple(self._categories)
        categories = dict(zip(_whole_numbers(written), self._categories.values(), strict=True))
        fault = self.faults.get("categories") or self.faults.get("annotations")
        return CocoFile(
            self._path,
            images,
            self.faults.get("categories") or categories,
            written,
            fault or self._annotations(images.ids, written),
        )

    def _annotations(self, images: Sequence[Id], categories: Sequence[Id]) -> Annotations | Fault:
        image_indices, category_indices = self._image_ids.indices(images), self._category_ids.indices(categories)
        for indices, column, known, part, key in (
            (image_indices, self._image_ids, images, "images", "image_id"),
            (category_indices, self._category_ids, categories, "categories", "category_id"),
        ):
            if len(unknown := np.flatnonzero(indices < 0)):
                what = f"its {key} {{{key}!r}} is not in {part}{column.other_kind(known)}"
                return annotation_fault(self._path, int(unknown[0]), what)
        return Annotations(
            numbers=np.arange(len(self._areas)),
            images=image_indices,
            categories=category_indices,
            boxes=np.array(self._boxes).reshape(-1, 4),
            areas=np.array(self._areas),
            crowds=np.array(self._crowds).astype(bool),
        )

    def _id(self, part: str, entry: Plain, *keys: str, others: Mapping[Id, object]) -> Id:
        """Count an entry, and return its id. Raise TaoqError if it has none like the others', or lacks other keys."""
        self._count(part, entry, ("id", *keys))
        id_ = entry["id"]
        is_text = isinstance(id_, str)
        if not is_text and not (isinstance(id_, int | float) and math.isfinite(id_)):
            number = self._counts[part] - 1
            raise TaoqError(_not_coco(self._path, f"{part}[{number}] has the id {id_}, which is not a number"))
        first = next(iter(others), id_)
        if isinstance(first, str) != is_text:
            what = f"of the ids of '{part}', some are numbers and some texts: {first!r}, {id_!r}"
            raise TaoqError(_not_coco(self._path, what))
        result: Id = id_
        return result

    def _count(self, part: str, entry: Plain, keys: Sequence[str]) -> None:
        """Count an entry. Raise TaoqError if it is not an object with these keys."""
        number = self._counts[part]
        self._counts[part] += 1
        if not isinstance(entry, dict):
            raise TaoqError(_not_coco(self._path, f"it has no list '{part}'"))
        for key in keys:
            if key not in entry:
                raise TaoqError(_not_coco(self._path, f"{part}[{number}] has no '{key}'"))


class _Ids:
    """A column of ids, kept as numbers of the distinct ones: ids can be texts, or numbers above 64 bits."""

    def __init__(self) -> None:
        self._numbers: dict[Id, int] = {}
        self._column = array("i")

    def add(self, id_: Plain) -> bool:
        """Append an id. Return whether it can be one."""
        if isinstance(id_, list | dict):
            return False
        self._column.append(self._numbers.setdefault(id_, len(self._numbers)))
        return True

    def indices(self, known: Sequence[Id]) -> NDArray[np.int32]:
        """Return the index in `known` of each id of the column; -1 if it is not there."""
        places = {id_: index for index, id_ in enumerate(known)}
        table = np.array([places.get(id_, -1) for id_ in self._numbers], np.int32)
        return table[np.array(self._column, np.intp)]

    def other_kind(self, known: Sequence[Id]) -> str:
        """Return the end of a message if the column has texts where `known` has numbers, or the reverse."""
        texts = {isinstance(id_, str) for id_ in self._numbers}, {isinstance(id_, str) for id_ in known}
        if texts == ({True}, {False}):
            return ": it is a text, the ids there are numbers"
        return ": it is a number, the ids there are texts" if texts == ({False}, {True}) else ""


def _number_or_nan(value: Plain) -> float | None:
    """Return a number, which may be written as text; NaN if there is none, None if the value is something else."""
    if value is None:
        return math.nan
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _positive(value: Plain) -> float:
    """Return a width or height, which may be written as text; NaN if it is none."""
    size = _number_or_nan(value)
    return size if size is not None and 0 < size < math.inf else math.nan


def _whole_numbers(ids: Sequence[Id]) -> Iterator[Id]:
    """Yield ids: whole numbers that are written as text or with a decimal point as int, all others as they are."""
    are_texts = all(isinstance(id_, str) and re.fullmatch(r"-?[0-9]+", id_.strip()) for id_ in ids)
    distinct = are_texts and len({int(id_) for id_ in ids}) == len(ids)
    for id_ in ids:
        is_whole = distinct or (not isinstance(id_, str) and id_ == int(id_))
        yield int(id_) if is_whole else id_
