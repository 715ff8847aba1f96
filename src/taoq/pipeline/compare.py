# SPDX-License-Identifier: Apache-2.0
"""compare: artifacts beside the float models that they were made from, on the same images, in turns."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from taoq.errors import Fault, Notice, SpecError, TaoqError
from taoq.pipeline import differences
from taoq.pipeline.artifacts import Artifact, Manifest, find_artifact, read_artifact, source_is_unchanged, versions
from taoq.pipeline.evaluate import Measured, figure_named, measure
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.intervals import difference
from taoq.pipeline.models import fitting_artifact, open_runtime
from taoq.pipeline.results.compare import ArtifactColumns, ComparedModel, CompareResult
from taoq.pipeline.staging import staged
from taoq.pipeline.timing import Latency, check_batch_sizes, latency, note_fixed_batches, run_in_turns
from taoq.plain import JsonObject
from taoq.quantization.backends import load_backend
from taoq.quantization.formats import FORMATS, load_format
from taoq.runtimes.base import Runtime, noise
from taoq.spec.fields import changed
from taoq.spec.load import spec_to_dict

log = logging.getLogger(__name__)

PAGE = "compare.html"
_NO_FILE = "float32"
"""Name of a float model without a file."""
_NOT_USED = ("batch_size", "compile", "min_speedup")
"""Fields of the section `benchmark` that have no effect here; the models are those of the command line."""


@dataclass(frozen=True, kw_only=True)
class ComparedArtifact:
    """An artifact to compare.

    Attributes:
        name: Its name in the tables.
        path: Its folder as it was given.
        artifact: The artifact.
        source: Name of the float model that it was made from.
        source_path: Path of that model.
    """

    name: str
    path: str
    artifact: Artifact
    source: str
    source_path: str

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.artifact.manifest


def task_and_spec(artifacts: Sequence[str], spec: str | None) -> tuple[str, str]:
    """The task of artifacts, and the spec to compare them with: the given one, or that of the first artifact.

    Args:
        artifacts: Folders of artifacts, as they were given.
        spec: Path of the spec; None if none was given.

    Raises:
        SpecError: There is no artifact.
        TaoqError: The first is damaged, or its spec is gone.
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


@dataclass(frozen=True)
class Comparison:
    """Artifacts that were read and can be compared.

    Attributes:
        experiment: The experiment, for the evaluation data and the section benchmark.
        artifacts: The artifacts.
        figure: The figure that counts.
    """

    experiment: Experiment
    artifacts: Sequence[ComparedArtifact]
    figure: str


def read_artifacts(experiment: Experiment, artifacts: Sequence[str]) -> Comparison:
    """Read artifacts, and check everything that needs no model.

    Args:
        experiment: The experiment.
        artifacts: Folders of the artifacts.

    Raises:
        TaoqError: One is damaged, or of another task or network, or its float model is gone.
        SpecError: One is named twice, or a field does not fit.
    """
    section = experiment.spec.benchmark
    check_batch_sizes(section.batch_sizes)
    for name in changed(section, _NOT_USED):
        log.warning(Notice(f"benchmark.{name}", "has no effect on compare"))
    compared = _read(experiment, artifacts)
    if len({_origin(experiment, entry) for entry in compared}) > 1:
        names = " and ".join(dict.fromkeys(entry.source_path for entry in compared))
        log.warning("the artifacts were made from different float models, %s: each is compared with its own", names)
    return Comparison(experiment, compared, compared_figure(experiment))


def compare(comparison: Comparison, directory: Path | None = None, *, command: str = "") -> CompareResult:
    """Measure artifacts and their float models.

    Args:
        comparison: The artifacts.
        directory: Gets results.json and compare.html; None writes nothing.
        command: The command line, for the report.
    """
    experiment, compared, figure = comparison.experiment, comparison.artifacts, comparison.figure
    section = experiment.spec.benchmark
    paths = {entry.source: entry.source_path for entry in compared} | {entry.name: entry.path for entry in compared}
    models = {
        name: open_runtime(experiment, dataclasses.replace(section, checkpoint=path, is_quantized=None), "benchmark")
        for name, path in paths.items()
    }
    measured = measure(experiment, list(models.values()), figure)
    speeds = _speeds(experiment, compared, models)
    result = CompareResult(
        task=experiment.task,
        metric=figure,
        num_images=measured.num_images,
        device=next(iter(models.values())).device,
        threads=torch.get_num_threads(),
        runs=section.runs,
        batch_sizes=tuple(section.batch_sizes),
        models=tuple(_rows(compared, list(models), measured, figure, speeds)),
        settings=_settings(experiment, compared),
        layers=differences.layers({entry.name: entry.manifest.plan for entry in compared}),
        versions=versions(("torch", "onnxruntime-gpu")),
        command=command,
        directory=directory,
    )
    if directory:
        with staged(directory) as stage:
            stage.write_json("results.json", result.to_json())
            stage.write_text(PAGE, result.html())
            stage.write_spec("experiment.yaml", experiment.spec)
            stage.commit()
    return result


def compared_figure(experiment: Experiment) -> str:
    """The figure that counts: that of the budget, else the first. What evaluation lacks is reported before the work."""
    budget = experiment.spec.quantize.accuracy
    figure = figure_named(experiment, budget.metric if budget else "auto", "quantize.accuracy.metric")
    experiment.evaluation()
    return figure


def _folder(name: str) -> Path:
    directory = find_artifact(name)
    if directory is None:
        raise TaoqError(Fault(name, "is no artifact", "name a folder that taoq <task> quantize wrote"))
    return directory


def _read(experiment: Experiment, artifacts: Sequence[str]) -> list[ComparedArtifact]:
    opened: dict[str, Artifact] = {}
    directories: set[Path] = set()
    for path in artifacts:
        directory = _folder(path)
        if directory.resolve() in directories:
            raise SpecError(Fault(path, "is named twice", "name each artifact once"))
        directories.add(directory.resolve())
        artifact = opened[path] = fitting_artifact(experiment, directory)
        source = artifact.manifest.source
        if not _source_is_there(experiment, source):
            what = f"the float model that it was made from, {source['path']}, is not there as it was"
            hint = "compare in the folder in which it was quantized, with that file in place"
            if not source["path"]:
                what, hint = "was made from another network", "give the network, with its weights, that was quantized"
            raise TaoqError(Fault(path, what, hint))
    sources: dict[str, str] = {}  # one float model may have been given by several paths
    for artifact in opened.values():
        sources.setdefault(artifact.manifest.source["sha256"], artifact.manifest.source["path"])
    names = _short_names(artifacts, sources.values())
    compared = []
    for path, artifact in opened.items():
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


def _source_is_there(experiment: Experiment, source: Mapping[str, str]) -> bool:
    """Whether the float model of an artifact is the one that it was made from; one without a file is built."""
    if source["path"]:
        return source_is_unchanged(source)
    return load_format("torch").digest(experiment.build("")) == source["sha256"]


def _short_names(artifacts: Sequence[str], sources: Iterable[str]) -> dict[str, str]:
    """Short names by path: of artifacts what their paths do not share, of float models the file's; else the paths."""
    shared = os.path.commonpath([Path(path).absolute().parent for path in artifacts])
    short = {path: os.path.relpath(Path(path).absolute(), shared) for path in artifacts} if len(artifacts) > 1 else {}
    short = {path: path for path in artifacts} | short | {path: Path(path).name or _NO_FILE for path in sources}
    return short if len(set(short.values())) == len(short) else {path: path for path in short}


def _origin(experiment: Experiment, compared: ComparedArtifact) -> str:
    """The sha256 of what an artifact comes from: of a file that taoq exported, that of its checkpoint."""
    if FORMATS[compared.manifest.format].whole:
        model_format = load_format(compared.manifest.format)
        model = model_format.read(compared.source_path, experiment.build)
        properties = model_format.properties(model, compared.source_path)
        if properties:
            return str(properties["source"].get("sha256"))
    return compared.manifest.source["sha256"]


def _speeds(
    experiment: Experiment, compared: Sequence[ComparedArtifact], models: Mapping[str, Runtime]
) -> dict[str, list[Latency]]:
    """Latencies of each model, one per batch size, against its own float model."""
    section = experiment.spec.benchmark
    reference = {entry.name: entry.source for entry in compared}
    speeds: dict[str, list[Latency]] = {name: [] for name in models}
    for batch in section.batch_sizes:
        note_fixed_batches(models, batch)
        inputs = noise(experiment.example(), batch)
        seconds = run_in_turns(models, inputs, warmup=section.warmup, runs=section.runs)
        for name in models:
            speeds[name].append(latency(name, batch, seconds[name], seconds[reference.get(name, name)]))
    return speeds


def _rows(
    compared: Sequence[ComparedArtifact],
    names: Sequence[str],
    measured: Measured,
    figure: str,
    speeds: Mapping[str, Sequence[Latency]],
) -> list[ComparedModel]:
    """One row per model, the float ones first."""
    by_name = dict(zip(names, zip(measured.metrics, measured.figures, strict=True), strict=True))
    rows: list[ComparedModel] = []
    for source in dict.fromkeys(entry.source for entry in compared):
        made = next(entry for entry in compared if entry.source == source)
        rows.append(
            ComparedModel(
                model=source,
                path=made.source_path,
                backend="float32",
                size=made.manifest.float_size,
                figures=dict(by_name[source][1]),
                speeds=tuple(speeds[source]),
            )
        )
    first = compared[0]
    for entry in compared:
        metric, figures = by_name[entry.name]
        manifest = entry.manifest
        columns = ArtifactColumns(
            source=entry.source,
            target=load_backend(manifest.backend).capability.target,
            accuracy=manifest.accuracy,
            layers=manifest.layers_quantized,
            float_size=manifest.float_size,
            difference=difference(by_name[entry.source][0], metric, figure),
            difference_to_first=None if entry is first else difference(by_name[first.name][0], metric, figure),
        )
        rows.append(
            ComparedModel(
                model=entry.name,
                path=entry.path,
                backend=manifest.backend,
                size=manifest.size,
                figures=dict(figures),
                speeds=tuple(speeds[entry.name]),
                artifact=columns,
            )
        )
    return rows


def _settings(experiment: Experiment, compared: Sequence[ComparedArtifact]) -> dict[str, JsonObject]:
    """The settings of `quantize` that differ."""
    # through the schema, which fills in the fields that an older taoq did not have
    sections = {
        entry.name: spec_to_dict(experiment.restore(entry.artifact.stored_spec).spec)["quantize"] for entry in compared
    }
    settings = differences.settings(sections, "quantize")
    settings.pop("quantize.results_dir", None)  # always different
    return settings
