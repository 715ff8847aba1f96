# SPDX-License-Identifier: Apache-2.0
"""inference: predictions for images, as files and pictures."""

from __future__ import annotations

from typing import Any

from taoq.actions import others
from taoq.actions.open_model import open_runtime
from taoq.actions.results import results_dir, staged, write_experiment
from taoq.spec import SpecSource, load_spec
from taoq.status import run_status, track
from taoq.tasks.base import Task


def run(task: Task[Any], source: SpecSource) -> None:
    """Run a float checkpoint or an artifact on the images of test_dataset."""
    spec = load_spec(source, task.spec, unused=task.unused, not_needed=others("inference"))
    directory = results_dir(spec, "inference")
    with run_status(directory, task.name, "inference") as status:
        batches = task.inference_batches(spec)
        runtime = open_runtime(task, spec, spec.inference, "inference")
        with staged(directory) as stage:
            with task.predictions(spec, stage) as predictions:
                for batch in track(batches, batches.num_samples, "running"):
                    predictions.write(runtime.run(batch.inputs), batch)
            write_experiment(stage / "experiment.yaml", spec)
        status.write("RUNNING", "Inference done.", {"num_images": batches.num_samples})
    print(
        f"{batches.num_samples} images on {runtime.device}; wrote "
        + ", ".join(str(directory / name) for name in predictions.files)
    )
