# SPDX-License-Identifier: Apache-2.0
"""The files that a checkpoint is made of, how a file is replaced, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def weights_beside(file: Path) -> Path:
    """Where the weights of an ONNX file are that does not have them itself, as ModelOpt and onnxruntime name it."""
    return file.with_name(f"{file.name}_data")


def parts(checkpoint: Path) -> list[Path]:
    """A file, and for an ONNX file that of its weights if there is one; of a folder the files in it, sorted."""
    if checkpoint.is_dir():
        return sorted(file for file in checkpoint.iterdir() if file.is_file())
    beside = weights_beside(checkpoint)
    return [checkpoint, beside] if checkpoint.suffix == ".onnx" and beside.is_file() else [checkpoint]


def total_size(checkpoint: Path) -> int:
    """Bytes of all its files."""
    return sum(file.stat().st_size for file in parts(checkpoint))


def digest(value: Any) -> str:
    """The sha256 of plain data; what else is in it counts by its repr."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of another at the end; made first, so that no work is lost where it cannot be.

    Raises:
        OSError: It cannot be written; what was there is there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
