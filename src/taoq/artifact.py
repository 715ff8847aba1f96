# SPDX-License-Identifier: Apache-2.0
"""The artifact: a folder with the payload and manifest.json, which is written last and verified on read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from taoq.errors import Fault, TaoqError
from taoq.files import parts

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What rebuilds a quantized model, and says where it came from.

    Attributes:
        schema_version: Version of this format.
        taoq: Version of taoq.
        task: Name of the task.
        backend: Name of the backend.
        format: torch or onnx.
        payload: File name beside the manifest.
        sha256: Of the payload.
        size: Of the payload, bytes.
        float_size: Of the same model saved as float32, bytes.
        source: The float checkpoint and its sha256.
        spec: The resolved spec.
        plan: One entry per layer: name, type, weights, activations, rule, reason.
        calibration: Number of samples and seed; empty without calibration.
        versions: Of python and the libraries.
        accuracy: What `quantize.accuracy` found: metric, float, quantized, drop, max_drop, met; empty if not asked.
    """

    schema_version: int
    taoq: str
    task: str
    backend: str
    format: str
    payload: str
    sha256: str
    size: int
    float_size: int
    source: Mapping[str, str]
    spec: Mapping[str, Any]
    plan: tuple[Mapping[str, Any], ...]
    calibration: Mapping[str, int]
    versions: Mapping[str, str]
    accuracy: Mapping[str, Any] = field(default_factory=dict)


def find_artifact(checkpoint: str) -> Path | None:
    """The artifact folder that a path means: the folder itself, or its payload. None for any other file."""
    path = Path(checkpoint)
    directory = path if path.is_dir() else path.parent
    if not (directory / MANIFEST).is_file():
        return None
    if path.is_dir() or _read_json(directory / MANIFEST).get("payload") == path.name:
        return directory
    return None


def read_manifest(directory: Path) -> Manifest:
    """Read and verify an artifact.

    Raises:
        TaoqError: The manifest is damaged or of a newer taoq, or the payload is missing or is not the one it names.
    """
    path = directory / MANIFEST
    data = _read_json(path)
    if data.get("schema_version") != SCHEMA_VERSION:
        what = f"its schema_version is {data.get('schema_version')}, this taoq reads {SCHEMA_VERSION}"
        raise TaoqError(Fault(str(path), what, "read it with the taoq that wrote it, or quantize again"))
    types = typing.get_type_hints(Manifest)
    optional = {one.name for one in fields(Manifest) if one.default_factory is not MISSING}  # of a later taoq
    wrong = set(data) ^ set(types) - (optional - set(data))
    for name in set(data) & set(types):
        kind = typing.get_origin(types[name]) or types[name]
        # JSON has lists where the manifest has tuples
        if not isinstance(data[name], list if kind is tuple else dict if kind is Mapping else kind):
            wrong.add(name)
    if wrong:
        what = f"is not a manifest of taoq: {', '.join(sorted(wrong))} missing, unknown or of a wrong type"
        raise TaoqError(Fault(str(path), what, "quantize again"))
    manifest = Manifest(**{**data, "plan": tuple(data["plan"])})
    payload = directory / manifest.payload
    if payload.name != manifest.payload or not payload.is_file():
        raise TaoqError(Fault(str(payload), "the payload of this artifact is missing", "quantize again"))
    if sha256(payload) != manifest.sha256:
        hint = "the file was changed or cut off after it was written: quantize again"
        raise TaoqError(Fault(str(payload), "is not the file that its manifest names (sha256 differs)", hint))
    return manifest


def is_there(source: Mapping[str, str]) -> bool:
    """Whether the float checkpoint of a manifest is where it was, and what it was."""
    path = Path(source["path"])
    return bool(source["path"]) and path.exists() and sha256(path) == source["sha256"]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; of a folder, that of a list of its files with theirs.

    An ONNX file with weights beside it counts as such a folder of two.
    """
    files = parts(path)
    if files == [path]:
        return _digest(path)
    listed = "".join(f"{_digest(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Version of python and of installed distributions."""
    found = {"python": sys.version.split()[0]}
    return found | {name: importlib.metadata.version(name) for name in distributions}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise TaoqError(Fault(str(path), "is not readable as a manifest", "quantize again"))
    return data
