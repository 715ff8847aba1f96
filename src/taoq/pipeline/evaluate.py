# SPDX-License-Identifier: Apache-2.0
"""evaluate: measure the metric of models on the evaluation data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.network import Outputs, batch_size
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.finite import refuse_nan
from taoq.pipeline.models import experiment_for, open_runtime
from taoq.pipeline.results.evaluate import EvaluateResult
from taoq.pipeline.staging import staged
from taoq.runtimes.base import Runtime
from taoq.status import track
from taoq.tasks.base import Batch, Metric, Predictions, Writing


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The evaluation of several models on the same samples.

    Attributes:
        metrics: Metric of each model, after `compute`, in the order of the models.
        figures: Figures of each metric, by name.
        num_images: Number of samples.
        seconds: Duration of the evaluation of all models.
    """

    metrics: tuple[Metric, ...]
    figures: tuple[Mapping[str, float], ...]
    num_images: int
    seconds: float


def measure(
    experiment: Experiment,
    models: Sequence[Runtime],
    needed: str = "",
    record: Callable[[Outputs, Batch], None] | None = None,
) -> Measured:
    """Evaluate models on the same samples, reading each sample once.

    Args:
        experiment: The experiment, for its data and metric.
        models: The models.
        needed: Name of a figure that must be defined; empty if none must be.
        record: Receives the outputs of each model for each batch.

    Raises:
        TaoqError: If the needed figure is undefined or NaN on the evaluation data.
    """
    batches = experiment.evaluation()
    metrics = tuple(experiment.metric() for _ in models)
    started, count = time.monotonic(), 0
    for batch in track(batches, batches.num_samples, "evaluating", lambda batch: batch_size(batch.inputs)):
        count += batch_size(batch.inputs)
        for model, metric in zip(models, metrics, strict=True):
            outputs = model.run(batch.inputs)
            metric.update(outputs, batch.targets)
            if record:
                record(outputs, batch)
    seconds = time.monotonic() - started
    figures = tuple(metric.compute() for metric in metrics)
    if needed and not all(needed in values for values in figures):
        what = f"{needed} has no value: nothing in these {count} image(s) defines it"
        raise TaoqError(Fault("the evaluation data", what, "evaluate on images with something to find"))
    if needed and any(math.isnan(values[needed]) for values in figures):
        what = f"{needed} is not a number (NaN) on these {count} image(s)"
        raise TaoqError(Fault("the evaluation data", what, "look for samples on which the metric divides by zero"))
    return Measured(metrics=metrics, figures=figures, num_images=count, seconds=seconds)


def figure_named(experiment: Experiment, name: str, where: str) -> str:
    """Return the figure that a field names, where `auto` means the first figure of the metric.

    Args:
        experiment: The experiment.
        name: Value of the field.
        where: Name of the field, for messages.

    Raises:
        SpecError: If the metric has no such figure, or no figure that models can be compared by.
    """
    figures = experiment.metric().figures
    if not figures:
        hint = "give a metric that is better the higher it is, or a function that scores samples"
        raise SpecError(Fault("metric", "has no figure that is better the higher it is, to compare models by", hint))
    if name == "auto":
        return figures[0]
    if name not in figures:
        hint = did_you_mean(name, figures, "write auto, or one of " + ", ".join(figures))
        measured_by = experiment.task or "the metric"
        raise SpecError(Fault(where, f"{measured_by} measures no figure '{name}'", hint))
    return name


def evaluate(experiment: Experiment, directory: Path | None = None) -> EvaluateResult:
    """Evaluate the checkpoint of the section `evaluate`.

    Args:
        experiment: The experiment.
        directory: Folder for results.json and the files of the metric; None writes nothing.
    """
    section = experiment.spec.evaluate
    experiment.evaluation()  # Report missing images before opening a model.
    experiment = experiment_for(experiment, section.checkpoint)
    runtime = open_runtime(experiment, section, "evaluate")
    return evaluate_runtime(experiment, runtime, section.checkpoint, directory)


def evaluate_runtime(
    experiment: Experiment, runtime: Runtime, checkpoint: str, directory: Path | None
) -> EvaluateResult:
    """Evaluate a model that is already open; see `evaluate`."""
    if directory is None:
        return _result(measure(experiment, [runtime], record=_recorder(checkpoint, None)), runtime, checkpoint)
    with staged(directory) as stage:
        with experiment.records(stage.path) if experiment.records else contextlib.nullcontext() as records:
            measured = measure(experiment, [runtime], record=_recorder(checkpoint, records))
        metric = measured.metrics[0]
        details = metric.write(stage.path) if isinstance(metric, Writing) else {}
        result = dataclasses.replace(_result(measured, runtime, checkpoint), details=details, directory=directory)
        stage.write_json("results.json", result.to_json())
        stage.write_spec("experiment.yaml", experiment.spec)
        stage.commit()
    return result


def _recorder(checkpoint: str, records: Predictions | None) -> Callable[[Outputs, Batch], None]:
    """Return a function that refuses outputs that are not numbers, and writes the others into the records."""

    def record(outputs: Outputs, batch: Batch) -> None:
        refuse_nan(outputs, batch, checkpoint)
        if records:
            records.write(outputs, batch)

    return record


def _result(measured: Measured, runtime: Runtime, checkpoint: str) -> EvaluateResult:
    return EvaluateResult(
        checkpoint=checkpoint,
        num_images=measured.num_images,
        device=runtime.device,
        seconds=measured.seconds,
        metrics=measured.figures[0],
    )
