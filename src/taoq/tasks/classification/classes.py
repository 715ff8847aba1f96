# SPDX-License-Identifier: Apache-2.0
"""Names of the classes: those of classes.txt, of a file of labels, or of the folders of the images."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from taoq.errors import Fault, Notice, SpecError, TaoqError
from taoq.files import read_lines
from taoq.tasks.classification.labels_file import read_labels
from taoq.tasks.classification.spec import ClassificationSpec, LabelledSpec

log = logging.getLogger(__name__)


def evaluation_section(spec: ClassificationSpec) -> tuple[str, LabelledSpec]:
    """Return the images of `evaluate`, after the field: val_dataset, or test_dataset if only that is given."""
    dataset = spec.dataset
    if dataset.val_dataset.images_dir or dataset.val_dataset.labels_file:
        return "dataset.val_dataset", dataset.val_dataset
    return "dataset.test_dataset", dataset.test_dataset


def refuse_one_class(spec: ClassificationSpec) -> None:
    """Refuse a network with one class, whose prediction is always that class.

    Raises:
        SpecError: If there is one class.
    """
    if spec.dataset.num_classes == 1:
        what = "is 1: the softmax of one output is always 1, so every prediction is right"
        raise SpecError(Fault("dataset.num_classes", what, "train with two classes, one of them for all other images"))


def class_names(spec: ClassificationSpec) -> list[str]:
    """Return the names of the classes of the evaluation data, by index.

    They are the lines of classes.txt; without it the sorted labels of the file of labels, or the sorted names of the
    class folders.

    Raises:
        TaoqError: If a file cannot be read, or if there are not dataset.num_classes names.
    """
    where, section = evaluation_section(spec)
    folder, file = Path(section.images_dir), _classes_file(spec)
    if file:
        names, source = _read_classes(file, spec), f"{file} names"
    elif section.labels_file:
        rows = read_labels(section.labels_file, f"{where}.labels_file")
        names, source = _names_of_labels([row.label for row in rows], spec), f"{section.labels_file} has"
    else:
        names, source = _folder_names(folder), f"{folder} has"
    num_classes = spec.dataset.num_classes
    if len(names) != num_classes:
        what = f"{source} {len(names)} classes, dataset.num_classes is {num_classes}"
        hint = f"set it to {len(names)}, or name the classes in dataset.classes_file"
        raise TaoqError(Fault("dataset.num_classes", what, hint))
    return names


def class_names_or_numbers(spec: ClassificationSpec) -> list[str]:
    """Return the names of the classes, or their numbers if no file or folder names them. For unlabelled images."""
    _, section = evaluation_section(spec)
    folder = Path(section.images_dir)
    named = section.labels_file or (folder.is_dir() and len(_folder_names(folder)) == spec.dataset.num_classes)
    if _classes_file(spec) or named:
        return class_names(spec)
    log.warning(Notice("dataset.classes_file", "nothing names the classes, they are numbered"))
    return [str(number) for number in range(spec.dataset.num_classes)]


def are_numbers(labels: Sequence[str], num_classes: int) -> bool:
    """Return whether labels are indices of classes, rather than names."""
    return all(label.isdecimal() and int(label) < num_classes for label in labels)


def key(name: str) -> str:
    """Return what all spellings of a class have in common: macOS decomposes letters with accents in file names."""
    return unicodedata.normalize("NFC", name).strip()


def indices(names: Iterable[str]) -> dict[str, int]:
    """Return the index of each class by its `key`."""
    return {key(name): index for index, name in enumerate(names)}


def _classes_file(spec: ClassificationSpec) -> Path | None:
    if spec.dataset.classes_file:
        return Path(spec.dataset.classes_file)
    if spec.dataset.root_dir and not Path(spec.dataset.root_dir).is_dir():
        what = f"there is no folder {spec.dataset.root_dir}"
        raise TaoqError(Fault("dataset.root_dir", what, "name the folder of classes.txt, or leave the field out"))
    file = Path(spec.dataset.root_dir, "classes.txt")
    return file if spec.dataset.root_dir and file.is_file() else None


def _read_classes(file: Path, spec: ClassificationSpec) -> list[str]:
    where = "dataset.classes_file" if spec.dataset.classes_file else "dataset.root_dir"
    names = read_lines(file, where, "give a text file, one class a line")
    duplicates = [name for name, count in Counter(map(key, names)).items() if count > 1]
    if duplicates:
        raise TaoqError(Fault(str(file), f"names the class '{duplicates[0]}' twice", "write each class once"))
    return names


def _names_of_labels(labels: Sequence[str], spec: ClassificationSpec) -> list[str]:
    """Return the sorted names of a table of labels, or the numbers of all classes if its labels are such numbers."""
    if are_numbers(labels, spec.dataset.num_classes):
        return [str(number) for number in range(spec.dataset.num_classes)]
    return sorted(set(labels))


def _folder_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
