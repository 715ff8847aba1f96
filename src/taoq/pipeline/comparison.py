# SPDX-License-Identifier: Apache-2.0
"""The artifacts of a comparison: read them, name them, and check everything that needs no model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, Notice, SpecError, TaoqError
from taoq.pipeline.accuracy import budget_figure
from taoq.pipeline.artifacts import Artifact, Manifest, find_artifact, read_artifact, source_is_unchanged
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.models import experiment_for, fitting_artifact
from taoq.pipeline.timing import check_batch_sizes
from taoq.quantization.formats import FORMATS, load_format
from taoq.spec.fields import changed

log = logging.getLogger(__name__)

_NO_FILE = "float32"
"""Name of a float model without a file."""
_UNUSED = ("batch_size", "compile", "min_speedup")
"""Fields of the section `benchmark` that have no effect on a comparison."""


@dataclass(frozen=True, kw_only=True)
class ComparedArtifact:
    """An artifact to compare.

    Attributes:
        name: Short name for tables.
        path: Path of the folder, as the user wrote it.
        artifact: The artifact.
        source: Short name of the float model that the artifact was made from.
        source_path: Path of the float model.
    """

    name: str
    path: str
    artifact: Artifact
    source: str
    source_path: str

    @property
    def manifest(self) -> Manifest:
        """Manifest of the artifact."""
        return self.artifact.manifest


@dataclass(frozen=True)
class Comparison:
    """Artifacts that can be compared.

    Attributes:
        experiment: The experiment, for the evaluation data and the section `benchmark`.
        artifacts: The artifacts.
        figure: Name of the figure to compare.
    """

    experiment: Experiment
    artifacts: Sequence[ComparedArtifact]
    figure: str


def task_and_spec(artifacts: Sequence[str], spec: str | None) -> tuple[str, str]:
    """Return the task of the artifacts, and the path of the spec to compare them with.

    Args:
        artifacts: Folders of the artifacts.
        spec: Path of the spec; None for the spec of the first artifact.

    Raises:
        SpecError: If there is not an artifact.
        TaoqError: If the first artifact is damaged, or if its spec is missing.
    """
    if not artifacts:
        hint = "name the folders of artifacts: taoq compare results/a results/b"
        raise SpecError(Fault("compare", "no artifact is given", hint))
    directory = _folder(artifacts[0])
    if spec is None and not (directory / "experiment.yaml").is_file():
        hint = "give a spec with the evaluation data: -e spec.yaml"
        raise TaoqError(Fault(str(directory / "experiment.yaml"), "the spec of this artifact is gone", hint))
    manifest = read_artifact(directory).manifest
    if not manifest.task:
        hint = "compare it with taoq.compare"
        raise TaoqError(Fault(artifacts[0], "was made through the Python API", hint))
    return manifest.task, spec or str(directory / "experiment.yaml")


def read_artifacts(experiment: Experiment, artifacts: Sequence[str]) -> Comparison:
    """Read artifacts, and check everything that needs no model.

    Args:
        experiment: The experiment.
        artifacts: Folders of the artifacts.

    Raises:
        TaoqError: If an artifact is damaged, belongs to another task or network, or its float model is missing.
        SpecError: If an artifact is named twice, if only some have post-processing, or if a field is invalid.
    """
    experiment = _experiment_for(experiment, artifacts)
    section = experiment.spec.benchmark
    check_batch_sizes(section.batch_sizes)
    for name in changed(section, _UNUSED):
        log.warning(Notice(f"benchmark.{name}", "has no effect on compare"))
    compared = _named(_read(experiment, artifacts))
    if len({_origin(experiment, entry) for entry in compared}) > 1:
        names = " and ".join(dict.fromkeys(entry.source_path for entry in compared))
        log.warning("the artifacts were made from different float models, %s: each is compared with its own", names)
    figure = budget_figure(experiment)
    experiment.evaluation()  # reports missing data before a model is opened
    return Comparison(experiment, compared, figure)


def _experiment_for(experiment: Experiment, artifacts: Sequence[str]) -> Experiment:
    """Return the experiment for the inputs and outputs of the artifacts, which all must have the same."""
    first = experiment_for(experiment, artifacts[0])
    for path in artifacts[1:]:
        other = experiment_for(experiment, path)
        if other.outputs != first.outputs:
            what = f"has the outputs {', '.join(other.outputs)}; {artifacts[0]} has {', '.join(first.outputs)}"
            raise SpecError(Fault(path, what, "compare artifacts that all have post-processing, or none of them"))
    return first


def _folder(name: str) -> Path:
    directory = find_artifact(name)
    if directory is None:
        raise TaoqError(Fault(name, "is not an artifact", "name a folder that taoq <task> quantize wrote"))
    return directory


def _read(experiment: Experiment, paths: Sequence[str]) -> dict[str, Artifact]:
    """Read the artifacts, by path, and check that their float models are still there."""
    artifacts: dict[str, Artifact] = {}
    directories: set[Path] = set()
    for path in paths:
        directory = _folder(path)
        if directory.resolve() in directories:
            raise SpecError(Fault(path, "is named twice", "name each artifact once"))
        directories.add(directory.resolve())
        artifact = artifacts[path] = fitting_artifact(experiment, directory)
        source = artifact.manifest.source
        if not _source_exists(experiment, source):
            what = f"the float model that it was made from, {source['path']}, is missing or has changed"
            hint = "compare in the folder in which it was quantized, with that file in place"
            if not source["path"]:
                what, hint = "was made from another network", "give the network, with its weights, that was quantized"
            raise TaoqError(Fault(path, what, hint))
    return artifacts


def _source_exists(experiment: Experiment, source: Mapping[str, str]) -> bool:
    """Return whether the float model of an artifact exists unchanged. One without a file is built to check it."""
    if source["path"]:
        return source_is_unchanged(source)
    return load_format("torch").digest(experiment.build("")) == source["sha256"]


def _named(artifacts: Mapping[str, Artifact]) -> list[ComparedArtifact]:
    """Give the artifacts and their float models short names."""
    sources: dict[str, str] = {}  # by SHA-256, because several paths may name the same float model
    for artifact in artifacts.values():
        sources.setdefault(artifact.manifest.source["sha256"], artifact.manifest.source["path"])
    names = _short_names(list(artifacts), sources.values())
    compared = []
    for path, artifact in artifacts.items():
        source_path = sources[artifact.manifest.source["sha256"]]
        compared.append(
            ComparedArtifact(
                name=names[path],
                path=path,
                artifact=artifact,
                source=names[source_path],
                source_path=source_path,
            )
        )
    return compared


def _short_names(artifacts: Sequence[str], sources: Iterable[str]) -> dict[str, str]:
    """Return short names by path; the paths themselves if the names would clash.

    The name of an artifact is its path without the folder that all artifacts share; that of a float model is its file
    name.
    """
    shared = os.path.commonpath([Path(path).absolute().parent for path in artifacts])
    short = {path: os.path.relpath(Path(path).absolute(), shared) for path in artifacts} if len(artifacts) > 1 else {}
    short = {path: path for path in artifacts} | short | {path: Path(path).name or _NO_FILE for path in sources}
    return short if len(set(short.values())) == len(short) else {path: path for path in short}


def _origin(experiment: Experiment, compared: ComparedArtifact) -> str:
    """Return the SHA-256 of the float model of an artifact; of an ONNX file that taoq exported, of its checkpoint."""
    if FORMATS[compared.manifest.format].whole:
        model_format = load_format(compared.manifest.format)
        model = model_format.read(compared.source_path, experiment.build)
        properties = model_format.properties(model, compared.source_path)
        if properties:
            return str(properties["source"].get("sha256"))
    return compared.manifest.source["sha256"]
