# SPDX-License-Identifier: Apache-2.0
"""evaluate: the task's metric over its labelled data."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from taoq.actions import others
from taoq.actions.measure import measure
from taoq.actions.open_model import open_runtime
from taoq.actions.results import results_dir, staged, write_experiment, write_json
from taoq.console import show
from taoq.spec import SpecSource, load_spec
from taoq.status import run_status
from taoq.tasks.base import Task


def run(task: Task[Any], source: SpecSource) -> None:
    """Evaluate a float checkpoint or an artifact; write results.json and what the metric draws."""
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("evaluate"))
    directory = results_dir(spec, "evaluate")
    with run_status(directory, task.name, "evaluate") as status:
        task.evaluation_batches(spec)  # before a model is opened: images that are missing are said at once
        runtime = open_runtime(task, spec, spec.evaluate, "evaluate")
        found = measure(task, spec, [runtime])
        (figures,), (metric,) = found.figures, found.metrics
        with staged(directory) as stage:
            results = {
                "checkpoint": spec.evaluate.checkpoint,
                "num_images": found.num_images,
                "device": runtime.device,
                "seconds": round(found.seconds, 3),
                "metrics": figures,
                **metric.write(stage),
            }
            write_json(stage / "results.json", results)
            write_experiment(stage / "experiment.yaml", spec)
        status.write("RUNNING", "Evaluation metrics.", figures)
    print(f"{spec.evaluate.checkpoint}: {found.num_images} images on {runtime.device}")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    show(table)
    print(f"{found.num_images / found.seconds:.1f} images/s; results: {directory}")
