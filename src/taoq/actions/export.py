# SPDX-License-Identifier: Apache-2.0
"""export: write a checkpoint or an artifact as an ONNX file."""

from __future__ import annotations

from taoq.actions.base import Show, load_experiment
from taoq.pipeline.export import check_export, export, sized, target_of
from taoq.pipeline.results.export import ExportResult
from taoq.pipeline.staging import results_dir
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task
from taoq.views.pages import megabytes
from taoq.views.tables import proof_table


def run(task: Task[S], source: SpecSource, show: Show) -> ExportResult:
    """Export the checkpoint of the section `export`."""
    experiment = load_experiment(task, source, "export")
    directory = results_dir(experiment.spec, "export")
    target = target_of(experiment.spec.export, directory)
    experiment = sized(experiment)
    check_export(experiment.spec.export, target)
    with run_status(directory, task.name, "export") as status:
        result = export(experiment, target, command=source.command)
        status.running("Exported.", {"size_mb": result.size / 1e6})
    show(proof_table(result.proof))
    quantized = f", {result.quantized_layers} layers quantized" if result.quantized_layers else ""
    inputs = ", ".join(map(str, result.inputs.values()))
    show(
        f"exported {megabytes(result.size)}: opset {result.opset_version}, {result.nodes} nodes{quantized},"
        f" input {inputs}\n{target}"
    )
    return result
