# SPDX-License-Identifier: Apache-2.0
"""Read and check COCO annotations."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taoq.errors import Fault, Notice, TaoqError
from taoq.plain import JsonMapping, JsonObject
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coco:
    """The content of a COCO json, checked.

    Attributes:
        path: The file.
        data: The json. Its annotations are numbered from 1, and all have iscrowd and area. Annotations without width or
            height are left out.
        category_ids: Category id of each class index of the network's outputs; -1 if it has none.
        names: Name of each class index.
    """

    path: Path
    data: JsonMapping
    category_ids: tuple[int, ...]
    names: tuple[str, ...]


def read_coco(json_file: str, where: str, spec: RtdetrSpec) -> Coco:
    """Read and check a COCO json.

    Args:
        json_file: The file, as written in the spec.
        where: The field that it is written in, for messages.
        spec: The spec.

    Raises:
        TaoqError: If the file cannot be read, is not a valid COCO json, or does not fit dataset.num_classes.
    """
    path = Path(json_file)
    data = read_images(path, where)
    _require(path, data, "annotations", ("image_id", "category_id", "bbox"))
    _require(path, data, "categories", ("id", "name"))
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: str(category["name"]) for category in data["categories"]}
    kept: list[JsonObject] = []
    empty = 0
    for number, annotation in enumerate(data["annotations"]):
        name = f"{path}: annotation {annotation.get('id', number)}"
        if not isinstance(annotation["image_id"], int) or annotation["image_id"] not in images:
            raise TaoqError(Fault(name, f"its image_id {annotation['image_id']} is not in images", "correct the json"))
        if not isinstance(annotation["category_id"], int) or annotation["category_id"] not in categories:
            what = f"its category_id {annotation['category_id']} is not in categories"
            raise TaoqError(Fault(name, what, "correct the json"))
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            raise TaoqError(Fault(name, "its bbox is not [x, y, width, height]", "correct the json"))
        if not all(np.isfinite(box)) or box[2] <= 0 or box[3] <= 0:
            empty += 1
            continue
        image = images[annotation["image_id"]]
        width, height = image.get("width"), image.get("height")
        has_size = isinstance(width, int | float) and isinstance(height, int | float) and width and height
        if has_size and (box[0] >= width or box[1] >= height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0):
            what = f"its bbox {box} is outside of the image, {width} x {height}"
            raise TaoqError(Fault(name, what, "correct the json: a bbox is [x, y, width, height] in pixels"))
        area = annotation.get("area")
        area = area if isinstance(area, int | float) else box[2] * box[3]
        iscrowd = int(bool(annotation.get("iscrowd")))
        kept.append({**annotation, "id": len(kept) + 1, "iscrowd": iscrowd, "area": area})
    if empty:
        log.warning(Notice(where, f"{empty} annotation(s) without width or height are left out"))
    ids = _category_ids(sorted(categories), spec, path)
    names = tuple(categories.get(id_, f"class {index}") for index, id_ in enumerate(ids))
    return Coco(path, {**data, "annotations": kept}, ids, names)


def _category_ids(ids: Sequence[int], spec: RtdetrSpec, path: Path) -> tuple[int, ...]:
    """Return the category id of each class index of the network's outputs; -1 if it has none.

    Either the classes are the categories in the order of their ids, or, as in TAO, a class index is a category id.

    Args:
        ids: The category ids of the json, sorted.
        spec: The spec.
        path: The json, for messages.
    """
    num_classes = spec.dataset.num_classes
    if len(ids) == num_classes:
        return tuple(ids)
    if ids and not spec.dataset.remap_mscoco_category and ids[0] >= 0 and ids[-1] + 1 == num_classes:
        return tuple(index if index in set(ids) else -1 for index in range(num_classes))
    if not ids:
        raise TaoqError(Fault(str(path), "names no categories", "name a COCO json with categories"))
    what = f"is {num_classes}; {path} has {len(ids)} categories with ids up to {ids[-1]}"
    hint = f"write {len(ids)}, or {ids[-1] + 1} if the network was trained with TAO's largest id + 1"
    if spec.dataset.remap_mscoco_category:
        hint = f"write {len(ids)}, or dataset.remap_mscoco_category: false if the outputs are category ids"
    raise TaoqError(Fault("dataset.num_classes", what, hint))


def read_images(path: Path, where: str) -> JsonObject:
    """Read a COCO json, and check its list of images only.

    Args:
        path: The file.
        where: The field that names it, for messages.

    Raises:
        TaoqError: If the file cannot be read, is not a COCO json, or has no images.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaoqError(Fault(where, f"{path} cannot be read: {error.strerror}", "name a COCO json")) from None
    except (ValueError, RecursionError):
        raise TaoqError(Fault(where, f"{path} is not JSON", "name a COCO json")) from None
    if not isinstance(data, dict):
        raise TaoqError(_not_coco(path, "it is not an object with images, annotations and categories"))
    _require(path, data, "images", ("id", "file_name"))
    if not data["images"]:
        raise TaoqError(Fault(str(path), "names no images", "name a COCO json with images"))
    return data


def _require(path: Path, data: JsonMapping, part: str, keys: Sequence[str]) -> None:
    """Check that a part of a COCO json is a list of objects with these keys, and that their ids are unique."""
    entries = data.get(part)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TaoqError(_not_coco(path, f"it has no list '{part}'"))
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry]
        if missing:
            raise TaoqError(_not_coco(path, f"{part}[{number}] has no '{missing[0]}'"))
    ids = [entry["id"] for entry in entries] if "id" in keys else []
    if not all(isinstance(id_, int) for id_ in ids) or len(set(ids)) != len(ids):
        raise TaoqError(_not_coco(path, f"the ids of '{part}' are not unique whole numbers"))


def _not_coco(path: Path, reason: str) -> Fault:
    return Fault(str(path), f"is not a COCO json: {reason}", "see cocodataset.org/#format-data")


def image_paths(data: JsonMapping, folder: Path, path: Path) -> list[Path]:
    """Return the image files that a COCO json names.

    Args:
        data: The content of the json.
        folder: The folder of the images.
        path: The json, for messages.

    Raises:
        TaoqError: If an image file is missing.
    """
    files = [folder / str(image["file_name"]) for image in data["images"]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        what = f"{path} names it, but there is no such image" + (
            f"; {len(missing)} of {len(files)} are missing" if len(missing) > 1 else ""
        )
        raise TaoqError(Fault(str(missing[0]), what, f"image_dir is {folder}; file names are relative to it"))
    return files
