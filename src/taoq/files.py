# SPDX-License-Identifier: Apache-2.0
"""Files on disk: the files of a checkpoint, their digests, atomic replacement."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from taoq.errors import Fault, TaoqError

_WITH_EXTERNAL_WEIGHTS = (".onnx",)
"""Suffixes of files that may keep their weights in a second file."""


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a write that name no file: no space, over quota, file too large, read-only."""


def read_text(file: Path, where: str, hint: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        file: The file.
        where: The field that names it, for messages.
        hint: What the user should give.

    Raises:
        TaoqError: If it cannot be read, or is not in UTF-8.
    """
    try:
        data = file.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and data.decode("utf-16"):
            raise TaoqError(Fault(where, f"{file} is text in UTF-16", "save it as UTF-8"))
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise TaoqError(Fault(where, f"{file} cannot be read", hint)) from None


def read_lines(file: Path, where: str, hint: str) -> list[str]:
    """Return the lines of a text file that are not blank, without spaces around them; see `read_text`."""
    return [line.strip() for line in read_text(file, where, hint).splitlines() if line.strip()]


def weights_beside(file: Path) -> Path:
    """Return the path at which ModelOpt and onnxruntime store the external weights of an ONNX file."""
    return file.with_name(f"{file.name}_data")


def parts(checkpoint: Path) -> list[Path]:
    """Return all files of a checkpoint: the file and its external weights; for a folder the files in it, sorted."""
    if checkpoint.is_dir():
        return sorted(file for file in checkpoint.iterdir() if file.is_file())
    if checkpoint.suffix not in _WITH_EXTERNAL_WEIGHTS:
        return [checkpoint]
    beside = (weights_beside(checkpoint), checkpoint.with_name(f"{checkpoint.name}.data"))  # torch's exporter: .data
    return [checkpoint, *(file for file in beside if file.is_file())]


def total_size(checkpoint: Path) -> int:
    """Return the total size of a checkpoint's files, in bytes."""
    return sum(file.stat().st_size for file in parts(checkpoint))


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, or for a folder that of the listing of its files with their SHA-256.

    An ONNX file with external weights is digested like a folder of its files.
    """
    files = parts(path)
    if files == [path]:
        return _digest_of_file(path)
    listing = "".join(f"{_digest_of_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """Return the SHA-256 of plain data written as JSON; objects that JSON cannot hold are written as their repr."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def partial_of(path: Path) -> Path:
    """Return the temporary file of `replacing`."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file and rename it over `path` on success.

    The temporary file is created up front, so that an unwritable target fails before the work.

    Yields:
        The temporary file.

    Raises:
        OSError: If the file cannot be written; `path` is unchanged.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        TaoqError: If the file cannot be written; `path` is unchanged.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TaoqError(cannot_write(path, error)) from error


def failed_to_write(error: OSError, path: Path) -> bool:
    """Return whether an error comes from writing a file or folder, rather than from other files that were read."""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return error.errno in _OF_THE_DISK or any(name.is_relative_to(path) or path.is_relative_to(name) for name in names)


def cannot_write(path: Path, error: OSError) -> Fault:
    """Return the fault of a file or folder that cannot be written."""
    return Fault(str(path), f"cannot be written: {error.strerror}", "free some space, or name another folder")
