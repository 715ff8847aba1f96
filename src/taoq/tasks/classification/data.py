# SPDX-License-Identifier: Apache-2.0
"""Image folders, with one folder per class, as lazily loaded batches."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from taoq.errors import Fault, NotGiven, Notice, SpecError, TaoqError
from taoq.network import Inputs
from taoq.tasks.classification.spec import AugmentationSpec, ClassificationSpec
from taoq.tasks.images import ImageBatches, draw, image_files, image_folder
from taoq.tasks.preprocessing import Preprocessing, interpolation_faults
from taoq.tasks.sections import batch_size

log = logging.getLogger(__name__)

_WHERE = "dataset.augmentation"


def class_names(spec: ClassificationSpec, images_dir: Path) -> list[str]:
    """Return the names of the classes, by index: the lines of classes.txt, or without it the sorted folder names.

    Args:
        spec: The spec.
        images_dir: The folder with one folder per class.

    Raises:
        TaoqError: If the file cannot be read, or if there are not dataset.num_classes names.
    """
    file = _classes_file(spec)
    names = _read_classes(file, spec) if file else _folder_names(images_dir)
    num_classes = spec.dataset.num_classes
    if len(names) != num_classes:
        source = f"{file} names" if file else f"{images_dir} has"
        what = f"{source} {len(names)} classes, dataset.num_classes is {num_classes}"
        hint = f"set it to {len(names)}, or name the classes in dataset.classes_file"
        raise TaoqError(Fault("dataset.num_classes", what, hint))
    return names


def evaluation_folder(spec: ClassificationSpec) -> Path:
    """Return the folder of val_dataset, or of test_dataset if only that is given."""
    return Path(spec.dataset.val_dataset.images_dir or spec.dataset.test_dataset.images_dir)


def class_names_or_numbers(spec: ClassificationSpec) -> list[str]:
    """Return the names of the classes, or their numbers if no file or folder names them. For unlabelled images."""
    folder = evaluation_folder(spec)
    if _classes_file(spec) or (folder.is_dir() and len(_folder_names(folder)) == spec.dataset.num_classes):
        return class_names(spec, folder)
    log.warning(Notice("dataset.classes_file", "nothing names the classes, they are numbered"))
    return [str(number) for number in range(spec.dataset.num_classes)]


def _classes_file(spec: ClassificationSpec) -> Path | None:
    if spec.dataset.classes_file:
        return Path(spec.dataset.classes_file)
    if spec.dataset.root_dir and not Path(spec.dataset.root_dir).is_dir():
        what = f"there is no folder {spec.dataset.root_dir}"
        raise TaoqError(Fault("dataset.root_dir", what, "name the folder of classes.txt, or leave the field out"))
    file = Path(spec.dataset.root_dir, "classes.txt")
    return file if spec.dataset.root_dir and file.is_file() else None


def _read_classes(file: Path, spec: ClassificationSpec) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        where = "dataset.classes_file" if spec.dataset.classes_file else "dataset.root_dir"
        raise TaoqError(Fault(where, f"{file} cannot be read", "give a text file, one class a line")) from None
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise TaoqError(Fault(str(file), f"names the class '{duplicates[0]}' twice", "write each class once"))
    return names


def _folder_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


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
    paths = list(image_files(image_folder(spec.dataset.quant_calibration_dataset.images_dir, where), where))
    sample = draw(paths, section.num_samples, section.seed)
    return _batches(spec, sample, [-1] * len(sample), section.batch_size or spec.dataset.batch_size)


def evaluation_batches(spec: ClassificationSpec) -> ImageBatches:
    """Return all labelled images of val_dataset, or of test_dataset if only that is given.

    Raises:
        SpecError: If the spec names no labelled images.
        TaoqError: If there are none, or if their folders do not fit dataset.num_classes.
    """
    name = "val_dataset" if spec.dataset.val_dataset.images_dir else "test_dataset"
    where = f"dataset.{name}.images_dir"
    images_dir = getattr(spec.dataset, name).images_dir
    if not images_dir:
        raise NotGiven(
            Fault(
                "dataset.val_dataset.images_dir",
                "missing: evaluate needs labelled images",
                "name a folder with one folder per class",
            )
        )
    if name == "test_dataset":
        log.info(Notice("dataset.val_dataset", "is not given: evaluating dataset.test_dataset"))
    folder = image_folder(images_dir, where)
    files = list(image_files(folder, where))
    class_index = {class_name: number for number, class_name in enumerate(class_names(spec, folder))}
    paths: list[Path] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for path in files:
        class_name = path.relative_to(folder).parts[0]
        if class_name in class_index and path.parent != folder:
            paths.append(path)
            labels.append(class_index[class_name])
        else:
            left_out[class_name if path.parent != folder else "."] += 1
    if not paths:
        raise TaoqError(
            Fault(where, f"{folder} has no folder of a known class", "labelled data has one folder per class")
        )
    for class_folder, count in left_out.items():
        what = f"{count} image(s) in '{class_folder}' are left out: it is not the folder of a class"
        log.warning(Notice(where, what))
    return _batches(spec, paths, labels, batch_size(spec.evaluate, spec.dataset.batch_size))


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
    class_index = {class_name: number for number, class_name in enumerate(class_names_or_numbers(spec))}
    paths = list(image_files(folder, where))
    labels = [class_index.get(path.relative_to(folder).parts[0], -1) for path in paths]
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
