# SPDX-License-Identifier: Apache-2.0
"""evaluate: compute the task's metric on its labelled data."""

from __future__ import annotations

from taoq.actions.base import Show, load_experiment
from taoq.pipeline.evaluate import evaluate
from taoq.pipeline.results.evaluate import EvaluateResult
from taoq.pipeline.staging import results_dir
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task
from taoq.views.tables import metrics_table


def run(task: Task[S], source: SpecSource, show: Show) -> EvaluateResult:
    """Evaluate the checkpoint of the section `evaluate`: float or an artifact."""
    experiment = load_experiment(task, source, "evaluate")
    directory = results_dir(experiment.spec, "evaluate")
    with run_status(directory, task.name, "evaluate") as status:
        result = evaluate(experiment, directory)
        status.running("Evaluation metrics.", task.kpi(result.metrics))
    show(f"{result.checkpoint}: {result.num_images} images on {result.device}")
    show(metrics_table(result))
    show(f"{result.num_images / result.seconds:.1f} images/s; results: {directory}")
    return result
