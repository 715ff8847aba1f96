# SPDX-License-Identifier: Apache-2.0
"""inference: write the predictions of a model on images, as files and pictures."""

from __future__ import annotations

from pathlib import Path

from taoq.network import batch_size
from taoq.pipeline.experiment import Experiment
from taoq.pipeline.finite import refuse_nan
from taoq.pipeline.models import experiment_for, open_runtime
from taoq.pipeline.results.inference import InferenceResult
from taoq.pipeline.staging import staged
from taoq.status import track


def infer(experiment: Experiment, directory: Path) -> InferenceResult:
    """Run the checkpoint of the section `inference` on the task's images.

    Args:
        experiment: The experiment.
        directory: Folder for the predictions.
    """
    experiment.inference()  # Report missing images before opening a model.
    experiment = experiment_for(experiment, experiment.spec.inference.checkpoint)
    batches = experiment.inference()
    runtime = open_runtime(experiment, experiment.spec.inference, "inference")
    with staged(directory) as stage:
        with experiment.predictions(stage.path) as predictions:
            for batch in track(batches, batches.num_samples, "running", lambda batch: batch_size(batch.inputs)):
                outputs = runtime.run(batch.inputs)
                refuse_nan(outputs, batch, experiment.spec.inference.checkpoint)
                predictions.write(outputs, batch)
        stage.write_spec("experiment.yaml", experiment.spec)
        stage.commit()
    return InferenceResult(
        num_images=batches.num_samples,
        device=runtime.device,
        files=tuple(directory / name for name in predictions.files),
    )
