# SPDX-License-Identifier: Apache-2.0
"""compare: measure artifacts and their float models on the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from taoq.pipeline import differences
from taoq.pipeline.artifacts import versions
from taoq.pipeline.comparison import ComparedArtifact, Comparison
from taoq.pipeline.evaluate import Measured, measure
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.intervals import difference
from taoq.pipeline.models import open_runtime
from taoq.pipeline.results.compare import ArtifactColumns, ComparedModel, CompareResult
from taoq.pipeline.staging import staged
from taoq.pipeline.timing import Latency, latency, note_fixed_batches, run_in_turns
from taoq.plain import JsonObject
from taoq.quantization.backends import load_backend
from taoq.runtimes.base import Runtime, noise
from taoq.spec.load import spec_to_dict

PAGE = "compare.html"


def compare(comparison: Comparison, directory: Path | None = None, *, command: str = "") -> CompareResult:
    """Measure the accuracy and the speed of artifacts and of their float models.

    Args:
        comparison: The artifacts.
        directory: Folder for results.json and compare.html; None writes nothing.
        command: Command line, for the report.
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


def _speeds(
    experiment: Experiment, compared: Sequence[ComparedArtifact], models: Mapping[str, Runtime]
) -> dict[str, list[Latency]]:
    """Measure the latency of each model at each batch size; speed-ups are relative to its own float model."""
    section = experiment.spec.benchmark
    sources = {entry.name: entry.source for entry in compared}
    speeds: dict[str, list[Latency]] = {name: [] for name in models}
    for batch in section.batch_sizes:
        note_fixed_batches(models, batch)
        inputs = noise(experiment.example(), batch)
        seconds = run_in_turns(models, inputs, warmup=section.warmup, runs=section.runs)
        for name in models:
            speeds[name].append(latency(name, batch, seconds[name], seconds[sources.get(name, name)]))
    return speeds


def _rows(
    compared: Sequence[ComparedArtifact],
    names: Sequence[str],
    measured: Measured,
    figure: str,
    speeds: Mapping[str, Sequence[Latency]],
) -> list[ComparedModel]:
    """Return one row per model, the float models first."""
    metrics = dict(zip(names, measured.metrics, strict=True))
    figures = dict(zip(names, measured.figures, strict=True))
    rows: list[ComparedModel] = []
    for source in dict.fromkeys(entry.source for entry in compared):
        artifact = next(entry for entry in compared if entry.source == source)
        rows.append(
            ComparedModel(
                model=source,
                path=artifact.source_path,
                backend="float32",
                size=artifact.manifest.float_size,
                figures=dict(figures[source]),
                speeds=tuple(speeds[source]),
            )
        )
    first = compared[0]
    for entry in compared:
        metric, manifest = metrics[entry.name], entry.manifest
        columns = ArtifactColumns(
            source=entry.source,
            target=load_backend(manifest.backend).capability.target,
            accuracy=manifest.accuracy,
            layers=manifest.layers_quantized,
            float_size=manifest.float_size,
            difference=difference(metrics[entry.source], metric, figure),
            difference_to_first=None if entry is first else difference(metrics[first.name], metric, figure),
        )
        rows.append(
            ComparedModel(
                model=entry.name,
                path=entry.path,
                backend=manifest.backend,
                size=manifest.size,
                figures=dict(figures[entry.name]),
                speeds=tuple(speeds[entry.name]),
                artifact=columns,
            )
        )
    return rows


def _settings(experiment: Experiment, compared: Sequence[ComparedArtifact]) -> dict[str, JsonObject]:
    """Return the fields of `quantize` that differ, with the value in each artifact."""
    # Load the stored specs through the schema, which adds the fields that an older taoq did not have.
    sections = {
        entry.name: spec_to_dict(experiment.restore(entry.artifact.stored_spec).spec)["quantize"] for entry in compared
    }
    settings = differences.settings(sections, "quantize")
    settings.pop("quantize.results_dir", None)  # differs always
    return settings
