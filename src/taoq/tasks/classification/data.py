# SPDX-License-Identifier: Apache-2.0
"""Image folders by class as lazy batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms

from taoq.errors import Fault, NotGiven, Notice, SpecError, TaoqError
from taoq.network import Inputs
from taoq.tasks.classification.spec import ClassificationSpec
from taoq.tasks.images import ImageBatches, draw, image_files, image_folder
from taoq.tasks.sections import batch_size

log = logging.getLogger(__name__)


def class_names(spec: ClassificationSpec, images_dir: Path) -> list[str]:
    """Names of the classes by index: the lines of classes.txt, else the sorted folder names.

    Raises:
        TaoqError: The file is missing, or there are not dataset.num_classes of them.
    """
    file = _classes_file(spec)
    names = _read_classes(file, spec) if file else _folder_names(images_dir)
    wanted = spec.dataset.num_classes
    if len(names) != wanted:
        what = (
            f"{f'{file} names' if file else f'{images_dir} has'} {len(names)} classes, dataset.num_classes is {wanted}"
        )
        hint = f"set it to {len(names)}, or name the classes in dataset.classes_file"
        raise TaoqError(Fault("dataset.num_classes", what, hint))
    return names


def known_classes(spec: ClassificationSpec) -> list[str]:
    """Names of the classes for inference, whose images need no labels: plain numbers if nothing names them."""
    folder = Path(spec.dataset.val_dataset.images_dir or spec.dataset.test_dataset.images_dir)
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
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise TaoqError(Fault(str(file), f"names the class '{twice[0]}' twice", "write each class once"))
    return names


def _folder_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def example_inputs(spec: ClassificationSpec) -> Inputs:
    """One black image, [1, 3, size, size]."""
    size = spec.dataset.img_size
    return {"input": torch.zeros(1, 3, size, size)}


def calibration_batches(spec: ClassificationSpec) -> ImageBatches:
    """A seeded draw of calibration images through the evaluation transform; labels do not matter."""
    section = spec.quantize.calibration
    where = "dataset.quant_calibration_dataset.images_dir"
    if not spec.dataset.quant_calibration_dataset.images_dir:
        what = f"missing: {spec.quantize.mode} with activations needs calibration images"
        raise NotGiven(Fault(where, what, "name a folder of a few hundred images like those the model will see"))
    paths = list(image_files(image_folder(spec.dataset.quant_calibration_dataset.images_dir, where), where))
    chosen = draw(paths, section.num_samples, section.seed)
    return _batches(spec, chosen, [-1] * len(chosen), section.batch_size or spec.dataset.batch_size)


def evaluation_batches(spec: ClassificationSpec) -> ImageBatches:
    """All labelled images of val_dataset, or of test_dataset where only that is given."""
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
    found = list(image_files(folder, where))
    index = {class_name: number for number, class_name in enumerate(class_names(spec, folder))}
    paths: list[Path] = []
    labels: list[int] = []
    strange: Counter[str] = Counter()
    for path in found:
        class_name = path.relative_to(folder).parts[0]
        if class_name in index and path.parent != folder:
            paths.append(path)
            labels.append(index[class_name])
        else:
            strange[class_name if path.parent != folder else "."] += 1
    if not paths:
        raise TaoqError(
            Fault(where, f"{folder} has no folder of a known class", "labelled data has one folder per class")
        )
    for class_name, count in strange.items():
        what = f"{count} image(s) in '{class_name}' are left out: it is no class of classes.txt"
        log.warning(Notice(where, what))
    return _batches(spec, paths, labels, batch_size(spec.evaluate, spec.dataset.batch_size))


def inference_batches(spec: ClassificationSpec) -> ImageBatches:
    """All images of test_dataset, in class folders or not; a label is known where the folder is a class."""
    where = "dataset.test_dataset.images_dir"
    if not spec.dataset.test_dataset.images_dir:
        raise NotGiven(Fault(where, "missing: inference needs images", "name a folder of images"))
    folder = image_folder(spec.dataset.test_dataset.images_dir, where)
    index = {class_name: number for number, class_name in enumerate(known_classes(spec))}
    paths = list(image_files(folder, where))
    labels = [index.get(path.relative_to(folder).parts[0], -1) for path in paths]
    return _batches(spec, paths, labels, batch_size(spec.inference, spec.dataset.batch_size))


def _batches(spec: ClassificationSpec, paths: list[Path], labels: list[int], size: int) -> ImageBatches:
    transform = evaluation_transform(spec)
    return ImageBatches("input", paths, transform, _Labels(labels), size, spec.dataset.workers)


@dataclass(frozen=True)
class _Labels:
    """Class index of each image; -1 where it is not known."""

    labels: list[int]

    def __call__(self, indices: Sequence[int], _sizes: object) -> Tensor:
        return torch.tensor([self.labels[index] for index in indices])


def evaluation_transform(spec: ClassificationSpec) -> transforms.Compose:
    """TAO's: resize to a square (PIL bilinear, no crop), 0..1, mean and std."""
    augmentation, size = spec.dataset.augmentation, spec.dataset.img_size
    for name, values in (("mean", augmentation.mean), ("std", augmentation.std)):
        if len(values) != 3 or (name == "std" and 0.0 in values):
            what = "three numbers for red, green, blue" + (" that are not 0" if name == "std" else "")
            raise SpecError(
                Fault(f"dataset.augmentation.{name}", f"{values} is not {what}", "for example [0.5, 0.5, 0.5]")
            )
    return transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(augmentation.mean, augmentation.std),
        ]
    )
