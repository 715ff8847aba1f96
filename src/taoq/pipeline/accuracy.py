# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a quantized model against its float model, and the accuracy budget of a spec."""

from __future__ import annotations

import logging
from pathlib import Path

from taoq.errors import Notice
from taoq.pipeline.evaluate import figure_named, measure
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.intervals import difference
from taoq.pipeline.models import OpenedModel, start
from taoq.pipeline.prepare import Prepared
from taoq.pipeline.results.quantize import AccuracyCheck, Evaluation
from taoq.pipeline.search import within
from taoq.quantization.backends.base import M
from taoq.quantization.formats import FORMATS
from taoq.quantization.spec import AccuracySpec
from taoq.runtimes.base import Runtime

log = logging.getLogger(__name__)


def budget_figure(experiment: Experiment) -> str:
    """Return the name of the figure that models are compared by: that of `quantize.accuracy`, else the first.

    Raises:
        SpecError: If the metric has no such figure.
    """
    budget = experiment.spec.quantize.accuracy
    return figure_named(experiment, budget.metric if budget else "auto", "quantize.accuracy.metric")


def evaluated_figure(experiment: Experiment) -> str:
    """Return the name of the figure to evaluate; empty if the spec asks for no evaluation.

    Opens the evaluation data, so that missing data is reported before the model is quantized.

    Raises:
        SpecError: If the evaluation data is missing, or if the metric has no such figure.
    """
    section = experiment.spec.quantize
    if not (section.evaluate or section.accuracy):
        return ""
    experiment.evaluation()
    return budget_figure(experiment)


def evaluate_both(prepared: Prepared[M], reference: M, model: M, payload: Path, figure: str) -> Evaluation:
    """Evaluate the float and the quantized model on the same samples.

    Args:
        prepared: The experiment, its backend and its format.
        reference: The float model.
        model: The quantized model.
        payload: File of the quantized model.
        figure: The figure to compare.
    """
    experiment = prepared.experiment
    checkpoint = Path(experiment.spec.quantize.model_path)
    runtimes = [
        _start(prepared, reference, checkpoint, quantized=False),
        _start(prepared, model, payload, quantized=True),
    ]
    measured = measure(experiment, runtimes, figure)
    before, after = measured.metrics
    return Evaluation(
        num_images=measured.num_images,
        seconds=measured.seconds,
        float_figures=dict(measured.figures[0]),
        quantized_figures=dict(measured.figures[1]),
        difference=difference(before, after, figure),
    )


def _start(prepared: Prepared[M], model: M, file: Path, *, quantized: bool) -> Runtime:
    name, device = prepared.backend.capability.format, prepared.experiment.spec.quantize.device
    opened = OpenedModel(model, name, file if FORMATS[name].whole else None, quantized)
    return start(prepared.experiment, opened, device, "quantize.device")


def check_accuracy(budget: AccuracySpec | None, evaluation: Evaluation | None) -> AccuracyCheck | None:
    """Check the loss against the budget; return None without a budget."""
    if budget is None or evaluation is None:
        return None
    figure = evaluation.difference.figure
    before, after = evaluation.float_figures[figure], evaluation.quantized_figures[figure]
    return AccuracyCheck(
        metric=figure,
        float_figure=before,
        quantized_figure=after,
        max_drop=budget.max_drop,
        met=within(before - after, budget.max_drop),
    )


def warn_of_small_budget(accuracy: AccuracyCheck | None, evaluation: Evaluation | None) -> tuple[Notice, ...]:
    """Warn if the budget is smaller than the confidence interval of the difference; return the notice."""
    if accuracy is None or evaluation is None or evaluation.difference.low is None:
        return ()
    half_width = evaluation.difference.value - evaluation.difference.low
    if accuracy.max_drop >= half_width:
        return ()
    what = (
        f"{accuracy.max_drop:g} is less than the uncertainty of the loss on {evaluation.num_images} images,"
        f" which is {half_width:.4f}: evaluate on more images"
    )
    notice = Notice("quantize.accuracy.max_drop", what)
    log.warning(notice)
    return (notice,)
