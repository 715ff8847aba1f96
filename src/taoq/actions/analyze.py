# SPDX-License-Identifier: Apache-2.0
"""analyze: rank layers by how much quantizing them costs."""

from __future__ import annotations

import json
from pathlib import Path

from taoq.actions.base import Show, load_experiment
from taoq.pipeline.analyze import PAGE, analyze
from taoq.pipeline.evaluate import figure_named
from taoq.pipeline.findings import FILE
from taoq.pipeline.prepare import check
from taoq.pipeline.results.analyze import AnalyzeResult
from taoq.pipeline.staging import results_dir
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task
from taoq.views.tables import plan_table, ranking_table


def run(task: Task[S], source: SpecSource, show: Show) -> AnalyzeResult:
    """Rank the layers that the `quantize` section of a spec would quantize."""
    experiment = load_experiment(task, source, "analyze", "quantize")
    directory = results_dir(experiment.spec, "analyze")
    checked = check(experiment, directory)
    figure = figure_named(experiment, experiment.spec.analyze.metric, "analyze.metric")
    with run_status(directory, task.name, "analyze") as status:
        result = analyze(
            checked,
            figure,
            directory,
            command=source.command,
            progress=status.running,
            observe=lambda plan: show(plan_table(plan)),
        )
    _show_result(result, directory, show)
    return result


def _show_result(result: AnalyzeResult, directory: Path, show: Show) -> None:
    show(ranking_table(result))
    show(f"{result.metric}: float {result.float_figure:.4f}, all quantized {result.all_quantized['metric']:.4f}")
    for point in result.curve[1:]:
        show(
            f"  without the worst {point.left_out}: {point.metric:.4f}, {100 * point.macs_share:.1f} % of the"
            " multiply-accumulates quantized"
        )
    if result.skip_names:
        show(f"quantize.skip_names: {json.dumps(list(result.skip_names))}")
    show(result.advice)
    show(f"results: {directory / FILE}, {directory / PAGE}")
