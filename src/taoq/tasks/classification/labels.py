# SPDX-License-Identifier: Apache-2.0
"""Labels of images: by the folder of a class that they are in, or by a table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from taoq.errors import Fault, Notice, TaoqError, abbreviated, did_you_mean
from taoq.tasks.classification.classes import are_numbers, indices, key
from taoq.tasks.classification.labels_file import read_labels

log = logging.getLogger(__name__)


def labels_of_folders(files: Sequence[Path], folder: Path, names: Sequence[str], where: str) -> dict[Path, int]:
    """Return the class index of each image in a class folder, and warn of images in other folders.

    Args:
        files: The images.
        folder: The folder of the class folders.
        names: Names of the classes.
        where: The field of the folder, for messages.
    """
    class_index = indices(names)
    labels: dict[Path, int] = {}
    left_out: Counter[str] = Counter()
    for path in files:
        class_name = path.relative_to(folder).parts[0]
        if key(class_name) in class_index and path.parent != folder:
            labels[path] = class_index[key(class_name)]
        else:
            left_out[class_name if path.parent != folder else "."] += 1
    if labels:
        for class_folder, count in left_out.items():
            what = f"{count} image(s) in '{class_folder}' are left out: it is not the folder of a class"
            log.warning(Notice(where, what))
    return labels


def labels_of_table(
    file: str, where: str, folder: Path, files: Sequence[Path], names: Sequence[str], without_row: str = "are left out"
) -> dict[Path, int]:
    """Return the class index of each image in a table of labels, and warn of images that are not in it.

    Args:
        file: The table; see `read_labels`.
        where: The field that names it, for messages.
        folder: Folder of the images.
        files: The images in it.
        names: Names of the classes.
        without_row: What becomes of images that are not in the table, for the warning.

    Raises:
        TaoqError: If the table cannot be read, names an image or a class that is not there, or labels an image twice.
    """
    rows = read_labels(file, where)
    class_index = indices(names)
    numbered = are_numbers([row.label for row in rows], len(names))
    by_name = {key(str(path.relative_to(folder))): path for path in files}
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        by_stem.setdefault(key(str(path.relative_to(folder).with_suffix(""))), []).append(path)
    labels: dict[Path, int] = {}
    for row in rows:
        image = key(str(Path(row.image)))
        candidates = [by_name[image]] if image in by_name else by_stem.get(image, [])
        if len(candidates) > 1:
            what = f"{row.image} can be {' or '.join(path.name for path in candidates)}"
            raise TaoqError(Fault(f"{file}:{row.line}", what, "write the name with its suffix"))
        if not candidates:
            what = f"there is no image {row.image} in {folder}"
            hint = did_you_mean(row.image, by_name, "names are relative to images_dir")
            raise TaoqError(Fault(f"{file}:{row.line}", what, hint))
        label = class_index.get(key(row.label), int(row.label) if numbered else None)
        if label is None:
            hint = did_you_mean(row.label, names, "classes are " + abbreviated(list(names)))
            raise TaoqError(Fault(f"{file}:{row.line}", f"there is no class '{row.label}'", hint))
        if labels.setdefault(candidates[0], label) != label:
            what = f"{row.image} is labelled '{row.label}', and otherwise in an earlier row"
            raise TaoqError(Fault(f"{file}:{row.line}", what, "an image has one label: delete one of the rows"))
    if missing := len(files) - len(labels):
        log.warning(Notice(where, f"{missing} image(s) in {folder} {without_row}: they have no row in {file}"))
    return labels
