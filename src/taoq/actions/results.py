# SPDX-License-Identifier: Apache-2.0
"""Where and how an action writes: into a staging folder, renamed into place when everything is there."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from taoq.artifact import MANIFEST
from taoq.errors import Fault, SpecError, TaoqError
from taoq.files import replacing, weights_beside
from taoq.spec import spec_to_dict


def results_dir(spec: Any, action: str) -> Path:
    """`<action>.results_dir`, else `<results_dir>/<action>`, as in TAO.

    Raises:
        SpecError: Neither is set.
    """
    own = getattr(spec, action).results_dir
    if own:
        return Path(own)
    if not spec.results_dir:
        what = f"missing: neither results_dir nor {action}.results_dir is set"
        raise SpecError(Fault("results_dir", what, "name a folder for the results"))
    return Path(spec.results_dir, action)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Give a folder to write into; what is in it moves to `directory` at the end, if nothing went wrong.

    The manifest of an artifact goes away first and comes last: a folder with a manifest is whole. After an
    error, `directory` is as it was.

    Raises:
        TaoqError: The disk is full, or the folder cannot be written.
    """
    stage = directory / ".partial"
    try:
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        stage.mkdir(parents=True)
        yield stage
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == MANIFEST)
        _check_kinds(stage, directory, names)
        if MANIFEST in names:
            (directory / MANIFEST).unlink(missing_ok=True)
        for name in names:
            beside = weights_beside(directory / name)
            if name.endswith(".onnx") and beside.name not in names and _has_weights(directory / name):
                beside.unlink()
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(stage / name, directory / name)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise TaoqError(Fault(str(directory), what, "free some space, or name another folder")) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _has_weights(file: Path) -> bool:
    """Whether the file beside an ONNX file has its weights, and not those of another."""
    beside = weights_beside(file)
    return file.is_file() and beside.is_file() and beside.name.encode() in file.read_bytes()


def _check_kinds(stage: Path, directory: Path, names: list[str]) -> None:
    """Refuse to replace what taoq did not write: a folder by a file, a file by a folder, weights of another file."""
    for name in names:
        beside = name.endswith(".onnx_data") and (directory / name).is_file()
        if beside and not _has_weights(directory / name.removesuffix("_data")):
            what = "is there already, and has the weights of another file"
            raise TaoqError(Fault(str(directory / name), what, "move it away, or name another folder"))
        target, is_folder = directory / name, (stage / name).is_dir()
        if target.exists() and target.is_dir() != is_folder:
            what = "a file is in the place of this folder" if is_folder else "a folder is in the place of this file"
            raise TaoqError(Fault(str(target), what, "move it away, or name another folder"))


def exact_patterns(names: Iterable[str]) -> list[str]:
    """Names as patterns that match nothing else."""
    return [glob.escape(name) for name in names]


def write_json(path: Path, data: Any) -> None:
    """Write JSON, indented."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there with all of its text, or as it was.

    Raises:
        TaoqError: It cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise TaoqError(Fault(str(path), what, "free some space, or name another folder")) from error


def write_experiment(path: Path, spec: Any) -> None:
    """Keep the resolved spec, as TAO does in experiment.yaml."""
    path.write_text(yaml.safe_dump(spec_to_dict(spec), sort_keys=False), encoding="utf-8")
