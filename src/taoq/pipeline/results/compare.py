# SPDX-License-Identifier: Apache-2.0
"""The result of `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from taoq.pipeline.intervals import Difference
from taoq.pipeline.timing import Latency
from taoq.plain import JsonMapping, JsonObject
from taoq.views.pages import as_html, megabytes, page


@dataclass(frozen=True, kw_only=True)
class ArtifactColumns:
    """Columns of a comparison that only artifacts have.

    Attributes:
        source: Name of the float model that the artifact was made from.
        target: Purpose of the backend, in one line.
        accuracy: Accuracy check of the artifact: metric, float, quantized, drop, max_drop, met; empty if it has none.
        layers: Number of quantized layers.
        float_size: Size of the float model in bytes.
        difference: Difference of the metric to the float model.
        difference_to_first: Difference of the metric to the first artifact; None for the first itself.
    """

    source: str
    target: str
    accuracy: JsonMapping
    layers: int
    float_size: int
    difference: Difference
    difference_to_first: Difference | None


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A row of a comparison.

    Attributes:
        model: Short name.
        path: Path of the artifact or of the float model.
        backend: Name of the backend; `float32` for a float model.
        size: Size in bytes.
        figures: Values of the metric by name.
        speeds: Latency at each batch size; speed-ups are relative to the artifact's own float model.
        artifact: Columns that only artifacts have; None for a float model.
    """

    model: str
    path: str
    backend: str
    size: int
    figures: Mapping[str, float]
    speeds: tuple[Latency, ...]
    artifact: ArtifactColumns | None = None

    def to_json(self) -> JsonObject:
        """Return a row of results.json."""
        row: JsonObject = {
            "model": self.model,
            "path": self.path,
            "backend": self.backend,
            "size": self.size,
            "figures": dict(self.figures),
            "speeds": [_without_model(speed.to_json()) for speed in self.speeds],
            "difference": None,
        }
        if self.artifact is None:
            return row
        first = self.artifact.difference_to_first
        return row | {
            **vars(self.artifact),
            "accuracy": dict(self.artifact.accuracy),
            "difference": self.artifact.difference.to_json(),
            "difference_to_first": first.to_json() if first else None,
        }


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Result of `taoq.compare`: artifacts and their float models, side by side.

    Attributes:
        task: Name of the task; empty for a network passed from Python.
        metric: Name of the metric that is compared.
        num_images: Number of evaluated samples.
        device: Device that the models ran on.
        threads: Number of CPU threads of torch.
        runs: Number of measured runs of each model.
        batch_sizes: Batch sizes that latency was measured at.
        models: The float models, then the artifacts in the order of the arguments.
        settings: Fields of `quantize` that differ, with the value in each artifact.
        layers: Layers whose formats differ, with the format in each artifact.
        versions: Versions of Python and of the libraries.
        command: Command line; empty for a call from Python.
        directory: Folder of the results; None if none were written.
    """

    task: str
    metric: str
    num_images: int
    device: str
    threads: int
    runs: int
    batch_sizes: tuple[int, ...]
    models: tuple[ComparedModel, ...]
    settings: Mapping[str, JsonMapping] = field(repr=False)
    layers: Mapping[str, Mapping[str, str | None]] = field(repr=False)
    versions: Mapping[str, str]
    command: str = ""
    directory: Path | None = None

    def to_json(self) -> JsonObject:
        """Return the content of results.json."""
        return {
            "task": self.task,
            "metric": self.metric,
            "num_images": self.num_images,
            "device": self.device,
            "threads": self.threads,
            "runs": self.runs,
            "batch_sizes": list(self.batch_sizes),
            "models": [model.to_json() for model in self.models],
            "settings": {name: dict(values) for name, values in self.settings.items()},
            "layers": {name: dict(values) for name, values in self.layers.items()},
            "versions": dict(self.versions),
            "command": self.command,
        }

    def html(self) -> str:
        """Return the report as a self-contained HTML page."""
        return page("compare", self.to_json())

    def _repr_html_(self) -> str:
        rows = [
            [row.model, row.backend, megabytes(row.size), f"{row.figures[self.metric]:.4f}",
             row.artifact.difference.interval if row.artifact else ""]
            for row in self.models
        ]  # fmt: skip
        return as_html(f"{self.num_images} images", ["model", "backend", "size", self.metric, "95 % interval"], rows)


def _without_model(row: JsonMapping) -> JsonObject:
    return {key: value for key, value in row.items() if key != "model"}
