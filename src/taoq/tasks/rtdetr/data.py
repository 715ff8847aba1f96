# SPDX-License-Identifier: Apache-2.0
"""COCO annotations and image folders as lazy batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taoq.errors import Fault, NotGiven, Notice, TaoqError
from taoq.network import Inputs
from taoq.plain import JsonMapping, JsonObject
from taoq.tasks.images import ImageBatches, draw, image_files, image_folder
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.spec import RtdetrSpec
from taoq.tasks.sections import batch_size

log = logging.getLogger(__name__)

INPUT = "inputs"
"""TAO's name of the input."""


@dataclass(frozen=True)
class Targets:
    """What metric and pictures need of a batch.

    Attributes:
        image_ids: COCO id of each image.
        sizes: Width and height of each image as read, pixels, [N, 2] float32.
    """

    image_ids: tuple[int, ...]
    sizes: Tensor


@dataclass(frozen=True)
class Coco:
    """A COCO json that was read and checked.

    Attributes:
        path: The file.
        data: images, annotations and categories, the annotations with iscrowd and area; degenerate ones left out.
        category_ids: Category id of each class index that the network's outputs mean; -1 where there is none.
        names: Name of each class index.
    """

    path: Path
    data: JsonMapping
    category_ids: tuple[int, ...]
    names: tuple[str, ...]


def evaluation_source(spec: RtdetrSpec) -> tuple[str, Coco]:
    """The annotated data of `evaluate`: its section of the spec, and what is in it.

    Raises:
        SpecError: No annotations are named.
        TaoqError: They are missing or damaged, or do not fit dataset.num_classes.
    """
    test, val = spec.dataset.test_data_sources, spec.dataset.val_data_sources
    section = "test_data_sources" if test.json_file or test.image_dir or not val.json_file else "val_data_sources"
    source = getattr(spec.dataset, section)
    where = f"dataset.{section}"
    if not source.json_file:
        what = "missing: evaluate needs annotated images"
        raise NotGiven(Fault(f"{where}.json_file", what, "name a COCO json, and the folder of its images in image_dir"))
    if section == "val_data_sources":
        log.info(Notice("dataset.test_data_sources", "is not given: evaluating dataset.val_data_sources"))
    return where, read_coco(source.json_file, f"{where}.json_file", spec)


def read_coco(json_file: str, where: str, spec: RtdetrSpec) -> Coco:
    """Read and check a COCO json.

    Raises:
        TaoqError: It is missing or no COCO json, or does not fit dataset.num_classes.
    """
    path = Path(json_file)
    data = _read_json(path, where)
    _require(path, data, "annotations", ("image_id", "category_id", "bbox"))
    _require(path, data, "categories", ("id", "name"))
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: str(category["name"]) for category in data["categories"]}
    kept: list[JsonObject] = []
    empty = 0
    for number, annotation in enumerate(data["annotations"]):
        name = f"{path}: annotation {annotation.get('id', number)}"
        if not isinstance(annotation["image_id"], int) or annotation["image_id"] not in images:
            raise TaoqError(Fault(name, f"its image_id {annotation['image_id']} is no image", "correct the json"))
        if not isinstance(annotation["category_id"], int) or annotation["category_id"] not in categories:
            what = f"its category_id {annotation['category_id']} is no category"
            raise TaoqError(Fault(name, what, "correct the json"))
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            raise TaoqError(Fault(name, "its bbox is not [x, y, width, height]", "correct the json"))
        if not all(np.isfinite(box)) or box[2] <= 0 or box[3] <= 0:
            empty += 1
            continue
        image = images[annotation["image_id"]]
        width, height = image.get("width"), image.get("height")
        known = isinstance(width, int | float) and isinstance(height, int | float) and width and height
        if known and (box[0] >= width or box[1] >= height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0):
            what = f"its bbox {box} is outside of the image, {width} x {height}"
            raise TaoqError(Fault(name, what, "correct the json: a bbox is [x, y, width, height] in pixels"))
        area = annotation.get("area")
        filled = {
            "id": len(kept) + 1,
            "iscrowd": int(bool(annotation.get("iscrowd"))),
            "area": area if isinstance(area, int | float) else box[2] * box[3],
        }
        kept.append({**annotation, **filled})
    if empty:
        log.warning(Notice(where, f"{empty} annotation(s) without width or height are left out"))
    ids = _category_ids(sorted(categories), spec, path)
    names = tuple(categories.get(id_, f"class {index}") for index, id_ in enumerate(ids))
    return Coco(path, {**data, "annotations": kept}, ids, names)


def _category_ids(ids: Sequence[int], spec: RtdetrSpec, path: Path) -> tuple[int, ...]:
    """The category id of each output of the network.

    Either the outputs are the categories in the order of their ids, or, as in TAO, an output's number is an id.
    """
    classes = spec.dataset.num_classes
    if len(ids) == classes:
        return tuple(ids)
    if ids and not spec.dataset.remap_mscoco_category and ids[0] >= 0 and ids[-1] + 1 == classes:
        return tuple(number if number in set(ids) else -1 for number in range(classes))
    if not ids:
        raise TaoqError(Fault(str(path), "names no categories", "name a COCO json with categories"))
    what = f"is {classes}; {path} has {len(ids)} categories with ids up to {ids[-1]}"
    hint = f"write {len(ids)}, or {ids[-1] + 1} if the network was trained with TAO's largest id + 1"
    if spec.dataset.remap_mscoco_category:
        hint = f"write {len(ids)}, or dataset.remap_mscoco_category: false if the outputs are category ids"
    raise TaoqError(Fault("dataset.num_classes", what, hint))


def _read_json(path: Path, where: str) -> JsonObject:
    """A json with images; nothing else of it is checked."""
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
    entries = data.get(part)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TaoqError(_not_coco(path, f"it has no list '{part}'"))
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry]
        if missing:
            raise TaoqError(_not_coco(path, f"{part}[{number}] has no '{missing[0]}'"))
    ids = [entry["id"] for entry in entries] if "id" in keys else []
    if not all(isinstance(id_, int) for id_ in ids) or len(set(ids)) != len(ids):
        raise TaoqError(_not_coco(path, f"the ids of '{part}' are not different whole numbers"))


def _not_coco(path: Path, why: str) -> Fault:
    return Fault(str(path), f"is not a COCO json: {why}", "see cocodataset.org/#format-data")


def _paths(data: JsonMapping, folder: Path, path: Path) -> list[Path]:
    """The files of a json's images.

    Raises:
        TaoqError: One is missing.
    """
    found = [folder / str(image["file_name"]) for image in data["images"]]
    missing = [file for file in found if not file.is_file()]
    if missing:
        what = f"{path} names it, but there is no such image" + (
            f"; {len(missing)} of {len(found)} are missing" if len(missing) > 1 else ""
        )
        raise TaoqError(Fault(str(missing[0]), what, f"image_dir is {folder}; file names are relative to it"))
    return found


def example_inputs(spec: RtdetrSpec) -> Inputs:
    """One black image, [1, 3, height, width]."""
    return {INPUT: torch.zeros(1, 3, *input_size(spec))}


def calibration_batches(spec: RtdetrSpec) -> ImageBatches:
    """A seeded draw of calibration images; annotations are not looked at."""
    section, source = spec.quantize.calibration, spec.dataset.quant_calibration_data_sources
    where = "dataset.quant_calibration_data_sources"
    if not source.image_dir:
        what = f"missing: {spec.quantize.mode} with activations needs calibration images"
        hint = "name a folder of a few hundred images like those the model will see"
        raise NotGiven(Fault(f"{where}.image_dir", what, hint))
    folder = image_folder(source.image_dir, f"{where}.image_dir")
    if source.json_file:
        path = Path(source.json_file)
        paths = _paths(_read_json(path, f"{where}.json_file"), folder, path)
    else:
        paths = list(image_files(folder, f"{where}.image_dir"))
    chosen = draw(paths, section.num_samples, section.seed)
    return _batches(spec, chosen, range(len(chosen)), section.batch_size or spec.dataset.batch_size)


def evaluation_batches(spec: RtdetrSpec) -> ImageBatches:
    """All images of test_data_sources, or of val_data_sources where only that is given."""
    where, coco = evaluation_source(spec)
    image_dir = getattr(spec.dataset, where.removeprefix("dataset.")).image_dir
    if not image_dir:
        raise NotGiven(Fault(f"{where}.image_dir", "missing: where are the images?", "name the folder of the images"))
    paths = _paths(coco.data, image_folder(image_dir, f"{where}.image_dir"), coco.path)
    ids = [image["id"] for image in coco.data["images"]]
    return _batches(spec, paths, ids, batch_size(spec.evaluate, spec.dataset.batch_size))


def inference_batches(spec: RtdetrSpec) -> ImageBatches:
    """All images of the folders of infer_data_sources."""
    where = "dataset.infer_data_sources.image_dir"
    if not spec.dataset.infer_data_sources.image_dir:
        raise NotGiven(Fault(where, "missing: inference needs images", "name a list of folders of images"))
    paths = [
        path
        for image_dir in spec.dataset.infer_data_sources.image_dir
        for path in image_files(image_folder(image_dir, where), where)
    ]
    return _batches(spec, paths, range(1, len(paths) + 1), batch_size(spec.inference, spec.dataset.batch_size))


def class_names(spec: RtdetrSpec) -> tuple[str, ...]:
    """Names of the network's outputs for inference: of the classmap, else of the annotated data, else numbers.

    Raises:
        TaoqError: The classmap is missing, or does not have dataset.num_classes names.
    """
    classes, classmap = spec.dataset.num_classes, spec.dataset.infer_data_sources.classmap
    if not classmap:
        if spec.dataset.test_data_sources.json_file or spec.dataset.val_data_sources.json_file:
            return evaluation_source(spec)[1].names
        log.warning(Notice("dataset.infer_data_sources.classmap", "nothing names the classes, they are numbered"))
        return tuple(str(number) for number in range(classes))
    where = "dataset.infer_data_sources.classmap"
    try:
        lines = Path(classmap).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise TaoqError(Fault(where, f"{classmap} cannot be read", "give a text file, one class a line")) from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) == classes - 1:  # TAO's ids begin at 1, and output 0 is never used
        return ("background", *names)
    if len(names) != classes:
        what = f"{classmap} names {len(names)} classes, dataset.num_classes is {classes}"
        raise TaoqError(Fault(where, what, "write one line per class"))
    return tuple(names)


def _batches(spec: RtdetrSpec, paths: Sequence[Path], ids: Sequence[int], size: int) -> ImageBatches:
    transform = Resize(input_size(spec), spec.dataset.augmentation.preserve_aspect_ratio)
    return ImageBatches(INPUT, paths, transform, _TargetsOf(ids), size, spec.dataset.workers)


@dataclass(frozen=True)
class _TargetsOf:
    """Targets of a batch."""

    ids: Sequence[int]

    def __call__(self, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Targets:
        return Targets(tuple(self.ids[index] for index in indices), torch.tensor(sizes, dtype=torch.float32))


@dataclass(frozen=True)
class Resize:
    """TAO's: PIL bilinear to the input size, values 0..1, no mean and std.

    Attributes:
        size: Height and width, pixels.
        keep_shape: Scale both sides alike and pad with black to the right and below.
    """

    size: tuple[int, int]
    keep_shape: bool

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, height, width] float32."""
        height, width = self.size
        if self.keep_shape:
            canvas = Image.new("RGB", (width, height))
            canvas.paste(image.resize(fit(self.size, image.size), Image.Resampling.BILINEAR))
            image = canvas
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        # a contiguous copy of channels first, before the division: bytes are cheaper to move than floats
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255)


def fit(size: tuple[int, int], image: tuple[float, float]) -> tuple[int, int]:
    """Width and height, pixels, at which an image (width, height) just fits an input (height, width)."""
    scale = min(size[0] / image[1], size[1] / image[0])
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))
