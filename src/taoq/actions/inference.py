# SPDX-License-Identifier: Apache-2.0
"""inference: write predictions for images."""

from __future__ import annotations

from taoq.actions.base import Show, load_experiment
from taoq.pipeline.inference import infer
from taoq.pipeline.results.inference import InferenceResult
from taoq.pipeline.staging import results_dir
from taoq.spec.source import SpecSource
from taoq.status import run_status
from taoq.tasks.base import S, Task


def run(task: Task[S], source: SpecSource, show: Show) -> InferenceResult:
    """Run the checkpoint of the section `inference`, float or an artifact, on images."""
    experiment = load_experiment(task, source, "inference")
    directory = results_dir(experiment.spec, "inference")
    with run_status(directory, task.name, "inference") as status:
        result = infer(experiment, directory)
        status.running("Inference done.", {"num_images": result.num_images})
    show(f"{result.num_images} images on {result.device}; wrote {', '.join(map(str, result.files))}")
    return result
