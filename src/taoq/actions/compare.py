# SPDX-License-Identifier: Apache-2.0
"""compare: compare artifacts with each other and with their float models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from taoq.actions.base import Show, load_experiment
from taoq.pipeline.compare import PAGE, compare
from taoq.pipeline.comparison import read_artifacts
from taoq.pipeline.results.compare import CompareResult
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task
from taoq.views.tables import compare_table, differences_table


def run(task: Task[S], source: SpecSource, show: Show, *, artifacts: Sequence[str]) -> CompareResult:
    """Measure artifacts and their float models, and write the results to `<results_dir>/compare`.

    Args:
        task: The task.
        source: Spec with the evaluation data and the sections `evaluate` and `benchmark`.
        show: Receives what is printed.
        artifacts: Folders of the artifacts.
    """
    experiment = load_experiment(task, source)
    comparison = read_artifacts(experiment, artifacts)
    directory = Path(experiment.spec.results_dir or ".", "compare")
    with run_status(directory, task.name, "compare") as status:
        result = compare(comparison, directory, command=source.command)
        status.running("Compared.", {"artifacts": len(artifacts)})
    show(compare_table(result))
    compared = [model for model in result.models if model.artifact]
    for model in compared[1:]:
        assert model.artifact is not None
        difference = model.artifact.difference_to_first
        assert difference is not None
        interval = f" ({difference.interval}): {difference.verdict}" if difference.interval else ""
        show(f"{model.model} against {compared[0].model}: {result.metric} {difference.value:+.4f}{interval}")
    targets = {model.backend: model.artifact.target for model in compared if model.artifact}
    for backend, target in targets.items():
        show(f"{backend} is for {target}")
    if len(compared) > 1:
        show(differences_table(result))
    show(f"report: {directory / PAGE}")
    return result
