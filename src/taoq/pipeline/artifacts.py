# SPDX-License-Identifier: Apache-2.0
"""The artifact: a folder with the payload and manifest.json, which is written last and verified on read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from taoq.errors import Fault, TaoqError
from taoq.files import sha256
from taoq.plain import JsonMapping, JsonObject
from taoq.spec.load import StoredSpec

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is needed to rebuild a quantized model, and where the model came from.

    Attributes:
        schema_version: Version of this format.
        taoq: Version of taoq.
        task: Name of the task; empty for a model that a Python caller supplied.
        backend: Name of the backend.
        format: Name of the model format.
        payload: Name of the payload file in the folder of the manifest.
        sha256: SHA-256 of the payload.
        size: Size of the payload in bytes.
        float_size: Size of the same model in bytes when saved as float32.
        source: Path and SHA-256 of the float checkpoint.
        spec: The resolved spec.
        plan: One entry per layer: name, type, weights, activations, rule, reason.
        calibration: Number of samples and seed; empty without calibration.
        versions: Versions of Python, the libraries, and the packages that provide the task or the backend.
        accuracy: Result of the check of `quantize.accuracy`: metric, float, quantized, drop, max_drop, met; empty
            without a check.
        preprocessing: What becomes of a file before it is an input of the network; empty if the task does not say it.
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
    spec: JsonMapping
    plan: tuple[JsonMapping, ...]
    calibration: Mapping[str, int]
    versions: Mapping[str, str]
    accuracy: JsonMapping = field(default_factory=dict)
    preprocessing: JsonMapping = field(default_factory=dict)

    @property
    def layers_quantized(self) -> int:
        """Number of quantized layers."""
        return sum(1 for row in self.plan if row["weights"] or row["activations"])


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and verified."""

    directory: Path
    manifest: Manifest

    @property
    def payload(self) -> Path:
        """Path of the quantized model."""
        return self.directory / self.manifest.payload

    @property
    def stored_spec(self) -> StoredSpec:
        """The spec that the artifact was made with."""
        return StoredSpec(self.manifest.spec, str(self.directory / MANIFEST), self.manifest.taoq)


def find_artifact(checkpoint: str) -> Path | None:
    """Return the artifact folder that a path names, or that contains the payload it names; None for any other file."""
    path = Path(checkpoint)
    directory = path if path.is_dir() else path.parent
    if not checkpoint or not (directory / MANIFEST).is_file():
        return None
    if path.is_dir() or _read_json(directory / MANIFEST).get("payload") == path.name:
        return directory
    return None


def file_of(checkpoint: str) -> Path:
    """Return the file that a path names: the payload of an artifact, which is not verified, or the path itself."""
    directory = find_artifact(checkpoint)
    payload = _read_json(directory / MANIFEST).get("payload") if directory else None
    return directory / payload if directory and isinstance(payload, str) else Path(checkpoint)


def read_artifact(directory: Path) -> Artifact:
    """Read and verify an artifact.

    Raises:
        TaoqError: If the manifest is damaged or was written by a newer taoq, or if the payload is missing or changed.
    """
    path = directory / MANIFEST
    data = _read_json(path)
    if data.get("schema_version") != SCHEMA_VERSION:
        what = f"its schema_version is {data.get('schema_version')}, this taoq reads {SCHEMA_VERSION}"
        raise TaoqError(Fault(str(path), what, "read it with the taoq that wrote it, or quantize again"))
    wrong = _wrong_fields(data)
    if wrong:
        what = f"is not a manifest of taoq: {', '.join(sorted(wrong))} missing, unknown or of a wrong type"
        raise TaoqError(Fault(str(path), what, "quantize again"))
    manifest = Manifest(**{**data, "plan": tuple(data["plan"])})
    artifact = Artifact(directory, manifest)
    if artifact.payload.name != manifest.payload or not artifact.payload.is_file():
        raise TaoqError(Fault(str(artifact.payload), "the payload of this artifact is missing", "quantize again"))
    if sha256(artifact.payload) != manifest.sha256:
        hint = "the file was changed or cut off after it was written: quantize again"
        what = "is not the file that its manifest names (sha256 differs)"
        raise TaoqError(Fault(str(artifact.payload), what, hint))
    return artifact


def _wrong_fields(data: JsonMapping) -> set[str]:
    """Return the fields of a manifest that are missing, unknown or of a wrong type."""
    types = typing.get_type_hints(Manifest)
    optional = {entry.name for entry in dataclasses.fields(Manifest) if entry.default_factory is not MISSING}
    wrong = set(data) ^ set(types) - (optional - set(data))
    for name in set(data) & set(types):
        kind = typing.get_origin(types[name]) or types[name]
        # JSON has lists where the manifest has tuples.
        if not isinstance(data[name], list if kind is tuple else dict if kind is Mapping else kind):
            wrong.add(name)
    return wrong


def source_is_unchanged(source: Mapping[str, str]) -> bool:
    """Return whether the float checkpoint of a manifest still exists with the same content."""
    path = Path(source["path"])
    return bool(source["path"]) and path.exists() and sha256(path) == source["sha256"]


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of installed distributions."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in distributions}


def _read_json(path: Path) -> JsonObject:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise TaoqError(Fault(str(path), "is not readable as a manifest", "quantize again"))
    return data
