# SPDX-License-Identifier: Apache-2.0
"""Image folders, with one folder per class, as lazily loaded batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from taoq.errors import Fault, NotGiven, Notice, SpecError, TaoqError
from taoq.network import Inputs
from taoq.tasks.classification.classes import class_names, class_names_or_numbers, evaluation_section, indices, key
from taoq.tasks.classification.labels import labels_of_folders, labels_of_table
from taoq.tasks.classification.spec import AugmentationSpec, ClassificationSpec
from taoq.tasks.image_files import draw, image_files, image_folder
from taoq.tasks.images import ImageBatches
from taoq.tasks.preprocessing import Preprocessing, interpolation_faults
from taoq.tasks.sections import batch_size

log = logging.getLogger(__name__)

_WHERE = "dataset.augmentation"


def example_inputs(spec: ClassificationSpec) -> Inputs:
    """Return one black image, [1, 3, size, size]."""
    size = spec.dataset.img_size
    return {"input": torch.zeros(1, 3, size, size)}


def calibration_batches(spec: ClassificationSpec) -> ImageBatches:
    """Return a random sample of the calibration images. They have no labels.

    Raises:
        SpecError: If the spec names no calibration images.
        TaoqError: If there are none.
    """
    section = spec.quantize.calibration
    where = "dataset.quant_calibration_dataset.images_dir"
    if not spec.dataset.quant_calibration_dataset.images_dir:
        what = f"missing: {spec.quantize.mode} with activations needs calibration images"
        raise NotGiven(Fault(where, what, "name a folder of a few hundred images like those the model will see"))
    paths = image_files(image_folder(spec.dataset.quant_calibration_dataset.images_dir, where), where)
    sample = draw(paths, section.num_samples, section.seed)
    return _batches(spec, sample, [-1] * len(sample), section.batch_size or spec.dataset.batch_size)


def evaluation_batches(spec: ClassificationSpec) -> ImageBatches:
    """Return all labelled images of val_dataset, or of test_dataset if only that is given.

    Raises:
        SpecError: If the spec names no labelled images.
        TaoqError: If there are none, or if their folders do not fit dataset.num_classes.
    """
    name, section = evaluation_section(spec)
    where = f"{name}.images_dir"
    if not section.images_dir and section.labels_file:
        what = "missing: the images of labels_file are in a folder"
        raise SpecError(Fault(where, what, "name the folder that the names in the table are relative to"))
    if not section.images_dir:
        raise NotGiven(
            Fault(
                "dataset.val_dataset.images_dir",
                "missing: evaluate needs labelled images",
                "name a folder with one folder per class",
            )
        )
    if section is spec.dataset.test_dataset:
        log.info(Notice("dataset.val_dataset", "is not given: evaluating dataset.test_dataset"))
    folder = image_folder(section.images_dir, where)
    files, names = image_files(folder, where), class_names(spec)
    if section.labels_file:
        labels = labels_of_table(section.labels_file, f"{name}.labels_file", folder, files, names)
    else:
        labels = labels_of_folders(files, folder, names, where)
    if not labels:
        raise TaoqError(
            Fault(where, f"{folder} has no folder of a known class", "labelled data has one folder per class")
        )
    return _batches(spec, list(labels), list(labels.values()), batch_size(spec.evaluate, spec.dataset.batch_size))


def inference_batches(spec: ClassificationSpec) -> ImageBatches:
    """Return all images of test_dataset. Images in the folder of a class are labelled, others have the label -1.

    Raises:
        SpecError: If the spec names no images.
        TaoqError: If there are none.
    """
    where = "dataset.test_dataset.images_dir"
    if not spec.dataset.test_dataset.images_dir:
        raise NotGiven(Fault(where, "missing: inference needs images", "name a folder of images"))
    folder = image_folder(spec.dataset.test_dataset.images_dir, where)
    names, paths = class_names_or_numbers(spec), image_files(folder, where)
    if file := spec.dataset.test_dataset.labels_file:
        known = labels_of_table(file, "dataset.test_dataset.labels_file", folder, paths, names, "have no label")
        labels = [known.get(path, -1) for path in paths]
    else:
        class_index = indices(names)
        labels = [class_index.get(key(path.relative_to(folder).parts[0]), -1) for path in paths]
    return _batches(spec, paths, labels, batch_size(spec.inference, spec.dataset.batch_size))


def _batches(spec: ClassificationSpec, paths: list[Path], labels: list[int], size: int) -> ImageBatches:
    transform = preprocessing(spec.dataset.augmentation, spec.dataset.img_size)
    return ImageBatches("input", paths, transform, _Labels(labels), size, spec.dataset.workers)


@dataclass(frozen=True)
class _Labels:
    """Class index of each image; -1 for an image without a label."""

    labels: list[int]

    def __call__(self, indices: Sequence[int], _sizes: object) -> Tensor:
        return torch.tensor([self.labels[index] for index in indices])


def preprocessing(augmentation: AugmentationSpec, size: int) -> Preprocessing:
    """Return the transform of a spec; without fields of taoq's own that of TAO: resize to a square, no crop.

    Args:
        augmentation: The section `dataset.augmentation`.
        size: Width and height of the input, pixels.

    Raises:
        SpecError: If a field is wrong; lists every fault.
    """
    faults = []
    for name, values in (("mean", augmentation.mean), ("std", augmentation.std), ("pad_color", augmentation.pad_color)):
        if len(values) != 3 or (name == "std" and 0.0 in values):
            what = "three numbers for red, green, blue" + (" that are not 0" if name == "std" else "")
            example = "[114, 114, 114]" if name == "pad_color" else "[0.5, 0.5, 0.5]"
            faults.append(Fault(f"{_WHERE}.{name}", f"{values} is not {what}", f"for example {example}"))
    if augmentation.resize_to is not None and augmentation.crop_fraction != 1:
        what = "says what images are resized to, and so does resize_to"
        faults.append(Fault(f"{_WHERE}.crop_fraction", what, "write one of the two"))
    faults += interpolation_faults(augmentation.interpolation, antialias=augmentation.antialias, where=_WHERE)
    if faults:
        raise SpecError(*faults)
    return Preprocessing(
        size=(size, size),
        resize=augmentation.resize,
        resize_to=augmentation.resize_to or math.floor(size / augmentation.crop_fraction),
        interpolation=augmentation.interpolation,
        antialias=augmentation.antialias,
        crop_rounding=augmentation.crop_rounding,
        pad_color=tuple(augmentation.pad_color),
        channel_order=augmentation.channel_order,
        mean=tuple(augmentation.mean),
        std=tuple(augmentation.std),
    )
