# SPDX-License-Identifier: Apache-2.0
"""taoq.evaluate."""

from __future__ import annotations

from pathlib import Path

from taoq.api.config import device_of
from taoq.api.models import kept, name_of, open_model
from taoq.pipeline.evaluate import evaluate_runtime
from taoq.pipeline.models import start
from taoq.pipeline.results.evaluate import EvaluateResult
from taoq.pipeline.supplied import Loader, Model
from taoq.tasks.metrics import AnyMetric


def evaluate(
    model: Model,
    evaluation: Loader,
    metric: AnyMetric,
    *,
    device: str | None = None,
    results_dir: str | Path | None = None,
) -> EvaluateResult:
    """Evaluate a model, float or quantized.

    Args:
        model: An nn.Module (`load` gives one), the path of an ONNX file, or the folder of an ONNX artifact.
        evaluation: Loader of labelled data; see `quantize`.
        metric: The metric; see `quantize`.
        device: cpu, cuda, cuda:N, or trt for ONNX; None is the GPU if there is one.
        results_dir: Gets results.json; without it nothing is written.

    Raises:
        TaoqError: The model does not run on the data.
    """
    experiment, opened = open_model(model, evaluation=evaluation, metric=metric)
    with kept(model):
        runtime = start(experiment, opened, device_of(device), "device")
        return evaluate_runtime(experiment, runtime, name_of(model), Path(results_dir) if results_dir else None)
