# SPDX-License-Identifier: Apache-2.0
"""taoq.evaluate."""

from __future__ import annotations

from pathlib import Path

import torch

from taoq.api.config import device_of
from taoq.api.models import name_of, open_model
from taoq.pipeline.evaluate import evaluate_runtime
from taoq.pipeline.models import start
from taoq.pipeline.results.evaluate import EvaluateResult
from taoq.pipeline.supplied import Loader, Model, preserve_state
from taoq.tasks.metrics import AnyMetric


def evaluate(
    model: Model,
    evaluation: Loader,
    metric: AnyMetric,
    *,
    device: str | torch.device | None = None,
    results_dir: str | Path | None = None,
) -> EvaluateResult:
    """Evaluate a float or quantized model.

    Args:
        model: An `nn.Module`, such as `taoq.load` returns for torch backends; the path of an ONNX file; or the folder
            of an artifact of an ONNX backend.
        evaluation: Iterable of labelled batches; see `taoq.quantize`.
        metric: Metric that is computed on `evaluation`; see `taoq.quantize`.
        device: `cpu`, `cuda`, `cuda:N`, or `trt` (TensorRT) for ONNX files. None selects the GPU if there is one.
        results_dir: Folder for results.json. None writes nothing.

    Returns:
        The values of the metric by name, in `metrics`.

    Raises:
        TaoqError: If the model does not run on the data.

    Example:
        >>> import taoq
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> quantized = taoq.load("results/int8", network)
        >>> result = taoq.evaluate(quantized, labelled_images, MulticlassAccuracy(num_classes=10))
        >>> accuracy = result.metrics["MulticlassAccuracy"]
    """
    experiment, opened = open_model(model, evaluation=evaluation, metric=metric)
    with preserve_state(model):
        runtime = start(experiment, opened, device_of(device), "device")
        return evaluate_runtime(experiment, runtime, name_of(model), Path(results_dir) if results_dir else None)
