# SPDX-License-Identifier: Apache-2.0
"""Write results into a staging folder, and move its files into place when all of them are written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from taoq.errors import Fault, SpecError, TaoqError
from taoq.files import cannot_write, failed_to_write, weights_beside
from taoq.pipeline.artifacts import MANIFEST
from taoq.quantization.formats import FORMATS
from taoq.spec.load import spec_to_dict
from taoq.tasks.sections import TaskSpec


def results_dir(spec: TaskSpec, action: str) -> Path:
    """Return `<action>.results_dir` if it is set, otherwise `<results_dir>/<action>`, as TAO does.

    Raises:
        SpecError: If neither is set.
    """
    directory: str = getattr(spec, action).results_dir
    if directory:
        return Path(directory)
    if not spec.results_dir:
        what = f"missing: neither results_dir nor {action}.results_dir is set"
        raise SpecError(Fault("results_dir", what, "name a folder for the results"))
    return Path(spec.results_dir, action)


@dataclass(frozen=True)
class Stage:
    """A staging folder.

    Attributes:
        path: Folder to write into.
        directory: Folder that `commit` moves the files to.
    """

    path: Path
    directory: Path

    def write_json(self, name: str, data: object) -> None:
        """Write indented JSON."""
        (self.path / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.path / name).write_text(text, encoding="utf-8")

    def write_spec(self, name: str, spec: TaskSpec) -> None:
        """Write a resolved spec as YAML, as TAO does in experiment.yaml."""
        self.write_text(name, yaml.safe_dump(spec_to_dict(spec), sort_keys=False))

    def commit(self) -> None:
        """Move all files to `directory`, replacing files of the same names.

        The old manifest of an artifact is removed first and the new one is moved last, so that a folder with a manifest
        is always complete.

        Raises:
            TaoqError: If a file would replace something that taoq did not write, or cannot be moved.
        """
        names = sorted((path.name for path in self.path.iterdir()), key=lambda name: name == MANIFEST)
        _check_kinds(self.path, self.directory, names)
        try:
            self._move(names)
        except OSError as error:
            raise TaoqError(cannot_write(self.directory, error)) from error

    def _move(self, names: list[str]) -> None:
        if MANIFEST in names:
            (self.directory / MANIFEST).unlink(missing_ok=True)
        for name in names:
            target = self.directory / name
            beside = weights_beside(target)
            if beside.name not in names and _owns_weights(target):
                beside.unlink()
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(self.path / name, target)


@contextlib.contextmanager
def staged(directory: Path, name: str = "") -> Iterator[Stage]:
    """Open a staging folder for `directory`, which stays unchanged unless the caller calls `commit`.

    Args:
        directory: Folder of the results.
        name: Name of the result, if several results may be written into the folder at the same time.

    Raises:
        TaoqError: If the disk is full or the folder cannot be written.
    """
    path = directory / f".partial{name and '-'}{name}"
    try:
        shutil.rmtree(path, ignore_errors=True)  # left by a run that was killed
        path.mkdir(parents=True)
        yield Stage(path, directory)
    except OSError as error:
        if not failed_to_write(error, path):  # The body also reads data.
            raise
        raise TaoqError(cannot_write(directory, error)) from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _owns_weights(file: Path) -> bool:
    """Return whether the weights file beside an ONNX file belongs to it, rather than to another ONNX file."""
    beside = weights_beside(file)
    is_onnx = file.suffix in FORMATS["onnx"].suffixes
    return is_onnx and file.is_file() and beside.is_file() and beside.name.encode() in file.read_bytes()


def _check_kinds(stage: Path, directory: Path, names: list[str]) -> None:
    """Refuse to replace a folder by a file, a file by a folder, or the weights of another file."""
    external = {weights_beside(directory / name).name: directory / name for name in names}
    for name in names:
        target, is_folder = directory / name, (stage / name).is_dir()
        if name in external and target.is_file() and not _owns_weights(external[name]):
            what = "is there already, and has the weights of another file"
            raise TaoqError(Fault(str(target), what, "move it away, or name another folder"))
        if target.exists() and target.is_dir() != is_folder:
            what = "a file is in the place of this folder" if is_folder else "a folder is in the place of this file"
            raise TaoqError(Fault(str(target), what, "move it away, or name another folder"))
