# SPDX-License-Identifier: Apache-2.0
"""Read and check COCO annotations."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taoq.errors import Fault, Notice, TaoqError
from taoq.files import digest
from taoq.tasks.rtdetr.annotation_checks import completed
from taoq.tasks.rtdetr.category_ids import OutputIds, output_ids
from taoq.tasks.rtdetr.coco_file import Annotations, CocoFile, Id, Images
from taoq.tasks.rtdetr.coco_reader import read_coco_file
from taoq.tasks.rtdetr.json_stream import NotJson
from taoq.tasks.rtdetr.spec import RtdetrSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coco:
    """The content of a COCO json, checked, and what it says about the outputs of a network.

    Attributes:
        path: The file.
        images: Its images.
        annotations: Its annotations with an area, and without those that have no width or height.
        labels: Output of the network for the category of each annotation, [annotations]; -1 if there is none.
        category_ids: Category id of each output; None if it is no category.
        written_ids: The same as the json writes them, for results.
        names: Name of each output. No two categories have the same name.
    """

    path: Path
    images: Images
    annotations: Annotations
    labels: NDArray[np.int32]
    category_ids: OutputIds
    written_ids: OutputIds
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest of all that a metric depends on."""
        rows = self.annotations
        values = hashlib.sha256()
        for column in (self.images.sizes, rows.images, self.labels, rows.boxes, rows.areas, rows.crowds):
            values.update(np.ascontiguousarray(column).tobytes())
        return digest([self.images.ids, self.images.files, self.written_ids, self.names, values.hexdigest()])


def read_coco(json_file: str, where: str, spec: RtdetrSpec) -> Coco:
    """Read and check a COCO json, and log what is unusual in it.

    Args:
        json_file: The file, as written in the spec.
        where: The field that it is written in, for messages.
        spec: The spec.

    Raises:
        TaoqError: If the file cannot be read, is not a valid COCO json, or does not fit dataset.num_classes.
        SpecError: If the spec must say what the outputs are.
    """
    file = open_coco(json_file, where)
    for part in (file.categories, file.annotations):
        if isinstance(part, Fault):
            raise TaoqError(part)
    assert not isinstance(file.categories, Fault)
    assert not isinstance(file.annotations, Fault)
    for remark in file.remarks:
        log.log(remark.level, Notice(where, remark.what))
    ids = output_ids(file.path, file.categories, spec)
    outputs = {id_: output for output, id_ in enumerate(ids)}
    output_of_category = np.array([outputs.get(id_, -1) for id_ in file.categories], np.int32)
    written = dict(zip(file.categories, file.written_ids, strict=True))
    return Coco(
        path=file.path,
        images=file.images,
        annotations=file.annotations,
        labels=output_of_category[file.annotations.categories],
        category_ids=ids,
        written_ids=tuple(None if id_ is None else written.get(id_, id_) for id_ in ids),
        names=_names(ids, file.categories),
    )


def open_coco(json_file: str, where: str) -> CocoFile:
    """Return the content of a COCO json. A run opens its data several times; each file is read once, unless it changes.

    Args:
        json_file: The file, as written in the spec.
        where: The field that it is written in, for messages.

    Raises:
        TaoqError: If the file cannot be read, is not a COCO json, or has no images.
    """
    path = Path(json_file)
    try:
        stat = path.stat()
        return _open(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise TaoqError(Fault(where, f"{path} cannot be read: {error.strerror}", "name a COCO json")) from None
    except NotJson as error:
        raise TaoqError(Fault(where, f"{path} {error.what}", error.hint or "name a COCO json")) from None


@functools.lru_cache(maxsize=2)  # The files for evaluation and for calibration.
def _open(path: Path, size: int, modified: int) -> CocoFile:  # noqa: ARG001 (a file that changes is read again)
    return completed(read_coco_file(path))


def _names(ids: OutputIds, categories: Mapping[Id, str]) -> tuple[str, ...]:
    """Return the name of each output; those of categories that have the same name get their ids added."""
    counts = Counter(categories.values())
    names = []
    for index, id_ in enumerate(ids):
        if id_ is None or id_ not in categories:
            names.append(f"class {index}" if id_ is None else f"category {id_}")
        else:
            name = categories[id_]
            names.append(name if counts[name] == 1 else f"{name} ({id_})")
    return tuple(names)


def image_paths(file: CocoFile | Coco, folder: Path) -> list[Path]:
    """Return the image files that a COCO json names.

    Args:
        file: The json.
        folder: The folder of the images.

    Raises:
        TaoqError: If an image file is missing.
    """
    files = [_image_path(folder, name) for name in file.images.files]
    missing = [index for index, path in enumerate(files) if path is None]
    if missing:
        name = file.images.files[missing[0]]
        what = f"{file.path} names it, but there is no such image" + (
            f"; {len(missing)} of {len(files)} are missing" if len(missing) > 1 else ""
        )
        if "://" in name:
            hint = "taoq downloads nothing: file names must be those of files in image_dir"
            raise TaoqError(Fault(name, what, hint))
        raise TaoqError(Fault(str(folder / name), what, f"image_dir is {folder}; file names are relative to it"))
    return [path for path in files if path is not None]


def _image_path(folder: Path, name: str) -> Path | None:
    """Return the path of an image file, whose name may have the backslashes of Windows; None if there is none."""
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = folder / spelling
        if path.is_file():
            return path
    return None
