# SPDX-License-Identifier: Apache-2.0
"""Read the labels of images from a table: a CSV file with the name of an image and its class in each row."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, TaoqError
from taoq.files import read_text

_SEPARATORS = (",", ";", "\t")
_IMAGE_COLUMNS = (
    "filename", "file_name", "filepath", "file_path", "fname", "file", "image_name", "image", "image_path", "path",
    "image_id", "id", "img", "name",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "labels", "y")
"""Names of columns in the first row, in lower case, the preferred ones first. Other columns are not read."""


@dataclass(frozen=True)
class LabelRow:
    """The label of an image.

    Attributes:
        line: Line of the file, from 1.
        image: Name of the image, relative to the folder of the images; may lack its suffix.
        label: Name or index of the class.
    """

    line: int
    image: str
    label: str


def read_labels(file: str, where: str) -> list[LabelRow]:
    """Read a table of labels, whose columns are separated by commas, semicolons or tabs.

    A first row with names of columns is used to find the two that count; without it, they are the only two.

    Args:
        file: The file.
        where: The field that names it, for messages.

    Raises:
        TaoqError: If it cannot be read, has no rows or other columns, or if it gives an image two labels.
    """
    hint = "give a CSV file with the columns filename and label"
    lines = read_text(Path(file), where, hint).splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = max(_SEPARATORS, key=first.count)
    rows: list[LabelRow] = []
    columns: tuple[int, int] | None = None
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
        if not any(cells):
            continue
        if columns is None:
            columns = _named_columns(cells)
            if columns:
                continue
            columns = (0, 1)
            if len(cells) != 2:
                what = f"has {len(cells)} columns, and its first row does not name those of images and labels"
                raise TaoqError(Fault(file, what, hint))
        if len(cells) <= max(columns):
            raise TaoqError(Fault(f"{file}:{number}", f"has {len(cells)} column(s): '{line.strip()}'", hint))
        row = LabelRow(number, cells[columns[0]], cells[columns[1]])
        if not row.image or not row.label:
            what = f"has no {'label' if row.image else 'image'}: '{line.strip()}'"
            raise TaoqError(Fault(f"{file}:{number}", what, "complete or delete the row"))
        if labels.setdefault(row.image, row.label) != row.label:
            what = f"{row.image} is labelled '{row.label}', and '{labels[row.image]}' in an earlier row"
            raise TaoqError(Fault(f"{file}:{number}", what, "an image has one label: delete one of the rows"))
        rows.append(row)
    if not rows:
        raise TaoqError(Fault(where, f"{file} has no rows", hint))
    return list({row.image: row for row in rows}.values())


def _named_columns(cells: Sequence[str]) -> tuple[int, int] | None:
    """Return the indices of the columns of images and labels; None if the row is no row of names."""
    names = [cell.lower() for cell in cells]
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    return None if image is None or label is None else (names.index(image), names.index(label))
