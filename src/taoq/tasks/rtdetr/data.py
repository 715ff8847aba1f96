# SPDX-License-Identifier: Apache-2.0
"""COCO annotations and image folders, as lazily loaded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taoq.errors import Fault, NotGiven, Notice, SpecError
from taoq.network import Inputs
from taoq.plain import JsonObject
from taoq.tasks.image_files import draw, image_files, image_folder
from taoq.tasks.images import ImageBatches
from taoq.tasks.preprocessing import fit, interpolation_faults, resized
from taoq.tasks.rtdetr.boxes import check_boxes
from taoq.tasks.rtdetr.coco import Coco, image_paths, open_coco, read_coco
from taoq.tasks.rtdetr.coco_file import Id
from taoq.tasks.rtdetr.labels import read_classmap
from taoq.tasks.rtdetr.model import input_size
from taoq.tasks.rtdetr.spec import CocoSpec, RtdetrSpec
from taoq.tasks.sections import batch_size

log = logging.getLogger(__name__)

INPUT = "inputs"
"""Name of the input in TAO."""


@dataclass(frozen=True)
class Targets:
    """The targets of a batch.

    Attributes:
        image_ids: Id of each image in the COCO json.
        sizes: Width and height of each image as read, in pixels, [N, 2] float32.
    """

    image_ids: tuple[Id, ...]
    sizes: Tensor


def read_annotations(spec: RtdetrSpec) -> Coco:
    """Read the annotations of `evaluate`: those of test_data_sources, or of val_data_sources if only that is given.

    Raises:
        SpecError: If the spec names no annotations.
        TaoqError: If they are missing or damaged, or do not fit dataset.num_classes.
    """
    where, source = _evaluation_source(spec)
    if not source.json_file:
        what = "missing: evaluate needs annotated images"
        raise NotGiven(Fault(f"{where}.json_file", what, "name a COCO json, and the folder of its images in image_dir"))
    if source is spec.dataset.val_data_sources:
        log.info(Notice("dataset.test_data_sources", "is not given: evaluating dataset.val_data_sources"))
    return read_coco(source.json_file, f"{where}.json_file", spec)


def _evaluation_source(spec: RtdetrSpec) -> tuple[str, CocoSpec]:
    """Return the section of the spec that `evaluate` uses, with its path."""
    test, val = spec.dataset.test_data_sources, spec.dataset.val_data_sources
    if test.json_file or test.image_dir or not val.json_file:
        return "dataset.test_data_sources", test
    return "dataset.val_data_sources", val


def example_inputs(spec: RtdetrSpec) -> Inputs:
    """Return one black image, [1, 3, height, width]."""
    return {INPUT: torch.zeros(1, 3, *input_size(spec))}


def calibration_batches(spec: RtdetrSpec) -> ImageBatches:
    """Return a random sample of the calibration images. Their annotations are not used.

    Raises:
        SpecError: If the spec names no calibration images.
        TaoqError: If there are none, or if the json cannot be read.
    """
    section, source = spec.quantize.calibration, spec.dataset.quant_calibration_data_sources
    where = "dataset.quant_calibration_data_sources"
    if not source.image_dir:
        what = f"missing: {spec.quantize.mode} with activations needs calibration images"
        hint = "name a folder of a few hundred images like those the model will see"
        raise NotGiven(Fault(f"{where}.image_dir", what, hint))
    folder = image_folder(source.image_dir, f"{where}.image_dir")
    if source.json_file:
        paths = image_paths(open_coco(source.json_file, f"{where}.json_file"), folder)
    else:
        paths = image_files(folder, f"{where}.image_dir")
    sample = draw(paths, section.num_samples, section.seed)
    return _batches(spec, sample, range(len(sample)), section.batch_size or spec.dataset.batch_size)


def evaluation_batches(spec: RtdetrSpec) -> ImageBatches:
    """Return all images of test_data_sources, or of val_data_sources if only that is given.

    Raises:
        SpecError: If the spec does not name both annotations and images.
        TaoqError: If the annotations are damaged or do not fit dataset.num_classes, or if an image file is missing.
    """
    coco = read_annotations(spec)
    where, source = _evaluation_source(spec)
    if not source.image_dir:
        raise NotGiven(Fault(f"{where}.image_dir", "missing: where are the images?", "name the folder of the images"))
    paths = image_paths(coco, image_folder(source.image_dir, f"{where}.image_dir"))
    check_boxes(coco, paths)
    return _batches(spec, paths, coco.images.ids, batch_size(spec.evaluate, spec.dataset.batch_size))


def inference_batches(spec: RtdetrSpec) -> ImageBatches:
    """Return all images of the folders of infer_data_sources, with ids from 1.

    Raises:
        SpecError: If the spec names no folders.
        TaoqError: If there is no such folder, or if one has no images.
    """
    where = "dataset.infer_data_sources.image_dir"
    if not any(spec.dataset.infer_data_sources.image_dir):  # TAO's templates have a list of one empty text.
        raise NotGiven(Fault(where, "missing: inference needs images", "name a list of folders of images"))
    paths = [
        path
        for image_dir in spec.dataset.infer_data_sources.image_dir
        for path in image_files(image_folder(image_dir, where), where)
    ]
    return _batches(spec, paths, range(1, len(paths) + 1), batch_size(spec.inference, spec.dataset.batch_size))


def class_names(spec: RtdetrSpec) -> tuple[str, ...]:
    """Return the names of the classes: those in the classmap, without one those in the annotations, or numbers.

    Raises:
        TaoqError: If the classmap cannot be read or does not fit dataset.num_classes, or the annotations are damaged.
    """
    if spec.dataset.infer_data_sources.classmap:
        return read_classmap(spec)
    if spec.dataset.test_data_sources.json_file or spec.dataset.val_data_sources.json_file:
        return read_annotations(spec).names
    log.warning(Notice("dataset.infer_data_sources.classmap", "nothing names the classes, they are numbered"))
    return tuple(str(number) for number in range(spec.dataset.num_classes))


def _batches(spec: RtdetrSpec, paths: Sequence[Path], ids: Sequence[Id], size: int) -> ImageBatches:
    return ImageBatches(INPUT, paths, preprocessing(spec), _TargetsOf(ids), size, spec.dataset.workers)


@dataclass(frozen=True)
class _TargetsOf:
    """Function that returns the targets of a batch."""

    ids: Sequence[Id]

    def __call__(self, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Targets:
        return Targets(tuple(self.ids[index] for index in indices), torch.tensor(sizes, dtype=torch.float32))


@dataclass(frozen=True)
class Resize:
    """The transform of TAO: resize to the input size (PIL bilinear), scale to 0..1. There is no normalization.

    Attributes:
        size: Height and width of the input, pixels.
        keep_shape: Whether to keep the aspect ratio and pad with black to the right and below.
        interpolation: Interpolation of the resize.
        antialias: Whether to antialias.
    """

    size: tuple[int, int]
    keep_shape: bool
    interpolation: str = "bilinear"
    antialias: bool = True

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image as a float32 tensor, [3, height, width]."""
        height, width = self.size
        if self.keep_shape:
            new_width, new_height = fit(self.size, image.size)
            canvas = Image.new("RGB", (width, height))
            canvas.paste(resized(image, (new_height, new_width), self.interpolation, antialias=self.antialias))
            image = canvas
        else:
            image = resized(image, self.size, self.interpolation, antialias=self.antialias)
        # Made contiguous before the conversion to float, because copying bytes is cheaper.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255)

    def to_json(self) -> JsonObject:
        """Return what whoever deploys the network has to do with an image, as that of a classifier."""
        steps: JsonObject = {"resize": "fit_and_pad" if self.keep_shape else "squash"}
        if self.keep_shape:
            steps |= {"padding": "right and bottom", "pad_color": [0, 0, 0]}
        return steps | {
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "height": self.size[0],
            "width": self.size[1],
            "channel_order": "rgb",
            "scale": 1 / 255,
        }


def preprocessing(spec: RtdetrSpec) -> Resize:
    """Return the transform of a spec.

    Raises:
        SpecError: If the size or the interpolation is wrong.
    """
    augmentation, where = spec.dataset.augmentation, "dataset.augmentation"
    if faults := interpolation_faults(augmentation.interpolation, antialias=augmentation.antialias, where=where):
        raise SpecError(*faults)
    size = input_size(spec)
    return Resize(size, augmentation.preserve_aspect_ratio, augmentation.interpolation, augmentation.antialias)
