# SPDX-License-Identifier: Apache-2.0
"""The task's metric of models on the evaluation data, and what quantization changed in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taoq.errors import Fault, SpecError, TaoqError, did_you_mean
from taoq.runtime import Runtime
from taoq.status import track
from taoq.tasks.base import Metric, Task


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out of an evaluation.

    Attributes:
        metrics: One a model, in their order; computed.
        figures: Their figures.
        num_images: Images that all of them saw.
        seconds: Of all.
    """

    metrics: tuple[Metric, ...]
    figures: tuple[Mapping[str, float], ...]
    num_images: int
    seconds: float


def measure(task: Task[Any], spec: Any, models: Sequence[Runtime], needed: str = "") -> Measured:
    """Evaluate models on the same images, each image read once.

    Args:
        task: The task.
        spec: Its spec, with the evaluation data.
        models: The models.
        needed: A figure that must have a value.

    Raises:
        TaoqError: It has none.
    """
    batches = task.evaluation_batches(spec)
    metrics = tuple(task.metric(spec) for _ in models)
    started = time.monotonic()
    for batch in track(batches, batches.num_samples, "evaluating"):
        for model, metric in zip(models, metrics, strict=True):
            metric.update(model.run(batch.inputs), batch.targets)
    seconds = time.monotonic() - started
    figures = tuple(metric.compute() for metric in metrics)
    if needed and not all(needed in found for found in figures):
        what = f"{needed} has no value: nothing in these {batches.num_samples} image(s) defines it"
        raise TaoqError(Fault("the evaluation data", what, "evaluate on images with something to find"))
    return Measured(metrics=metrics, figures=figures, num_images=batches.num_samples, seconds=seconds)


def figure_of(task: Task[Any], spec: Any, asked: str, where: str) -> str:
    """The figure that a field names; `auto` is the first of the task.

    Args:
        task: The task.
        spec: Its spec.
        asked: Value of the field.
        where: The field, for messages.

    Raises:
        SpecError: The task measures no such figure.
    """
    known = task.metric(spec).figures
    if asked == "auto":
        return known[0]
    if asked not in known:
        otherwise = "write auto, or one of " + ", ".join(known)
        raise SpecError(
            Fault(where, f"{task.name} measures no figure '{asked}'", did_you_mean(asked, known, otherwise))
        )
    return asked
