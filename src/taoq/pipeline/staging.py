# SPDX-License-Identifier: Apache-2.0
"""Where results are written: into a staging folder, whose files are renamed into place when all are there."""

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
from taoq.files import cannot_write, weights_beside
from taoq.pipeline.artifacts import MANIFEST
from taoq.quantization.formats import FORMATS
from taoq.spec.load import spec_to_dict
from taoq.tasks.sections import TaskSpec


def results_dir(spec: TaskSpec, action: str) -> Path:
    """`<action>.results_dir`, else `<results_dir>/<action>`, as in TAO.

    Raises:
        SpecError: Neither is set.
    """
    own: str = getattr(spec, action).results_dir
    if own:
        return Path(own)
    if not spec.results_dir:
        what = f"missing: neither results_dir nor {action}.results_dir is set"
        raise SpecError(Fault("results_dir", what, "name a folder for the results"))
    return Path(spec.results_dir, action)


@dataclass(frozen=True)
class Stage:
    """A staging folder.

    Attributes:
        path: The folder to write into.
        directory: Where its files go.
    """

    path: Path
    directory: Path

    def write_json(self, name: str, data: object) -> None:
        """Write JSON, indented."""
        (self.path / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.path / name).write_text(text, encoding="utf-8")

    def write_spec(self, name: str, spec: TaskSpec) -> None:
        """Write a resolved spec, as TAO does in experiment.yaml."""
        self.write_text(name, yaml.safe_dump(spec_to_dict(spec), sort_keys=False))

    def commit(self) -> None:
        """Move all files to `directory`, replacing those of the same names.

        The manifest of an artifact is removed first and comes last: a folder with a manifest is whole.

        Raises:
            TaoqError: A file would replace what taoq did not write.
        """
        names = sorted((path.name for path in self.path.iterdir()), key=lambda name: name == MANIFEST)
        _check_kinds(self.path, self.directory, names)
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
def staged(directory: Path) -> Iterator[Stage]:
    """Give a folder to write into. What is in it reaches `directory` by `commit` alone; else `directory` is unchanged.

    Raises:
        TaoqError: The disk is full, or the folder cannot be written.
    """
    path = directory / ".partial"
    try:
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        path.mkdir(parents=True)
        yield Stage(path, directory)
    except OSError as error:
        raise TaoqError(cannot_write(directory, error)) from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _owns_weights(file: Path) -> bool:
    """Whether the file beside an ONNX file holds its weights, and not those of another."""
    beside = weights_beside(file)
    is_onnx = file.suffix in FORMATS["onnx"].suffixes
    return is_onnx and file.is_file() and beside.is_file() and beside.name.encode() in file.read_bytes()


def _check_kinds(stage: Path, directory: Path, names: list[str]) -> None:
    """Refuse to replace what taoq did not write: a folder by a file, a file by a folder, weights of another file."""
    external = {weights_beside(directory / name).name: directory / name for name in names}
    for name in names:
        target, is_folder = directory / name, (stage / name).is_dir()
        if name in external and target.is_file() and not _owns_weights(external[name]):
            what = "is there already, and has the weights of another file"
            raise TaoqError(Fault(str(target), what, "move it away, or name another folder"))
        if target.exists() and target.is_dir() != is_folder:
            what = "a file is in the place of this folder" if is_folder else "a folder is in the place of this file"
            raise TaoqError(Fault(str(target), what, "move it away, or name another folder"))
