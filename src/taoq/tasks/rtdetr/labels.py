# SPDX-License-Identifier: Apache-2.0
"""What the files of a spec say about the outputs of the network: names in config.json or in a classmap."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from taoq.checkpoint import read_names
from taoq.errors import Fault, TaoqError
from taoq.files import read_lines
from taoq.tasks.rtdetr.names import is_original
from taoq.tasks.rtdetr.spec import RtdetrSpec
from taoq.tasks.sections import checkpoints

_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_GENERIC = re.compile(r"(label_?)?\d+", re.IGNORECASE)
"""Labels that are only numbers, such as those that transformers makes up."""


@dataclass(frozen=True)
class Labels:
    """Names of the outputs of a network.

    Attributes:
        where: The file that has them.
        names: Name of each output.
    """

    where: str
    names: tuple[str, ...]


def checkpoint_labels(spec: RtdetrSpec) -> Labels | None:
    """Return the names in the config.json of the spec's Hugging Face folders; None if there are none, or several."""
    found = {
        labels.names: labels for folder in map(Path, checkpoints(spec)) if (labels := _config_labels(folder, spec))
    }
    return next(iter(found.values())) if len(found) == 1 else None


def _config_labels(folder: Path, spec: RtdetrSpec) -> Labels | None:
    path = folder / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["id2label"]
        labels = tuple(str(names[str(number)]) for number in range(len(names)))
    except (OSError, ValueError, LookupError, TypeError):
        return None  # Building the network reports a damaged file.
    if len(labels) != spec.dataset.num_classes or all(_GENERIC.fullmatch(label) for label in labels):
        return None
    return Labels(str(path), labels)


def classmap_labels(spec: RtdetrSpec) -> Labels | None:
    """Return the names in the classmap of the spec; None if there is none that can be read."""
    path = spec.dataset.infer_data_sources.classmap
    try:
        return Labels(path, read_classmap(spec)) if path else None
    except TaoqError:
        return None  # Inference reports a damaged file.


def read_classmap(spec: RtdetrSpec) -> tuple[str, ...]:
    """Return the name of each output in dataset.infer_data_sources.classmap.

    Raises:
        TaoqError: If the file cannot be read or does not fit dataset.num_classes.
    """
    num_classes, classmap = spec.dataset.num_classes, spec.dataset.infer_data_sources.classmap
    where = "dataset.infer_data_sources.classmap"
    names = read_lines(Path(classmap), where, "give a text file, one class a line")
    if len(names) == num_classes - 1:
        return ("background", *names)  # In TAO category ids start at 1, and class index 0 is not used.
    if len(names) != num_classes:
        what = f"{classmap} names {len(names)} classes, dataset.num_classes is {num_classes}"
        raise TaoqError(Fault(where, what, "write one line per class"))
    return tuple(names)


def original_checkpoint(spec: RtdetrSpec) -> Path | None:
    """Return a checkpoint of the spec that was made by TAO or by the original code, if all that can be read were.

    In both, output k is category id k, unless the network is for COCO.
    """
    found = {
        path: kind
        for path in map(Path, checkpoints(spec))
        if (kind := _is_original(path, spec.model.checkpoint_key)) is not None
    }
    return next(iter(found)) if found and all(found.values()) else None


def _is_original(path: Path, key: str) -> bool | None:
    """Return whether a float checkpoint has the names of the original code; None if it cannot be read."""
    if path.is_dir() and (path / "config.json").is_file():
        return False
    if path.suffix not in _FILES:
        return None
    try:
        return is_original(read_names(str(path), key))
    except TaoqError:
        return None  # The file of an artifact; if it is damaged, building the network reports it.
