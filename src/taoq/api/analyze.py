# SPDX-License-Identifier: Apache-2.0
"""taoq.analyze."""

from __future__ import annotations

from pathlib import Path

from taoq.api.config import calibration_samples, section_of, spec_of, with_evaluation
from taoq.api.models import check_model
from taoq.pipeline.analyze import analyze as analyze_checked
from taoq.pipeline.evaluate import figure_named
from taoq.pipeline.prepare import check
from taoq.pipeline.results.analyze import AnalyzeResult
from taoq.pipeline.supplied import Loader, Model, supply
from taoq.plain import JsonMapping
from taoq.tasks.metrics import AnyMetric


def analyze(
    model: Model,
    config: JsonMapping,
    *,
    evaluation: Loader,
    metric: AnyMetric,
    calibration: Loader | None = None,
    results_dir: str | Path | None = None,
    **options: object,
) -> AnalyzeResult:
    """Rank the layers that a config would quantize by what they do to the outputs and to the metric.

    Args:
        model: The float model; see `quantize`.
        config: The section `quantize` of a spec.
        evaluation: Loader of labelled data.
        metric: The metric.
        calibration: Loader of calibration data.
        results_dir: Gets analysis.json and analysis.html; without it nothing is written.
        options: Fields of the section `analyze`: num_samples, groups, confirm, metric.

    Raises:
        SpecError: The config or an option is wrong.
        TaoqError: The model does not run.
    """
    spec = spec_of(quantize=section_of(config), analyze=options)
    check_model(model, spec)
    experiment = supply(
        model,
        with_evaluation(spec, evaluation),
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        num_samples=calibration_samples(config),
    )
    directory = Path(results_dir) if results_dir else None
    figure = figure_named(experiment, spec.analyze.metric, "analyze.metric")
    return analyze_checked(check(experiment, directory), figure, directory)
